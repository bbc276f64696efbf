"""The folder of a run: stages are reused, resumed or rebuilt, and one command at a time may write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cemg.commands import catalog, evaluate, recommend
from cemg.errors import UserError
from cemg.storage import files
from cemg.storage.run import Run


class Stage:
    """A stage of two steps that counts its calls and can die between them."""

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


def test_a_stage_with_another_configuration_is_rebuilt_in_a_clean_folder(tmp_path):
    Run(tmp_path).stage("a", {"x": 1}, Stage("old"))
    (tmp_path / "a" / "leftover.txt").write_text("old")
    run = Run(tmp_path)
    assert run.stage("a", {"x": 2}, Stage("new")) == run.path("a") != tmp_path / "a"
    assert (tmp_path / "a" / "whole.txt").read_text() == "old"  # until all that replaces it is there
    run.commit("x: 2")
    assert (tmp_path / "a" / "whole.txt").read_text() == "new" and run.path("a") == tmp_path / "a"
    assert not (tmp_path / "a" / "leftover.txt").exists()


def test_a_changed_input_rebuilds_the_stages_after_it_and_nothing_else(tmp_path):
    def run(of_a: int) -> list[int]:
        made, stages = Run(tmp_path), [Stage(), Stage(), Stage()]
        made.stage("a", {"x": of_a}, stages[0])
        made.stage("b", {}, stages[1], inputs=("a",))
        made.stage("c", {}, stages[2])
        made.commit(f"x: {of_a}")
        return [stage.calls for stage in stages]

    assert run(1) == [1, 1, 1]
    assert run(1) == [0, 0, 0]
    assert run(2) == [1, 1, 0]


def test_an_interrupted_stage_continues_in_its_folder_and_does_not_count_as_finished(tmp_path):
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


def test_an_interrupted_stage_does_not_continue_with_an_input_of_other_contents(tmp_path):
    """The key of the input is the same: a training on a GPU may give other weights when it is repeated."""

    def interrupted(content: str) -> Stage:
        run, stage = Run(tmp_path), Stage(dies=True)
        run.stage("a", {}, Stage(content))
        with pytest.raises(KeyboardInterrupt):
            run.stage("b", {}, stage, inputs=("a",))
        return stage

    assert "half.txt" not in interrupted("one").found and "half.txt" in interrupted("one").found
    shutil.rmtree(tmp_path / "a")
    assert "half.txt" not in interrupted("another").found


def dying_at(patch: pytest.MonkeyPatch, call: int) -> list[int]:
    """From the ``call``-th disk operation on, counted from 0, every operation raises KeyboardInterrupt."""
    count = [0]

    def dying(change):
        def wrapped(*arguments, **options):
            count[0] += 1
            if count[0] > call:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return wrapped

    for name in ("_open", "_fsync", "_replace", "_mkdir"):
        patch.setattr(files, name, dying(getattr(files, name)))
    for owner, name in ((Path, "unlink"), (Path, "rmdir"), (Path, "replace"), (shutil, "rmtree")):
        patch.setattr(owner, name, dying(getattr(owner, name)))
    return count


def test_a_kill_at_any_disk_operation_leaves_the_old_run_or_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_fsync", lambda number: None)  # slow, and no test can see what it does

    def train(folder: Path, content: str) -> list[int]:
        run, stages = Run(folder), [Stage(content), Stage(content)]
        with run.locked():
            run.stage("a", {"x": content}, stages[0])
            run.stage("b", {}, stages[1], inputs=("a",))
            run.commit(content)
        return [stage.calls for stage in stages]

    rebuilt = []
    for call in range(999):
        folder = tmp_path / str(call)
        train(folder, "old")
        with pytest.MonkeyPatch.context() as patch:
            count = dying_at(patch, call)
            with suppress(KeyboardInterrupt):
                train(folder, "new")
        run = Run(folder)
        names = {run.path(name).read_text() for name in ("config.yaml", "a/whole.txt", "b/whole.txt")}
        assert names in ({"old"}, {"new"})  # for one that only reads, before anything is settled
        with run.locked():
            assert {(folder / n / "whole.txt").read_text() for n in "ab"} == names
        run.check_whole()
        rebuilt.append(sum(train(folder, "new")))
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "a", "b", "config.yaml"]
        assert {(folder / n / "whole.txt").read_text() for n in "ab"} == {"new"}
        if count[0] <= call:
            break
    assert call > 40 and rebuilt == sorted(rebuilt, reverse=True) and set(rebuilt) == {0, 1, 2}


@pytest.mark.parametrize("torn", ["", "{", '{"seconds": 1}', "[]"])
def test_a_stage_with_a_truncated_manifest_is_rebuilt(tmp_path, torn):
    Run(tmp_path).stage("a", {"x": 1}, Stage("old"))
    (tmp_path / "a" / "manifest.json").write_text(torn)
    run = Run(tmp_path)
    run.stage("a", {"x": 1}, Stage("new"))
    run.commit("x: 1")
    assert (tmp_path / "a" / "whole.txt").read_text() == "new"


def test_the_manifest_records_hashes_shapes_configuration_and_versions(tmp_path):
    def build(folder: Path) -> None:
        save_file({"codes": torch.zeros(3, 2)}, folder / "t.safetensors")

    Run(tmp_path).stage("a", {"x": 1}, build)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["config"] == {"x": 1} and manifest["shapes"] == {"t.safetensors:codes": [3, 2]}
    assert list(manifest["files"]) == ["t.safetensors"] and len(manifest["files"]["t.safetensors"]) == 64
    assert set(manifest["versions"]) == {"cemg", "torch", "transformers"} and manifest["seconds"] >= 0


HOLD = "import sys, time; from pathlib import Path; from cemg.storage.run import Run\nwith Run(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"  # noqa: E501


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_lock_refuses_a_second_process_only_while_the_first_is_alive(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by process {holder.pid}") as error, Run(tmp_path).locked():
        pass
    assert error.value.fix == "wait, or use another --run"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Run(tmp_path).locked():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_dead_process_whose_id_was_reused_does_not_hold_the_lock(tmp_path):
    (tmp_path / ".lock").write_text(str(os.getppid()))
    with Run(tmp_path).locked():
        pass
    with Run(tmp_path).locked():  # and leaving it frees it
        pass


@pytest.mark.parametrize("main", [recommend.main, evaluate.main, catalog.main])
def test_the_error_for_a_mistyped_run_lists_the_existing_runs(tiny_run, tmp_path, command, capsys, main):
    options = {
        recommend.main: ("--history", "item-0001"), evaluate.main: ("--users", 3), catalog.main: (),
    }[main]  # fmt: skip
    extra = ("show", "--item", "item-0001") if main is catalog.main else ()
    for name in ("beauty", "run"):
        shutil.copytree(tiny_run, tmp_path / name)
    assert command(main, *extra, "--run", tmp_path / "baeuty", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: there is no run {tmp_path}/baeuty",
        f"  cause: there are {tmp_path}/beauty, {tmp_path}/run",
        f"  fix:   --run {tmp_path}/beauty",
    ]
    assert not (tmp_path / "baeuty").exists()
    assert command(main, *extra, *lines[2].split()[1:], *options) == 0


def test_a_folder_of_runs_is_refused_with_the_names_of_its_runs(tiny_run, tmp_path, command, capsys):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    assert command(recommend.main, "--run", copy.parent, "--history", "item-0001") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {copy.parent} is not a run: it has no config.yaml"
    assert lines[2] == f"  fix:   --run {copy}"
