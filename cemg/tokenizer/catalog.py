"""The catalog: items, their semantic IDs, and the trie of all of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cemg.data.dataset import check_ids
from cemg.errors import UserError
from cemg_kernels import Trie

REMEDY = "restore it from a copy, or delete the folder and build it again: cemg-train --run RUN"


class Catalog:
    """N items, each with ``levels`` codes of its own.

    ``codes`` [N, levels] int64. ``item_ids``: N integers or strings, row order. The trie's leaves give the
    integers; where ids are strings they give catalog rows, and ``ids_of`` turns those into strings.
    """

    def __init__(self, codes: Tensor, codebook_size: int, item_ids: list[int] | list[str]) -> None:
        self.codes = codes
        self.codebook_size = codebook_size
        self.item_ids = item_ids
        self.named = bool(item_ids) and isinstance(item_ids[0], str)
        rows = torch.arange(len(codes)) if self.named else torch.tensor(item_ids, dtype=torch.int64)
        try:
            self.trie = Trie.from_codes(codes, codebook_size, item_ids=rows)
        except ValueError as error:
            raise UserError("these codes make no catalog", cause=str(error)) from error

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        codebook_size: int,
        item_ids: Sequence[int] | Sequence[str] | np.ndarray | Tensor | None = None,
    ) -> Catalog:
        """Codes [N, levels] of any integer dtype, all rows different; ids default to 0 … N−1.

        Raises UserError for duplicate codes or ids, for codes outside 0 … codebook_size − 1, and for
        ids that are not one an item, all integers from 0 on or all strings.
        """
        if codes.ndim != 2 or codes.dtype.is_floating_point:
            raise UserError(f"codes must be integers [items, levels], got {codes.dtype} {list(codes.shape)}")
        ids: list = range(len(codes)) if item_ids is None else item_ids  # type: ignore[assignment]
        ids = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
        if len(ids) != len(codes):
            raise UserError(f"{len(ids)} item ids for {len(codes)} rows of codes")
        if len({isinstance(i, str) for i in ids}) > 1:
            raise UserError("item ids must be all integers or all strings, got both")
        if len(set(ids)) != len(ids):
            raise UserError(f"item id {Counter(ids).most_common(1)[0][0]!r} occurs more than once")
        if ids and isinstance(ids[0], str):
            check_ids(ids, "item", source="catalog")
        return cls(codes.to(torch.int64).contiguous(), codebook_size, ids)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def levels(self) -> int:
        return self.codes.shape[1]

    def ids_of(self, items: Tensor) -> list[list[int | str | None]]:
        """Item ids for what the trie's leaves gave, [B, top]; None where there is no item (−1)."""
        if not self.named:
            return [[i if i >= 0 else None for i in row] for row in items.tolist()]
        return [[self.item_ids[i] if i >= 0 else None for i in row] for row in items.tolist()]

    def rows_of(self, item_ids: Sequence[int | str]) -> list[int]:
        """Rows of item ids; UserError names the first that the catalog lacks."""
        for item in item_ids:
            if item not in self._row_of:
                raise UserError(
                    f"item {item!r} is not in the catalog of {len(self)} items",
                    fix=f"its ids are written like {self.item_ids[0]!r}",
                )
        return [self._row_of[item] for item in item_ids]

    @cached_property
    def _row_of(self) -> dict[int | str, int]:
        return dict(zip(self.item_ids, range(len(self)), strict=True))

    def extended(self, codes: Tensor, item_ids: Sequence[str] | Sequence[int]) -> Catalog:
        """A new catalog with items added at the end; what was there keeps its rows and codes."""
        return Catalog.from_codes(
            torch.cat([self.codes, codes.to(torch.int64)]), self.codebook_size, [*self.item_ids, *item_ids]
        )

    def first(self, count: int) -> Catalog:
        """The catalog of the first ``count`` items."""
        return (
            self
            if count >= len(self)
            else Catalog(self.codes[:count], self.codebook_size, self.item_ids[:count])
        )

    def save(self, folder: Path | str) -> None:
        """``catalog.safetensors`` (codes) and ``catalog.json`` (size, ids), renamed into place when whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": 1, "codebook_size": self.codebook_size, "item_ids": self.item_ids,
            "sha256": self.digest(),
        }  # fmt: skip
        (folder / ".catalog.json").write_text(json.dumps(about))
        save_file({"codes": self.codes}, folder / ".catalog.safetensors")
        for name in ("catalog.safetensors", "catalog.json"):
            (folder / f".{name}").replace(folder / name)

    @classmethod
    def load(cls, folder: Path | str) -> Catalog:
        """Read what ``save`` wrote, and check it again. Raises UserError where it is missing or damaged."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "catalog.json").read_text())
            codes = load_file(folder / "catalog.safetensors")["codes"]
            catalog = cls.from_codes(codes, about["codebook_size"], about["item_ids"])
            written = about.get("sha256", catalog.digest())
        except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            cause = f"{error} is missing in it" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{folder} holds no readable catalog", cause=cause, fix=REMEDY) from error
        if written != catalog.digest():
            cause = "codes and item ids are not those that were saved together"
            raise UserError(f"{folder} holds a damaged catalog", cause=cause, fix=REMEDY)
        return catalog

    def digest(self) -> str:
        """sha256 of the codes and ids."""
        about = json.dumps([list(self.codes.shape), self.codebook_size, self.item_ids])
        return hashlib.sha256(about.encode() + self.codes.numpy().tobytes()).hexdigest()
