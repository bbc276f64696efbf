"""Durable writes: a crash, a power cut or a full disk never leaves a partial file.

A file is written under a temporary name in its folder, flushed to the disk and renamed; then the folder is
flushed. Names that begin with a dot are unfinished or internal, and are never read as results.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from cemg.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = re.compile(r"\..+\.\d+\.part|\.tmp\w{6}")  # see `durable`, and the names that safetensors uses
HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:64]
CONTINUE = "then run the same command again; it continues where it stopped"
ABANDONED = 3600.0  # seconds after which a temporary file is not in use any more
MODE = 0o666  # reduced by the umask, as for any new file

_open, _fsync, _replace, _mkdir = os.open, os.fsync, os.replace, os.mkdir  # tests make each of them fail


class StorageError(UserError):
    """The disk is full, read-only or not writable for this user. The settings are not the cause."""


@contextmanager
def durable(path: Path | str) -> Iterator[Path]:
    """Write a file completely or not at all: ``with durable(path) as part: write(part)``.

    Yields an empty temporary file next to ``path``, which replaces it at the end of the block. A missing
    folder is created. After a failure, the temporary file is removed, and ``path`` is unchanged.

    Raises:
        StorageError: The disk is full, read-only or not writable for this user.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.@{HOST}.{os.getpid()}.part")
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
    """Write ``content``, completely or not at all."""
    with durable(path) as part, part.open("wb") as file:
        file.write(content)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, completely or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: object, *, indent: int | None = 1) -> None:
    """Write a JSON value and a newline, completely or not at all. Raises TypeError for other values."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path | str, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, completely or not at all. Tensors may be on a GPU or not contiguous."""
    from safetensors.torch import save_file

    with durable(path) as part:
        dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(dense, part, metadata=dict(metadata) if metadata is not None else None)


def scratch_tensor(shape: tuple[int, ...], folder: Path | str | None) -> Tensor:
    """Return zeros, float32, in a file without a name in ``folder``; None keeps them in memory.

    The file is read and written by memory map. The system removes it when the tensor is not used any more,
    also if the process is killed.

    Raises:
        StorageError: The disk is full, read-only or not writable for this user.
    """
    import numpy as np
    import torch

    size = math.prod(shape)
    if folder is None or not size:
        return torch.zeros(shape)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)  # a write to a full disk would end the process
            return torch.from_numpy(np.memmap(file, np.float32, mode="r+", shape=shape))
    except OSError as error:
        raise storage_error(error, folder) or error from error


def copy_file(source: Path | str, target: Path | str) -> None:
    """Copy a file, completely or not at all."""
    with durable(target) as part:
        shutil.copyfile(source, part)


def make_folder(folder: Path | str) -> None:
    """Create a folder and its missing parents, and flush each new name to the disk."""
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
    """Flush the names in a folder to the disk. Without this, a power cut may undo a rename."""
    descriptor = _open(folder, os.O_RDONLY)
    try:
        _fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path | str) -> None:
    """Flush every file and folder below ``folder``, then ``folder`` itself."""
    try:
        for directory, _, names in os.walk(folder, topdown=False):
            for name in names:
                _sync_file(Path(directory) / name)
            sync_folder(directory)
    except OSError as error:
        raise storage_error(error, Path(folder)) or error from error


def move(source: Path | str, target: Path | str) -> None:
    """Rename a file or folder within a file system, and flush the folders of both names."""
    source, target = Path(source), Path(target)
    try:
        _replace(source, target)
        for folder in {source.parent, target.parent}:
            sync_folder(folder)
    except OSError as error:
        raise storage_error(error, target) or error from error


def replace_folder(new: Path | str, target: Path | str) -> None:
    """Move the finished folder ``new`` to ``target``, replacing an existing folder.

    If the process is killed in between, ``.NAME.old`` next to ``target`` is the old folder, which
    `recover_folder` moves back.
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
    """Clean up after a killed `replace_folder`: move the old folder back, or remove it."""
    target = Path(target)
    old = _old(target)
    if old.exists() and not target.exists():
        move(old, target)
    shutil.rmtree(old, ignore_errors=True)


def hidden(path: Path | str) -> bool:
    """Return whether a name begins with a dot: it is then not a finished stage, result or run."""
    return Path(path).name.startswith(".")


def sweep(folder: Path | str, *, shared: bool = False) -> None:
    """Remove the temporary files that killed processes left in ``folder``.

    Args:
        folder: The folder.
        shared: Whether other processes may be writing there. Then only files of ended processes and old
            files are removed.
    """
    with suppress(OSError):
        for path in Path(folder).iterdir():
            if TEMPORARY.fullmatch(path.name) and path.is_file() and not (shared and _in_use(path)):
                path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    """Return whether the process in the name of a temporary file may still be writing it."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > ABANDONED:
            return False
    match = re.search(r"(?:\.@([\w-]*))?\.(\d+)\.part$", path.name)
    if match and match[1] not in (None, HOST):  # of another machine that shares the folder
        return True
    try:
        os.kill(int(match[2]), 0) if match else None
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def storage_error(error: BaseException, path: Path | str | None = None) -> StorageError | None:
    """Return the StorageError for a full, read-only or unwritable disk; None for any other error.

    Args:
        error: An OSError, or an error of safetensors or Polars that ends in ``(os error 28)``.
        path: The file that was written; None takes the one of the error.
    """
    code = getattr(error, "errno", None)
    if code is None:
        match = re.search(r"os error (\d+)", str(error))
        code = int(match[1]) if match else None
    file = path if path is not None else getattr(error, "filename", None)
    problem = f"{file} cannot be written" if file else "a file cannot be written"
    folder = Path(file).parent if file else "the folder"
    if code in (errno.ENOSPC, errno.EDQUOT):
        limit = "disk full" if code == errno.ENOSPC else "disk quota exceeded"
        return StorageError(f"{limit}: {problem}", fix=f"free space (df -h {quote(str(folder))}), {CONTINUE}")
    if code == errno.EROFS:
        return StorageError(f"read-only file system: {problem}", fix=f"mount {folder} writable, {CONTINUE}")
    if code in (errno.EACCES, errno.EPERM):
        return StorageError(f"permission denied: {problem}", fix=f"make {folder} writable, {CONTINUE}")
    return None


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync_file(path: Path, mode: int | None = None) -> None:
    """Flush a file to the disk. ``mode`` replaces the 0600 of libraries that create their own files."""
    descriptor = _open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode & 0o777)
        _fsync(descriptor)
    finally:
        os.close(descriptor)
