"""Writing files so that a crash, a power cut or a full disk never leaves a torn one.

A file is written under a temporary name in its own folder, flushed to the disk, renamed into place, and the
folder is flushed as well. Names that begin with a dot are unfinished or internal: they are never state.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from cemg.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = re.compile(r"\..+\.\d+\.part|\.tmp\w{6}")  # .NAME.PID.part, and what safetensors writes first
CONTINUE = "then run the same command again; it continues where it stopped"
ABANDONED = 3600.0  # seconds after which no process is still writing a file
MODE = 0o666  # less the umask, as for any file that a program creates

_open, _fsync, _replace, _mkdir = os.open, os.fsync, os.replace, os.mkdir  # a test makes each of them fail


class StorageError(UserError):
    """The disk is full, read-only or closed to this user: the settings are right, the place is not."""


@contextmanager
def durable(path: Path | str) -> Iterator[Path]:
    """``with durable(path) as part: write(part)``: ``path`` is the new file, whole, or what it was before.

    Yields a temporary path beside ``path`` that exists and is empty. The folder is created where it is
    missing. A failure removes the temporary file. Raises StorageError for a full, read-only or closed disk.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        make_folder(path.parent)
        os.close(_open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, MODE))
        mode = part.stat().st_mode
        yield part
        _sync_file(part, mode)
        _replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, Exception) and not isinstance(error, UserError):
            storage = storage_error(error, path)
            if storage is not None:
                raise storage from error
        raise


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write ``content``, whole or not at all."""
    with durable(path) as part, part.open("wb") as file:
        file.write(content)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: object, *, indent: int | None = 1) -> None:
    """Write a JSON value and a newline, whole or not at all. Raises TypeError for what JSON cannot hold."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path | str, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; tensors are copied to the CPU and made contiguous."""
    from safetensors.torch import save_file

    with durable(path) as part:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, part, metadata=dict(metadata) if metadata is not None else None)


def copy_file(source: Path | str, target: Path | str) -> None:
    """Copy a file, whole or not at all."""
    with durable(target) as part:
        shutil.copyfile(source, part)


def make_folder(folder: Path | str) -> None:
    """Create a folder and its parents where they are missing, and flush each new name to the disk."""
    folder = Path(folder)
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    try:
        _mkdir(folder)
        sync_folder(folder.parent)
    except FileExistsError:
        if not folder.is_dir():
            raise
    except OSError as error:
        raise storage_error(error, folder) or error from error


def sync_folder(folder: Path | str) -> None:
    """Flush a folder's names to the disk: without it a power cut may undo a rename."""
    number = _open(folder, os.O_RDONLY)
    try:
        _fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush a folder
            raise
    finally:
        os.close(number)


def sync_tree(folder: Path | str) -> None:
    """Flush every file and folder below ``folder``, whoever wrote it, then ``folder`` itself."""
    try:
        for place, _, names in os.walk(folder, topdown=False):
            for name in names:
                _sync_file(Path(place) / name)
            sync_folder(place)
    except OSError as error:
        raise storage_error(error, Path(folder)) or error from error


def move(source: Path | str, target: Path | str) -> None:
    """Rename a file or folder on the same file system and flush the folders of both names."""
    source, target = Path(source), Path(target)
    try:
        _replace(source, target)
        for folder in {source.parent, target.parent}:
            sync_folder(folder)
    except OSError as error:
        raise storage_error(error, target) or error from error


def replace_folder(new: Path | str, target: Path | str) -> None:
    """Put the finished folder ``new`` in the place of ``target``, which may exist.

    Killed in between, ``.NAME.old`` beside it holds the old folder: `recover_folder` puts it back.
    """
    new, target = Path(new), Path(target)
    recover_folder(target)
    sync_tree(new)
    old = _old(target)
    try:
        if target.exists():
            move(target, old)
        move(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path | str) -> None:
    """Undo what a `replace_folder` that was killed left behind: the old folder is put back or removed."""
    target = Path(target)
    old = _old(target)
    if old.exists() and not target.exists():
        move(old, target)
    shutil.rmtree(old, ignore_errors=True)


def hidden(path: Path | str) -> bool:
    """Whether a name begins with a dot: unfinished or internal, never a stage, a result or a run."""
    return Path(path).name.startswith(".")


def sweep(folder: Path | str, *, shared: bool = False) -> None:
    """Remove the temporary files that killed processes left in ``folder``.

    ``shared``: other processes may be writing there, so only files of processes that have ended, or of an
    age that no write takes.
    """
    with suppress(OSError):
        for path in Path(folder).iterdir():
            if TEMPORARY.fullmatch(path.name) and path.is_file() and not (shared and _in_use(path)):
                path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    """Whether the process that a temporary file is named after may still be writing it."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > ABANDONED:
            return False
    found = re.search(r"\.(\d+)\.part$", path.name)
    try:
        os.kill(int(found[1]), 0) if found else None
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def storage_error(error: BaseException, path: Path | str | None = None) -> StorageError | None:
    """The StorageError for a full, read-only or closed disk; None for any other error.

    Knows OSError, and the errors of safetensors and Polars that end in ``(os error 28)``.
    """
    code = getattr(error, "errno", None)
    if code is None:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else None
    place = path if path is not None else getattr(error, "filename", None)
    where = f"{place} cannot be written" if place else "a file cannot be written"
    folder = Path(place).parent if place else "the folder"
    if code in (errno.ENOSPC, errno.EDQUOT):
        what = "disk full" if code == errno.ENOSPC else "disk quota exceeded"
        return StorageError(f"{what}: {where}", fix=f"free space (df -h {quote(str(folder))}), {CONTINUE}")
    if code == errno.EROFS:
        return StorageError(f"read-only file system: {where}", fix=f"mount {folder} writable, {CONTINUE}")
    if code in (errno.EACCES, errno.EPERM):
        return StorageError(f"permission denied: {where}", fix=f"make {folder} writable, {CONTINUE}")
    return None


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync_file(path: Path, mode: int | None = None) -> None:
    """Flush a file's bytes to the disk; ``mode`` undoes the 0600 of writers that make files of their own."""
    number = _open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(number, mode & 0o777)
        _fsync(number)
    finally:
        os.close(number)
