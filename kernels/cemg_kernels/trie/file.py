"""Reads and writes a trie as a safetensors file, which is memory-mapped and verified against a hash.

N items.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runtime.dispatch import native, native_available
from .arrays import TrieArrays, fingerprint_of, verify

FORMAT = "cemg-trie-3"
ARRAYS = ("code", "first_child", "rows")


def write(path: Path, arrays: TrieArrays, ids: Tensor | None) -> None:
    """Writes ``arrays`` and the ids (int64 [N] in rank order) atomically.

    Processes that have the old file mapped keep the old contents.
    """
    tensors = {name: getattr(arrays, name).cpu() for name in ARRAYS}
    metadata = {"format": FORMAT, "levels": str(arrays.levels), "codebook_size": str(arrays.codebook_size),
             "fingerprint": fingerprint_of(arrays, ids)}  # fmt: skip
    if ids is not None:
        tensors["ids"] = ids.cpu()
    _save(path, tensors, metadata)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a temporary file, flushes it, renames it and flushes the folder; removes it after a failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()  # applies the umask, which safetensors ignores
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode & 0o777)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[TrieArrays, Tensor | None, str]:
    """Maps a file into memory and returns its arrays, ids and fingerprint.

    Raises:
        ValueError: The file is missing, has another format, or was modified after it was written.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; write it with Trie.save")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')}, this version reads {FORMAT}")
        ids = tensors.pop("ids", None)
        if set(tensors) != set(ARRAYS):
            raise ValueError(
                f"it contains {', '.join(sorted(tensors)) or 'nothing'}, not {', '.join(ARRAYS)}"
            )
        levels, codebook_size = int(metadata["levels"]), int(metadata["codebook_size"])
        arrays = TrieArrays(**tensors, levels=levels, codebook_size=codebook_size)
        fingerprint = metadata["fingerprint"]
    except (SafetensorError, KeyError, ValueError, OverflowError, RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a trie file: {error}; write it again with Trie.save") from error
    problem = verify(arrays) or ids_problem(ids, arrays.rows.numel())
    if not problem and fingerprint_of(arrays, ids) != fingerprint:
        problem = "its contents do not match its hash"
    if problem:
        raise ValueError(f"{path} is not a valid trie: {problem}; write it again with Trie.save")
    return arrays, ids, fingerprint


def ids_problem(ids: Tensor | None, num_items: int) -> str:
    """Returns why ``ids`` are not [N] distinct integers of 0 or larger, or "" if they are or are None."""
    if ids is None:
        return ""
    if ids.dtype != torch.int64 or ids.shape != (num_items,):
        return f"item_ids are {ids.dtype} {list(ids.shape)}, not int64 [{num_items}]"
    if int(ids.min()) < 0:
        return f"item_ids contain {int(ids.min())}"
    if native_available():
        row = native().first_invalid_id(ids.data_ptr(), num_items)
        return "" if row < 0 else f"item_ids contain {int(ids[row])} twice"
    ordered = ids.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return f"item_ids contain {int(repeated[0])} twice" if repeated.numel() else ""


def _aligned(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if another program's file stores it at an unaligned address."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
