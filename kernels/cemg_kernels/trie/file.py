"""A trie as a file: safetensors, so no code; mapped into memory, so no copy; hashed and verified, so no lies.

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
    """Write ``arrays`` and the ids [N] int64 by rank, under another name first: ``path`` is whole or absent.

    Whoever has the old file mapped keeps it.
    """
    tensors = {name: getattr(arrays, name).cpu() for name in ARRAYS}
    about = {"format": FORMAT, "levels": str(arrays.levels), "codebook_size": str(arrays.codebook_size),
             "fingerprint": fingerprint_of(arrays, ids)}  # fmt: skip
    if ids is not None:
        tensors["ids"] = ids.cpu()
    _save(path, tensors, about)


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write, flush, rename, flush the folder; a failure removes the temporary file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()  # with the modes of the umask, which safetensors does not obey
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=about)
        partial.chmod(mode & 0o777)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read(path: Path) -> tuple[TrieArrays, Tensor | None, str]:
    """The arrays, the ids and the fingerprint of a file, mapped into memory.

    Raises ValueError where it is missing, holds something else, or differs from what was written.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; write it with Trie.save")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')}, this version reads {FORMAT}")
        ids = tensors.pop("ids", None)
        if set(tensors) != set(ARRAYS):
            raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
        arrays = TrieArrays(**tensors, levels=int(about["levels"]), codebook_size=int(about["codebook_size"]))
        fingerprint = about["fingerprint"]
    except (SafetensorError, KeyError, ValueError, OverflowError, RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"{path} holds no trie: {error}; write it again with Trie.save") from error
    problem = verify(arrays) or ids_problem(ids, arrays.rows.numel())
    if not problem and fingerprint_of(arrays, ids) != fingerprint:
        problem = "its contents do not have the hash it was written with"
    if problem:
        raise ValueError(f"{path} holds no valid trie: {problem}; write it again with Trie.save")
    return arrays, ids, fingerprint


def ids_problem(ids: Tensor | None, num_items: int) -> str:
    """What makes ``ids`` no [N] of distinct item ids from 0 on, in words; empty where they are, or None."""
    if ids is None:
        return ""
    if ids.dtype != torch.int64 or ids.shape != (num_items,):
        return f"item_ids are {ids.dtype} {list(ids.shape)}, not int64 [{num_items}]"
    if int(ids.min()) < 0:
        return f"item_ids hold {int(ids.min())}"
    if native_available():
        place = native().wrong_id(ids.data_ptr(), num_items)
        return "" if place < 0 else f"item_ids hold {int(ids[place])} twice"
    ordered = ids.sort().values
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    return f"item_ids hold {int(again[0])} twice" if again.numel() else ""


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy where a foreign file has put it at an odd address."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
