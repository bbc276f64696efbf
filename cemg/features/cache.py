"""Features cached on disk by content hash, so that nothing is computed twice, even after an interruption.

A cache is a folder with one shelf (a subfolder) per model. A shelf contains shards: safetensors files of
``keys`` uint8 [n, 32] and ``values`` float32 [n, F], named after the sha256 of their bytes. A truncated or
altered file therefore does not match its name.
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
from cemg.storage.read import Shape, file_digest, read_tensors

KEY_BYTES = 32
SHARD: dict[str, tuple[torch.dtype, Shape]] = {
    "keys": (torch.uint8, ("n", KEY_BYTES)),
    "values": (torch.float32, ("n", "F")),
}


class FeatureCache:
    """A folder of computed features.

    The folder is created when the first shelf is opened, so that a run in a read-only folder can be read.

    Args:
        folder: The folder.
        shard_rows: Number of new rows that are collected before a shard is written.

    Attributes:
        hits: Number of lookups that found a row.
        misses: Number of lookups that did not.

    Raises:
        UserError: The folder is a file.
    """

    def __init__(self, folder: str | Path, *, shard_rows: int = 256) -> None:
        if shard_rows < 1:
            raise UserError(f"shard_rows must be at least 1, got {shard_rows}")
        self.folder, self.shard_rows = Path(folder), shard_rows
        self.hits = self.misses = 0
        if self.folder.exists() and not self.folder.is_dir():
            raise self._unusable("it is a file")

    def shelf(self, identity: str) -> Shelf:
        """Open the rows of one model.

        Args:
            identity: Hash of the model.

        Raises:
            UserError: The folder cannot be created.
        """
        try:
            return Shelf(self, self.folder / identity[:32])
        except OSError as error:
            raise self._unusable(str(error)) from error

    def _unusable(self, reason: str) -> UserError:
        return UserError(
            f"{self.folder} cannot be used as the folder of the feature cache",
            cause=reason,
            fix="name another folder: cemg-train --cache FOLDER",
        )


class Shelf:
    """The cached rows of one model."""

    def __init__(self, cache: FeatureCache, folder: Path) -> None:
        self.cache, self.folder = cache, folder
        self.rows: dict[bytes, Tensor] = {}  # key -> values [F]
        self.unsaved: dict[bytes, Tensor] = {}
        files.make_folder(folder)
        files.sweep(folder, shared=True)
        for path in sorted(folder.glob("*.safetensors")):
            self.rows |= _read_shard(path)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Return the stored rows among ``keys``, float32 [F] each. Every key counts as a hit or a miss."""
        hits = [key for key in keys if key in self.rows]
        self.cache.hits += len(hits)
        self.cache.misses += len(keys) - len(hits)
        return {key: self.rows[key] for key in hits}

    def add(self, rows: Mapping[bytes, Tensor]) -> None:
        """Add new rows, float32 [F] each, and write a shard when ``shard_rows`` of them are collected."""
        self.rows.update(rows)
        self.unsaved.update(rows)
        if len(self.unsaved) >= self.cache.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        if self.unsaved:
            _write_shard(self.folder, self.unsaved)
            self.unsaved = {}


def _write_shard(folder: Path, rows: Mapping[bytes, Tensor]) -> None:
    keys = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(-1, KEY_BYTES)  # [n, 32]
    content = save({"keys": keys, "values": torch.stack(list(rows.values())).float()})  # values [n, F]
    name = hashlib.sha256(content).hexdigest()
    files.write_bytes(folder / f"{name}.safetensors", content)


def _read_shard(path: Path) -> dict[bytes, Tensor]:
    """Read the rows of one shard. A damaged shard is ignored with a warning."""
    try:
        if file_digest(path) != path.stem:
            raise DamagedError("its bytes do not match its name")
        shard = read_tensors(path, SHARD)
    except UserError as error:
        warnings.warn(
            f"{path}: a damaged shard of the cache is ignored ({error.message}); its rows are computed again",
            stacklevel=2,
        )
        return {}
    return {bytes(key.tolist()): value for key, value in zip(shard["keys"], shard["values"], strict=True)}
