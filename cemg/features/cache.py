"""Features kept on disk by content hash, so nothing is computed twice and an interrupted run goes on.

A cache is a folder with a shelf (a folder) per model, a shelf holds shards. A shard is a safetensors file
of ``keys`` uint8 [n, 32] and ``values`` float32 [n, F], named after the sha256 of its bytes: a torn or
altered file no longer matches its own name.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from cemg.errors import DamagedError, UserError
from cemg.storage import files
from cemg.storage.read import file_digest, read_tensors

KEY_BYTES = 32
SHARD = {"keys": (torch.uint8, ("n", KEY_BYTES)), "values": (torch.float32, ("n", "F"))}


class FeatureCache:
    """A folder of computed features; ``hits`` and ``misses`` count the lookups made through this object.

    ``shard_rows`` new rows are gathered before a shard is written (fewer at the end of a run). The folder is
    made when the first shelf is opened, so a run in a read-only folder can be read.
    """

    def __init__(self, folder: str | Path, *, shard_rows: int = 256) -> None:
        if shard_rows < 1:
            raise UserError(f"shard_rows must be at least 1, got {shard_rows}")
        self.folder, self.shard_rows = Path(folder), shard_rows
        self.hits = self.misses = 0
        if self.folder.exists() and not self.folder.is_dir():
            raise self._unusable("it is a file")

    def shelf(self, identity: str) -> Shelf:
        """The part of the cache that belongs to the model whose hash is ``identity``; UserError where its
        folder cannot be made."""
        try:
            return Shelf(self, self.folder / identity[:32])
        except OSError as error:
            raise self._unusable(str(error)) from error

    def _unusable(self, why: str) -> UserError:
        return UserError(
            f"{self.folder}: the feature cache needs a folder here", cause=why, fix="name another folder"
        )


class Shelf:
    """Rows of one model: ``find`` what is there, ``add`` what is new, ``flush`` what is still in memory."""

    def __init__(self, cache: FeatureCache, folder: Path) -> None:
        self.cache, self.folder = cache, folder
        self.rows: dict[bytes, Tensor] = {}  # key -> values [F]
        self.unsaved: dict[bytes, Tensor] = {}
        files.make_folder(folder)
        files.sweep(folder, shared=True)
        for path in sorted(folder.glob("*.safetensors")):
            self.rows |= _read_shard(path)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The stored rows among ``keys``; every key given counts as a hit or a miss."""
        hits = [key for key in keys if key in self.rows]
        self.cache.hits += len(hits)
        self.cache.misses += len(keys) - len(hits)
        return {key: self.rows[key] for key in hits}

    def add(self, rows: Mapping[bytes, Tensor]) -> None:
        """Take new rows, float32 [F] each, and write a shard once ``shard_rows`` of them have gathered."""
        self.rows.update(rows)
        self.unsaved.update(rows)
        if len(self.unsaved) >= self.cache.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if self.unsaved:
            _write_shard(self.folder, self.unsaved)
            self.unsaved = {}


def _write_shard(folder: Path, rows: Mapping[bytes, Tensor]) -> None:
    keys = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(-1, KEY_BYTES)  # [n, 32]
    content = save({"keys": keys, "values": torch.stack(list(rows.values())).float()})  # values [n, F]
    name = hashlib.sha256(content).hexdigest()
    files.write_bytes(folder / f"{name}.safetensors", content)


def _read_shard(path: Path) -> dict[bytes, Tensor]:
    """The rows of one shard; a shard that is not what was written is left out with a warning."""
    try:
        if file_digest(path) != path.stem:
            raise DamagedError("its bytes do not match its name")
        shard = read_tensors(
            path, {"keys": (torch.uint8, ("n", KEY_BYTES)), "values": (torch.float32, ("n", "F"))}
        )
    except UserError as error:
        warnings.warn(
            f"{path}: damaged cache shard ignored ({error.message}); its rows are computed again",
            stacklevel=2,
        )
        return {}
    return {bytes(key.tolist()): value for key, value in zip(shard["keys"], shard["values"], strict=True)}
