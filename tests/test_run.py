"""A run's folder: stages are reused, resumed or made anew, never taken half; one command at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cemg.errors import UserError
from cemg.run import Run


class Stage:
    """A stage of two steps that counts its calls and can be made to die in between."""

    def __init__(self, content: str = "made", *, dies: bool = False) -> None:
        self.content, self.dies, self.calls = content, dies, 0
        self.found: list[str] = []

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        self.found = sorted(p.name for p in folder.iterdir())
        (folder / "half.txt").write_text(self.content)
        if self.dies:
            raise KeyboardInterrupt
        (folder / "whole.txt").write_text(self.content)


def test_an_unchanged_stage_is_reused(tmp_path):
    for _ in range(2):
        stage = Stage()
        assert Run(tmp_path).stage("a", {"x": 1}, stage) == tmp_path / "a"
    assert stage.calls == 0 and (tmp_path / "a" / "whole.txt").read_text() == "made"


def test_a_stage_of_another_configuration_is_made_anew_in_a_clean_folder(tmp_path):
    Run(tmp_path).stage("a", {"x": 1}, Stage("old"))
    (tmp_path / "a" / "leftover.txt").write_text("old")
    Run(tmp_path).stage("a", {"x": 2}, Stage("new"))
    assert (tmp_path / "a" / "whole.txt").read_text() == "new"
    assert not (tmp_path / "a" / "leftover.txt").exists()


def test_a_changed_input_makes_what_follows_anew_and_nothing_else(tmp_path):
    def run(of_a: int) -> list[int]:
        made, stages = Run(tmp_path), [Stage(), Stage(), Stage()]
        made.stage("a", {"x": of_a}, stages[0])
        made.stage("b", {}, stages[1], inputs=("a",))
        made.stage("c", {}, stages[2])
        return [stage.calls for stage in stages]

    assert run(1) == [1, 1, 1]
    assert run(1) == [0, 0, 0]
    assert run(2) == [1, 1, 0]


def test_an_interrupted_stage_goes_on_in_its_folder_and_is_not_taken_for_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).stage("a", {"x": 1}, Stage(dies=True))
    assert not (tmp_path / "a").exists()
    again = Stage()
    Run(tmp_path).stage("a", {"x": 1}, again)
    assert "half.txt" in again.found
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["half.txt", "manifest.json", "whole.txt"]


def test_an_interrupted_stage_of_another_configuration_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).stage("a", {"x": 1}, Stage(dies=True))
    again = Stage()
    Run(tmp_path).stage("a", {"x": 2}, again)
    assert "half.txt" not in again.found


@pytest.mark.parametrize("call", range(4))
def test_a_kill_while_the_whole_stage_is_put_into_place_costs_no_second_build(tmp_path, monkeypatch, call):
    """The ``call``-th change to the disk after the build does not happen, nor does any later one."""
    Run(tmp_path).stage("a", {"x": 1}, Stage("old"))
    left = [call]

    def dying(change):
        def wrapped(*arguments, **options):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return change(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr("shutil.rmtree", dying(__import__("shutil").rmtree))
        stage = Stage("new")

        def build(folder: Path) -> None:
            patch.setattr(Path, "replace", dying(Path.replace))
            left[0] = call + 1  # the manifest itself is renamed first
            stage(folder)

        left[0] = 9  # before the build all is well
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path).stage("a", {"x": 2}, build)
    again = Stage("new")
    Run(tmp_path).stage("a", {"x": 2}, again)
    assert again.calls == 0
    assert {p.name: p.read_text() for p in (tmp_path / "a").glob("*.txt")} == {
        "half.txt": "new", "whole.txt": "new",
    }  # fmt: skip
    assert not (tmp_path / "a" / "key.json").exists()


@pytest.mark.parametrize("torn", ["", "{", '{"seconds": 1}', "[]"])
def test_a_stage_with_a_torn_manifest_is_made_anew(tmp_path, torn):
    Run(tmp_path).stage("a", {"x": 1}, Stage("old"))
    (tmp_path / "a" / "manifest.json").write_text(torn)
    Run(tmp_path).stage("a", {"x": 1}, Stage("new"))
    assert (tmp_path / "a" / "whole.txt").read_text() == "new"


def test_the_manifest_tells_hashes_shapes_configuration_and_versions(tmp_path):
    def build(folder: Path) -> None:
        save_file({"codes": torch.zeros(3, 2)}, folder / "t.safetensors")

    Run(tmp_path).stage("a", {"x": 1}, build)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["config"] == {"x": 1} and manifest["shapes"] == {"t.safetensors:codes": [3, 2]}
    assert list(manifest["files"]) == ["t.safetensors"] and len(manifest["files"]["t.safetensors"]) == 64
    assert set(manifest["versions"]) == {"cemg", "torch", "transformers"} and manifest["seconds"] >= 0


HOLD = "import sys, time; from pathlib import Path; from cemg.run import Run\nwith Run(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"  # noqa: E501


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_lock_refuses_a_second_process_while_the_first_lives_and_not_after_its_death(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid}") as error, Run(tmp_path).locked():
        pass
    assert error.value.fix == "wait, or use another --run"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Run(tmp_path).locked():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_dead_process_whose_number_lives_on_in_another_holds_no_lock(tmp_path):
    (tmp_path / ".lock").write_text(str(os.getppid()))
    with Run(tmp_path).locked():
        pass
    with Run(tmp_path).locked():  # and leaving it frees it
        pass
