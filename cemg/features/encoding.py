"""The result of an encoder, and the loop that looks up, computes and stores its rows.

N items, F feature width, B rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cemg.errors import UserError
from cemg.features.cache import Shelf
from cemg.progress import bar
from cemg.storage.files import scratch_tensor

BLOCK = 1 << 16  # rows that are compared at once
Batches = Iterator[tuple[list[int], Tensor]]  # computed rows and their values [B, F]; rows may be missing


@dataclass(frozen=True, slots=True)
class Features:
    """The features of one modality.

    Attributes:
        values: One vector per item, float32 [N, F]; zero for items without this modality.
        present: Whether an item has this modality, bool [N].
        reasons: Item row -> why its source could not be read.

    Raises:
        UserError: A shape or dtype is wrong.
    """

    values: Tensor
    present: Tensor
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != torch.float32:
            actual = f"{self.values.dtype} {list(self.values.shape)}"
            raise UserError(f"features must be float32 [N, F], got {actual}", fix="pass values.float()")
        if self.present.dtype != torch.bool or self.present.shape != self.values.shape[:1]:
            actual = f"{self.present.dtype} {list(self.present.shape)}"
            raise UserError(f"present must be bool [{len(self.values)}], got {actual}")

    @property
    def width(self) -> int:
        """F, the width of one vector."""
        return self.values.shape[1]

    def differ(self) -> bool:
        """Return whether two items that have this modality have different vectors."""
        first = self.values[self.present.nonzero()[:1, 0]]
        return any(
            bool((rows[here] != first).any())
            for rows, here in zip(self.values.split(BLOCK), self.present.split(BLOCK), strict=True)
        )


def hash_model(model: torch.nn.Module, *, description: str, skip: Iterable[str] = ()) -> str:
    """Compute the sha256 of ``description`` and of the names, dtypes, shapes and bytes of all weights.

    Args:
        model: The model.
        description: Everything else that determines its outputs.
        skip: Names of weights to leave out.
    """
    digest = hashlib.sha256(description.encode())
    skipped = set(skip)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in skipped:
            digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def content_key(identity: str, content: bytes) -> bytes:
    """Return the 32-byte cache key of one item for the model with the hash ``identity``."""
    return hashlib.sha256(identity.encode() + b"\0" + content).digest()


def encode_rows(
    keys: Sequence[bytes | None],
    compute: Callable[[list[int]], Batches],
    *,
    width: int,
    shelf: Shelf | None,
    label: str,
    progress: bool,
    scratch: Path | None = None,
) -> Features:
    """Encode N items. Rows in the cache are not computed again.

    Args:
        keys: Content key of each item; None for an item without this modality.
        compute: Computes the features of some rows, in batches. Each distinct content is passed once.
        width: F, the width of one vector.
        shelf: The cache, which every batch is written to, so that an interrupted run loses nothing.
        label: Label of the progress bar.
        progress: Whether a progress bar is shown.
        scratch: A folder for the features, see `scratch_tensor`. None keeps them in memory.

    Returns:
        The features, [N, F].
    """
    known = shelf.find([key for key in keys if key is not None]) if shelf else {}
    missing = [row for row in first_rows(keys) if keys[row] not in known]
    known |= _compute_rows(keys, missing, compute, shelf=shelf, label=label if progress else "")
    values = scratch_tensor((len(keys), width), scratch)  # [N, F]
    present = torch.tensor([key is not None and key in known for key in keys], dtype=torch.bool)  # [N]
    for row, key in enumerate(keys):
        if key is not None and key in known:
            values[row] = known[key]
    return Features(values, present)


def first_rows(keys: Sequence[bytes | None]) -> list[int]:
    """Return the first row of each key, in order, without None."""
    first = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    return sorted(first.values())


def _compute_rows(
    keys: Sequence[bytes | None],
    rows: list[int],
    compute: Callable[[list[int]], Batches],
    *,
    shelf: Shelf | None,
    label: str,
) -> dict[bytes, Tensor]:
    """Compute ``rows`` and store every batch, also when interrupted. Without a ``label``, show no bar."""
    computed: dict[bytes, Tensor] = {}
    try:
        with bar(label, total=len(rows), shown=bool(label and rows)) as advance:
            for batch_rows, values in compute(rows):
                pairs = zip(batch_rows, values, strict=True)
                batch = {key: value for row, value in pairs if (key := keys[row])}
                computed |= batch
                if shelf:
                    shelf.add(batch)
                advance(len(batch))
    finally:
        if shelf:
            shelf.flush()
    return computed
