"""Damaged files of a run are refused or rebuilt. None gives other results, a traceback or a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def count(tmp_path: Path, settings: list[str], *options: object) -> dict[str, int]:
    """The counts of the script, in a new process: it forks, and threads do not survive that."""
    done = subprocess.run(
        [sys.executable, "-m", "damaged", "--settings", json.dumps(settings), *map(str, options)],
        cwd=Path(__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sample_of_damaged_files_of_a_finished_run_is_refused_or_harmless(
    tiny_run, tiny_settings, tmp_path
):
    found = count(tmp_path, tiny_settings, "--cases", 16, "--seed", 7, "--whole", tiny_run)
    assert found["cases"] == 16 and found["refused"] > 3
    assert not {"silent", "traceback", "crash"} & found.keys()


@pytest.mark.slow
def test_none_of_2600_damaged_files_is_silent_or_ends_in_a_traceback(tiny_settings, tmp_path):
    found = count(tmp_path, tiny_settings, "--cases", 2600, "--folder", tmp_path / "runs")
    assert found["cases"] >= 2600 and found["refused"] > 1500
    assert not {"silent", "traceback", "crash"} & found.keys()
