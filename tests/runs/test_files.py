"""Files are written completely or not at all, whatever fails, with the mode of the umask."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from cemg.commands import train
from cemg.storage import files
from cemg.storage.files import StorageError
from cemg_kernels import Trie

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, {"new": 1}),
    "tensors": lambda path: files.save_tensors({"new": torch.ones(2, 3).T}, path),
    "copy": lambda path: files.copy_file(__file__, path),
    "trie": lambda path: Trie.from_codes(torch.tensor([[0, 1]]), 2).save(path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_written_file_has_the_mode_of_the_umask_and_no_temporary_file_remains(tmp_path, kind):
    before = os.umask(0o027)
    try:
        WRITERS[kind](tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["text", "json", "tensors", "copy"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_at_any_step_keeps_the_old_file_and_leaves_no_temporary_file(
    tmp_path, fail_disk, kind, there
):
    path = tmp_path / "folder" / "file"
    if there:
        files.write_text(path, "old")
    for call in range(99):
        with pytest.MonkeyPatch.context() as patch:
            count = fail_disk(patch, call)
            try:
                WRITERS[kind](path)
            except StorageError as error:
                assert error.message.startswith("disk full: ") and "\n" not in error.message
                assert "the same command again" in (error.fix or "")
            else:
                break
        left = [p.name for p in path.parent.glob("*")] if path.parent.exists() else []
        renamed = path.is_file() and path.read_bytes() != b"old"  # the flush of the folder was what failed
        assert left == (["file"] if there or renamed else [])
    assert call >= 5 and count[0] == call


def test_a_full_disk_is_recognised_in_the_errors_of_safetensors_and_polars(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(StorageError, match="disk full"), files.durable(tmp_path / "a") as part:
        part.unlink()
        part.symlink_to("/dev/full")
        pl.DataFrame({"a": list(range(100_000))}).write_parquet(part)
    with pytest.raises(StorageError, match="disk full"), files.durable(tmp_path / "b") as part:
        part.unlink()
        part.symlink_to("/dev/full")
        matplotlib.figure.Figure().savefig(part, format="png")
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert files.storage_error(error, "c") is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "code, said",
    [
        (errno.EDQUOT, "disk quota exceeded"), (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
    ],
)  # fmt: skip
def test_a_disk_that_refuses_writes_is_reported_in_one_line(tmp_path, monkeypatch, fail_disk, code, said):
    fail_disk(monkeypatch, 0, code)
    with pytest.raises(StorageError, match=f"^{said}: {tmp_path}/a cannot be written"):
        files.write_text(tmp_path / "a", "")


def test_other_errors_are_raised_and_leave_no_temporary_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.durable(tmp_path / "a"):
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a", {"a": object()})
    with pytest.raises(OSError, match="Is a directory"):
        files.write_text(tmp_path, "")
    assert list(tmp_path.iterdir()) == []


def folder(path: Path, content: str) -> Path:
    files.write_text(path / "file", content)
    return path


def test_after_a_failure_at_any_step_a_replaced_folder_is_the_old_or_the_new_one(tmp_path, fail_disk):
    target = folder(tmp_path / "target", "old")
    for call in range(99):
        new = folder(tmp_path / ".new", "new")
        with pytest.MonkeyPatch.context() as patch:
            fail_disk(patch, call)
            try:
                files.replace_folder(new, target)
            except StorageError:
                assert (target / "file").read_text() in ("old", "new")
            else:
                break
        folder(target, "old")
    assert call >= 5
    assert (target / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_kill_between_the_two_renames_of_a_folder_is_undone(tmp_path):
    folder(tmp_path / ".target.old", "old")
    files.recover_folder(tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "old"
    folder(tmp_path / ".target.old", "older")
    files.recover_folder(tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    own, dead = f".a.json.{os.getpid()}.part", f".a.json.{child}.part"
    for name in (own, dead, ".tmpAb12Cd", "a.json", ".config.next.yaml"):
        (tmp_path / name).write_text("")
    files.sweep(tmp_path, shared=True)
    assert not (tmp_path / dead).exists() and len(list(tmp_path.iterdir())) == 4
    os.utime(tmp_path / ".tmpAb12Cd", (1, 1))
    files.sweep(tmp_path, shared=True)
    assert not (tmp_path / ".tmpAb12Cd").exists() and (tmp_path / own).exists()
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".config.next.yaml", "a.json"]
    files.sweep(tmp_path / "absent")


def test_a_temporary_file_of_another_machine_is_removed_when_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HOST", "elsewhere")
    with files.durable(tmp_path / "a.json") as part:
        name = part.name
    monkeypatch.setattr(files, "HOST", "here")
    dead = name.replace(f".{os.getpid()}.", ".99999999.")  # a number that no process has
    for one in (dead, dead.replace("elsewhere", "here")):
        (tmp_path / one).write_text("")
    files.sweep(tmp_path, shared=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [dead, "a.json"]
    os.utime(tmp_path / dead, (1, 1))
    files.sweep(tmp_path, shared=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_of_any_stride_are_saved(tmp_path):
    files.save_tensors({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "a")
    assert load_file(tmp_path / "a")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.slow  # some forty attempts
@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_a_training_whose_disk_fills_repeatedly_gives_the_results_of_one_without_errors(
    tiny_run, tiny_settings, feature_cache, command, fail_disk, tmp_path, capsys
):
    run, settings = tmp_path / "run", [part for one in tiny_settings for part in ("--set", one)]
    code, attempts = 2, 0
    while code != 0 and attempts < 400:
        with pytest.MonkeyPatch.context() as patch:
            fail_disk(patch, 5 + 7 * attempts)
            code = command(train.main, "--run", run, "--cache", feature_cache, *settings)
        attempts += 1
        said = capsys.readouterr().err.splitlines()
        if code != 0:
            lines = [line for line in said if line.startswith("error: ")]
            assert len(lines) == 1 and lines[0].startswith("error: disk full: "), said[-20:]
    assert code == 0 and attempts > 10
    for name in ("catalog/catalog.safetensors", "generator/weights.safetensors"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes(), name
    assert not [path for path in run.rglob("*") if files.TEMPORARY.fullmatch(path.name)]
