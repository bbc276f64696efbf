"""Baselines are trained in the process of the test: a process of their own imports torch for seconds."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from cemg.baselines.__main__ import main
from cemg.data import Dataset
from cemg.experiments import work
from cemg.processes import run_command


@pytest.fixture(autouse=True)
def _in_process(command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: Sequence[str], log: int) -> int:
        if list(words[1:3]) != ["-m", "cemg.baselines"]:
            return run_command(words, log)
        with os.fdopen(os.dup(log), "a") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                return command(main, *words[3:])
            except Exception:
                traceback.print_exc()
                return 1

    monkeypatch.setattr(work, "run_command", run)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A ring: item i + 1 follows item i."""
    rng = np.random.default_rng(0)
    sequences = [((s + np.arange(6)) % 30).astype(np.int32) for s in rng.integers(30, size=60)]
    ids, blank = [str(i) for i in range(60)], [None] * 30
    toy = Dataset("toy", ids, ids[:30], sequences, [""] * 30, [*blank], [*blank], "as written")
    toy.save(tmp_path / "toy")
    return tmp_path / "toy"
