"""Checked reads of files that a command wrote: the expected types, or an error.

Each reader raises DamagedError with the path if the content was changed, and UserError if the system refuses
to read the file. File contents raise no other error.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cemg.errors import DamagedError, UserError
from cemg.forks import check_polars

if TYPE_CHECKING:
    import polars as pl
    import torch
    from torch import Tensor

T = TypeVar("T")
Shape = tuple[int | str, ...]  # a name stands for any size, the same everywhere it occurs
STRICT = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False
)  # config of a dataclass that is read from a file
RESTORE = "restore it from a copy, or build it again: cemg-train --run RUN --rebuild"

FINITE_BLOCK = 1 << 24  # values that are checked at once


def check_file(path: Path, *, fix: str = RESTORE) -> os.stat_result:
    """The status of a regular file. Raises DamagedError for a folder, a FIFO, a dangling link or no file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        cause = "it is a dangling link" if path.is_symlink() else None
        raise DamagedError(f"{path} is missing", cause=cause, fix=fix) from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise DamagedError(f"{path} is {kind} instead of a file", fix=fix)
    return status


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file that the system refuses to read; its content may be valid."""
    return UserError(f"{path} cannot be read: {error.strerror or error}", fix="check its permissions")


def read_bytes(path: Path, *, fix: str = RESTORE) -> bytes:
    """The content of a regular file."""
    check_file(path, fix=fix)
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def read_text(path: Path, *, fix: str = RESTORE) -> str:
    """The content of a UTF-8 file."""
    try:
        return read_bytes(path, fix=fix).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not UTF-8 text", cause=str(error), fix=fix) from error


def read_json(path: Path, shape: type[T], *, fix: str = RESTORE) -> T:
    """Read a JSON file as ``shape``: a builtin, a generic of builtins, or a dataclass."""
    return parse_json(read_bytes(path, fix=fix), shape, name=str(path), fix=fix)


def parse_json(content: str | bytes, shape: type[T], *, name: str, fix: str = RESTORE) -> T:
    """Parse JSON text as ``shape``. ``name``: source of the text, for errors."""
    try:
        value: T = _adapter(cast(Hashable, shape)).validate_json(content, strict=True)
        return value
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "json_invalid":
            raise DamagedError(f"{name} is not valid JSON", cause=first["msg"], fix=fix) from error
        cause = f"{place}: {first['msg']}" if place else first["msg"]
        raise DamagedError(f"{name} does not have the expected content", cause=cause, fix=fix) from error
    except (UserError, RecursionError, ValueError, OverflowError) as error:
        raise DamagedError(
            f"{name} does not have the expected content", cause=_first_line(error), fix=fix
        ) from error


@lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def read_tensors(
    path: Path, spec: Mapping[str, tuple[torch.dtype, Shape]] | None = None, *, fix: str = RESTORE
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file to the CPU. Floating-point values must be finite.

    Args:
        path: The file.
        spec: Dtype and shape of each tensor; other tensors are then an error.
        fix: What the error suggests.

    Example: ``read_tensors(path, {"codes": (torch.int64, ("N", "M"))})``
    """
    tensors, _ = read_tensor_file(path, fix=fix)
    if spec is not None:
        check_tensors(path, tensors, spec, fix=fix)
    return tensors


def read_tensor_file(
    path: Path, *, finite: bool = True, fix: str = RESTORE
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as in `read_tensors`, and the metadata in the header of the file."""
    from safetensors import SafetensorError, safe_open

    check_file(path, fix=fix)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        cause = _first_line(error)
        raise DamagedError(f"{path} is not a valid safetensors file", cause=cause, fix=fix) from error
    for name, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not _is_finite(tensor):
            raise DamagedError(f"{path}: {name} has values that are not finite", fix=fix)
    return tensors, metadata


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], spec: Mapping[str, tuple[torch.dtype, Shape]],
    *, fix: str = RESTORE,
) -> None:  # fmt: skip
    """Raise DamagedError if names, dtypes or shapes differ from ``spec``."""
    if different := sorted(tensors.keys() ^ spec.keys()):
        cause = f"{different[0]!r} is {'missing' if different[0] in spec else 'not expected'}"
        raise DamagedError(f"{path} does not have the expected tensors", cause=cause, fix=fix)
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in spec.items():
        tensor = tensors[name]
        expected = [sizes.get(s, s) if isinstance(s, str) else s for s in shape]
        fits = tensor.ndim == len(shape) and all(
            isinstance(w, str) or w == have for w, have in zip(expected, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            expected_shape = ", ".join(map(str, expected))
            cause = f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} [{expected_shape}]"
            raise DamagedError(f"{path} does not have the expected tensors", cause=cause, fix=fix)
        sizes |= {s: have for s, have in zip(shape, tensor.shape, strict=True) if isinstance(s, str)}


def tensors_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """sha256 of the names, dtypes, shapes and bytes of CPU tensors, and of the text ``about``."""
    import torch

    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_parquet(path: Path, schema: Mapping[str, Any], *, fix: str = RESTORE) -> pl.DataFrame:
    """Read a Parquet file with exactly the columns of ``schema`` (name to Polars dtype).

    Raises UserError in a process that was forked after Polars had started its threads.
    """
    check_polars(f"reading {path}")
    import polars as pl

    check_file(path, fix=fix)
    with _polars_errors(path, fix=fix):
        table = pl.read_parquet(path, glob=False)
        if dict(table.schema) != dict(schema):
            columns = ", ".join(f"{name} {dtype}" for name, dtype in table.schema.items())
            expected = ", ".join(f"{name} {dtype}" for name, dtype in schema.items())
            cause = f"its columns are {columns[:300]}, not {expected}"
            raise DamagedError(f"{path} does not have the expected table", cause=cause, fix=fix)
    return table


@contextmanager
def _polars_errors(path: Path, *, fix: str) -> Iterator[None]:
    """Turn the errors of Polars into DamagedError. Its panics do not derive from Exception."""
    import polars as pl

    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (Exception, pl.exceptions.PanicException) as error:
        cause = _first_line(error)
        raise DamagedError(f"{path} is not a valid Parquet file", cause=cause, fix=fix) from error


_hashes: dict[tuple[str, int, int, int], str] = {}  # by path, size, time and inode


def file_digest(path: Path, *, fix: str = RESTORE) -> str:
    """sha256 of a file, computed once per process while its size, time and inode do not change."""
    status = check_file(path, fix=fix)
    stamp = (str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ino)
    if stamp not in _hashes:
        try:
            with path.open("rb") as file:
                _hashes[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path, error) from error
    return _hashes[stamp]


def digest(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` with its own digest as ``sha256``, which `check_signature` compares."""
    unsigned = {name: value for name, value in record.items() if name != "sha256"}
    return unsigned | {"sha256": digest(json.loads(json.dumps(unsigned, default=str)))}


def check_signature(record: Mapping[str, Any], *, name: str, fix: str = RESTORE) -> None:
    """Raise DamagedError if a record differs from what `signed` wrote."""
    if signed(record)["sha256"] != record.get("sha256"):
        cause = "its sha256 does not match its content"
        raise DamagedError(f"{name} is damaged", cause=cause, fix=fix)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a copy of the whole tensor."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(FINITE_BLOCK))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its address in the file is not aligned."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
