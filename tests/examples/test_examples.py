"""The tutorials in examples/ run from start to end and print what their text says."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_your_own_checkpoint_returns_the_items_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "your_own_checkpoint.py"))
    printed = capsys.readouterr().out
    match = re.search(
        r"Same items in the same order: True. Largest difference of a score: (\S+)\.\n", printed
    )
    assert match is not None, printed
    assert float(match[1]) < 1e-4  # sums of three float32 log-probabilities
    assert "All 50 results are in stock: True." in printed
    assert printed.count("are certified.") == 2


@pytest.mark.slow
def test_quickstart_trains_recommends_and_adds_an_item(tmp_path: Path) -> None:
    """In a process of its own, with the commands of this interpreter's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", tmp_path], env=os.environ | {"PATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    recommended = re.findall(r"^(item-\w+) +-\d+\.\d\d  \S", done.stdout, flags=re.MULTILINE)
    assert len(recommended) == 10  # five from the whole catalog, five from a part of it
    history = re.search(r"^User \S+ has (.+)\.$", done.stdout, flags=re.MULTILINE)
    assert history is not None and not set(recommended) & set(history[1].split(", "))
    in_stock = {"item-new", *(f"item-{number:04d}" for number in range(1, 21))}
    assert set(recommended[5:]) <= in_stock
    assert (tmp_path / "run" / "report" / "report.html").is_file()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_starts_with_a_heading_and_has_cells(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "# %% [markdown]" and lines[1].startswith("# # ")
    assert sum(line == "# %%" for line in lines) >= 4
