"""What every encoder shares: its result, and the loop that looks up, computes and stores rows.

N items, F feature width, B rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cemg.errors import UserError
from cemg.features.cache import Shelf
from cemg.progress import bar

Batches = Iterator[
    tuple[list[int], Tensor]
]  # rows that were computed, their values [B, F]; rows may be left out


@dataclass(frozen=True, slots=True)
class Features:
    """One vector per item and whether the item has that modality at all.

    ``values`` is float32 [N, F], zero where absent; ``present`` is bool [N]; ``reasons`` says, for rows
    whose source could not be read, why. Raises ``UserError`` on shapes or dtypes that do not fit.
    """

    values: Tensor
    present: Tensor
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != torch.float32:
            found = f"{self.values.dtype} {list(self.values.shape)}"
            raise UserError(f"features must be float32 [N, F], got {found}", fix="values.float()")
        if self.present.dtype != torch.bool or self.present.shape != self.values.shape[:1]:
            found = f"{self.present.dtype} {list(self.present.shape)}"
            raise UserError(f"present must be bool [{len(self.values)}], got {found}")

    @property
    def width(self) -> int:
        """F, the length of one vector."""
        return self.values.shape[1]


def hash_model(model: torch.nn.Module, *, description: str, skip: Iterable[str] = ()) -> str:
    """sha256 over ``description`` and each weight's name, dtype, shape and bytes, ``skip`` left out."""
    digest = hashlib.sha256(description.encode())
    skipped = set(skip)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in skipped:
            digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def content_key(identity: str, content: bytes) -> bytes:
    """The 32-byte cache key of one item under the model called ``identity``."""
    return hashlib.sha256(identity.encode() + b"\0" + content).digest()


def encode_rows(
    keys: Sequence[bytes | None],
    compute: Callable[[list[int]], Batches],
    *,
    width: int,
    shelf: Shelf | None,
    label: str,
    progress: bool,
) -> Features:
    """Features of N items whose content keys are ``keys`` (None: the item lacks the modality).

    Rows known to ``shelf`` are taken from it; the others go to ``compute(rows)``, each distinct content
    once, and are stored batch by batch, so that an interrupted run keeps what it has.
    """
    known = shelf.find([key for key in keys if key is not None]) if shelf else {}
    first = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None and key not in known}
    known |= _compute_rows(
        keys, sorted(first.values()), compute, shelf=shelf, label=label if progress else ""
    )
    values = torch.zeros(len(keys), width)  # [N, F]
    present = torch.tensor([key is not None and key in known for key in keys], dtype=torch.bool)  # [N]
    for row, key in enumerate(keys):
        if key is not None and key in known:
            values[row] = known[key]
    return Features(values, present)


def _compute_rows(
    keys: Sequence[bytes | None],
    rows: list[int],
    compute: Callable[[list[int]], Batches],
    *,
    shelf: Shelf | None,
    label: str,
) -> dict[bytes, Tensor]:
    """Run ``compute`` over ``rows`` and file every batch; an interrupt loses nothing computed. No bar is
    shown without a ``label``."""
    made: dict[bytes, Tensor] = {}
    try:
        with bar(label, total=len(rows), shown=bool(label and rows)) as advance:
            for done, values in compute(rows):
                batch = {key: value for row, value in zip(done, values, strict=True) if (key := keys[row])}
                made |= batch
                if shelf:
                    shelf.add(batch)
                advance(len(batch))
    finally:
        if shelf:
            shelf.flush()
    return made
