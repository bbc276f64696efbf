"""cemg-train --dry-run lists which stages would be built or reused, and why, and writes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cemg.commands import train


def verdicts(printed: str) -> dict[str, str]:
    """Maps each stage to its line of the output."""
    return dict(line.split(maxsplit=1) for line in printed.splitlines())


def files_of(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("options", "built", "why"),
    [
        ((), set(), ""),
        (("--set", "memory.window=3"), {"memory", "gate"}, "window: 10 → 3"),
        (("--set", "generator.epochs=2"), {"generator", "gate"}, "generator.epochs: 6 → 2"),
        (
            ("--set", "graph.epochs=2"),
            {"graph", "tokenizer", "catalog", "generator", "gate"},
            "epochs: 3 → 2",
        ),
        (
            ("--set", "data.synthetic_users=41"),
            {"data", "features", "graph", "memory", "tokenizer", "catalog", "generator", "gate"},
            "the data have changed",
        ),
    ],
)
def test_every_stage_that_a_change_affects_is_listed_with_the_reason(
    tiny_run, tmp_path, command, capsys, options, built, why
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = files_of(run)
    assert command(train.main, "--run", run, *options, "--dry-run") == 0
    said = verdicts(capsys.readouterr().out)
    assert list(said) == ["data", "features", "graph", "memory", "tokenizer", "catalog", "generator", "gate"]
    assert {stage for stage, text in said.items() if text.startswith("built")} == built
    assert all(text == "reused" for stage, text in said.items() if stage not in built)
    assert not built or why in next(text for stage, text in said.items() if stage in built)
    assert files_of(run) == before


def test_a_dry_run_of_a_new_run_lists_every_stage_and_creates_nothing(tmp_path, command, capsys):
    options = ("--set", "data.synthetic_users=40", "--set", "data.synthetic_items=50")
    assert command(train.main, "--run", tmp_path / "new", *options, "--dry-run") == 0
    assert set(verdicts(capsys.readouterr().out).values()) == {"built: it does not exist yet"}
    assert not (tmp_path / "new").exists()


def test_a_damaged_stage_is_listed_as_one_to_rebuild(tiny_run, tmp_path, command, capsys):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "graph" / "graph.safetensors").write_bytes(b"torn")
    assert command(train.main, "--run", run, "--dry-run") == 0
    said = verdicts(capsys.readouterr().out)
    assert said["features"] == "reused" and said["graph"] == "built: it is damaged"
    assert said["tokenizer"] == "built: graph is built again"


def test_a_training_without_a_test_has_no_result_to_copy(
    tmp_path: Path, command: Callable[..., int], capsys
) -> None:
    words = ["--run", tmp_path / "run", "--no-test", "--result", tmp_path / "result.json"]
    assert command(train.main, *words) == 2
    assert "--no-test has no result that --result could copy" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
