"""Help, version, Ctrl-C, and the names that ``cemg`` exports."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import cemg
from cemg.commands import catalog, data, doctor, evaluate, recommend, serve, train

COMMANDS = {
    "train": train, "recommend": recommend, "evaluate": evaluate, "catalog": catalog, "data": data,
    "doctor": doctor, "serve": serve,
}  # fmt: skip
SLOW = ("torch", "transformers", "sklearn", "matplotlib", "scipy", "polars", "pydantic")  # slow to import


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_import_slow_modules(name):
    """Checks the imported modules, because the time depends on the machine."""
    code = (
        f"import sys; sys.argv = ['cemg-{name}', '-h']\n"
        f"from cemg.commands.{name} import main\n"
        "try:\n    main()\n"
        f"except SystemExit:\n    print(sorted(m for m in {SLOW!r} if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: cemg-" in done.stdout and "--help" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_the_version(name, command, capsys):
    assert command(COMMANDS[name].main, "--version") == 0
    assert capsys.readouterr().out == f"cemg {cemg.__version__}\n"


def test_ctrl_c_reports_what_is_saved_and_how_to_continue(tiny_run, command, capsys, monkeypatch, tmp_path):
    from cemg.pipeline import Pipeline
    from cemg.recommender import Recommender

    run = shutil.copytree(tiny_run, tmp_path / "run")

    def pressed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "generator", pressed)
    assert command(train.main, "--run", run) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted: finished stages and the last checkpoint are kept; cemg-train --run {run} continues"
    )
    monkeypatch.setattr(Recommender, "from_run", pressed)
    assert command(recommend.main, "--run", run, "--history", "item-0001") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: nothing was written"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [(("data", "prepare"), "[SOURCE] OUT"), (("catalog", "export"), "OUT"), (("recommend",), "")],
)
def test_help_names_the_arguments_and_ends_with_examples_that_are_not_wrapped(
    words, arguments, command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "40")
    assert command(COMMANDS[words[0]].main, *words[1:], "--help") == 0
    head, examples = capsys.readouterr().out.split("Examples:\n")
    assert " ".join(head.split("\n\n")[0].split()).endswith(f"[OPTIONS] {arguments}".strip())
    lines = [line.strip() for line in examples.splitlines()]
    assert 1 <= len(lines) <= 3 and all(line.startswith("cemg-" + " ".join(words)) for line in lines)
