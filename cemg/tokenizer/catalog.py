"""The catalog: items, their semantic IDs, and the trie of all of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from cemg.data.dataset import check_ids
from cemg.errors import DamagedError, UserError
from cemg.storage import files
from cemg.storage.read import STRICT, Shape, check_tensors, read_json, read_tensors
from cemg.tokenizer.catalog_files import read_codes, write_codes
from cemg.tokenizer.shared import SharedFilter, SharedIds
from cemg.tokenizer.tokens import CodeTokens, TokenMap
from cemg_kernels import ItemFilter, RequestFilter, Trie
from cemg_kernels.trie.arrays import MAX_CODEBOOK_SIZE

REMEDY = "restore it from a copy, or delete the folder and build it again: cemg-train --run RUN"
CODES: dict[str, tuple[torch.dtype, Shape]] = {"codes": (torch.int64, ("items", "levels"))}
OPTIONAL: dict[str, tuple[torch.dtype, Shape]] = {
    "tokens": (torch.int64, ("levels", "size")),
    "counts": (torch.int64, ("items",)),
}  # which only some catalogs have


@dataclass(frozen=True, slots=True)
class _About:
    """``catalog.json``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal[1]
    codebook_size: int
    item_ids: list[int] | list[str]
    sha256: str | None = None  # of all that is saved
    codebook_sizes: list[int] | None = None
    shared: bool = False
    code_token_start: int | None = None


class Catalog:
    """N items and their semantic IDs of ``levels`` codes each.

    Build one with `from_codes`, `read` (files of other projects) or `load` (what `save` wrote).

    Attributes:
        codes: [N, levels] int64, one row per item.
        item_ids: N integers or strings, in row order.
        codebook_sizes: Number of codes of each level.
        codebook_size: K, the largest of them; the trie's codebook size.
        tokens: The language model's token of each code; None if unknown.
        counts: [N] int64, training interactions per item; None if unknown.
        shared: Which items have each semantic ID; None if every item has its own.
        trie: The trie of all semantic IDs. A leaf returns the item id if ids are integers, the catalog row
            if ids are strings (`ids_of` converts it), and the number of the semantic ID if IDs are shared.
    """

    FILES: ClassVar[tuple[str, ...]] = ("catalog.json", "catalog.safetensors")

    def __init__(
        self, codes: Tensor, codebook_size: int | Sequence[int], item_ids: list[int] | list[str], *,
        tokens: CodeTokens | None = None, shared: bool = False, counts: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.codes = codes
        self.codebook_sizes = level_sizes(codebook_size, codes.shape[1])
        self.codebook_size = max(self.codebook_sizes)
        self.item_ids, self.tokens, self.counts = item_ids, tokens, counts
        self.named = bool(item_ids) and isinstance(item_ids[0], str)
        self.shared = SharedIds.of(codes, counts) if shared else None
        rows = torch.arange(len(codes)) if self.named else torch.tensor(item_ids, dtype=torch.int64)
        self._check_sizes()
        try:
            if self.shared is None:
                self.trie = Trie.from_codes(codes, self.codebook_size, item_ids=rows)
            else:
                self.trie = Trie.from_codes(self.shared.codes, self.codebook_size)
        except ValueError as error:
            if "share theirs" in str(error):
                raise self._duplicate_ids_error() from error
            raise UserError("no catalog can be built from these codes", cause=str(error)) from error
        if tokens is not None:
            tokens.check_codes(codes)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor | np.ndarray | Sequence[Sequence[int]],
        codebook_size: int | Sequence[int],
        item_ids: Sequence[int] | Sequence[str] | np.ndarray | Tensor | None = None,
        *,
        tokens: TokenMap | CodeTokens | None = None,
        shared: bool = False,
        counts: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> Catalog:
        """Build a catalog from codes.

        Args:
            codes: [N, levels], any integer dtype.
            codebook_size: Codes per level: one number for all levels, or one per level.
            item_ids: N unique ids, all integers from 0 on or all strings; 0 … N−1 by default.
            tokens: The token of each code: the first token of all (codes follow level by level), a table
                [levels, K] with −1 where a level has no such code, or one list per level.
            shared: Whether several items may have the same semantic ID. A search then returns all of them
                with the same score, those with the largest ``counts`` first, ties in row order.
            counts: [N] training interactions per item.

        Raises:
            UserError: A code is outside its level's size, ids are not unique or of mixed types, a code in
                use has no token, or two items have the same codes and ``shared`` is False.

        Example:
            >>> Catalog.from_codes([[0, 1], [0, 2], [3, 1]], codebook_size=4, item_ids=["a", "b", "c"])
            Catalog(3 items, 2 levels, codebook_size=4)
        """
        codes = torch.as_tensor(codes)
        integers = not (codes.dtype.is_floating_point or codes.dtype.is_complex)
        if codes.ndim != 2 or codes.shape[1] == 0 or not integers:
            raise UserError(f"codes must be integers [items, levels], got {codes.dtype} {list(codes.shape)}")
        ids: list[Any] = list(range(len(codes))) if item_ids is None else as_list(item_ids)
        if len(ids) != len(codes):
            raise UserError(f"{len(ids)} item ids for {len(codes)} rows of codes")
        _check_item_ids(ids)
        if shared and not ids_are_valid(ids):
            raise UserError("item ids must be strings, or integers from 0 on")
        interactions = None if counts is None else _as_counts(counts)
        if interactions is not None and interactions.shape != (len(codes),):
            raise UserError(f"counts must be [{len(codes)}], one per item, got {list(interactions.shape)}")
        sizes = level_sizes(codebook_size, codes.shape[1])
        token_map = None if tokens is None else CodeTokens.of(tokens, sizes)
        return cls(
            codes.to(torch.int64).contiguous(), sizes, ids, tokens=token_map, shared=shared,
            counts=interactions,
        )  # fmt: skip

    @classmethod
    def read(
        cls, path: Path | str, *, tokenizer: Any = None, code_token_start: TokenMap | None = None,
        shared: bool = False, codebook_size: int | Sequence[int] | None = None,
        interactions: Path | str | None = None, item: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> Catalog:  # fmt: skip
        """Read the semantic IDs that another project wrote.

        Formats: ``X.index.json`` (LETTER, LC-Rec, MiniOneRec) maps each item id to one token per level, like
        ``<a_197>``; ``.csv`` and ``.parquet`` have one column of ids and one per level; ``.pt`` (GRID) is one
        tensor of codes [levels, items].

        Args:
            path: The file.
            tokenizer: For an index.json: the tokenizer of the checkpoint, or its folder, which has the ids
                of the tokens.
            code_token_start: For an index.json without ``tokenizer``: the id of the first code token, if the
                names in use were added in sorted order. For other formats: ``tokens`` of `from_codes`.
            shared: Whether several items may have the same semantic ID.
            codebook_size: Codes per level; by default one more than the largest code of each level.
            interactions: An ``X.inter.json``; items that share a semantic ID are ordered by how often its
                training part contains them.
            item: Column of item ids in a table; "item" or "item_id" by default.
            columns: Columns of codes in a table; by default code_0, code_1, …, or all other columns.

        Raises:
            UserError: The file is malformed. The message names the file and the item or row.
        """
        file = read_codes(
            Path(path), tokenizer=tokenizer, code_token_start=code_token_start, codebook_size=codebook_size,
            interactions=interactions, item=item, columns=columns,
        )  # fmt: skip
        try:
            return cls.from_codes(
                file.codes, file.codebook_sizes, file.item_ids, tokens=file.tokens, shared=shared,
                counts=file.counts,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"{path}: {error.message}", cause=error.cause, fix=error.fix) from error

    def write_codes(self, path: Path | str) -> None:
        """Write the codes as ``.csv`` or ``.parquet`` (item, code_0, code_1, …) or as ``X.index.json``.

        ``Catalog.read`` reads each of them. Raises UserError for another name.
        """
        write_codes(Path(path), self.item_ids, self.codes)

    def __repr__(self) -> str:
        return f"Catalog({len(self):,} items, {self.levels} levels, codebook_size={self.codebook_size})"

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def levels(self) -> int:
        return self.codes.shape[1]

    @property
    def num_ids(self) -> int:
        """Number of different semantic IDs: the leaves of the trie."""
        return self.trie.num_items

    def _duplicate_ids_error(self) -> UserError:
        """The error for items with the same semantic ID; it names two of them."""
        ids = SharedIds.of(self.codes, None)
        first = int((ids.begins.diff() > 1).int().argmax())
        one, other = (self.item_ids[row] for row in ids.members[ids.begins[first] :][:2].tolist())
        return UserError(
            "no catalog can be built from these codes",
            cause=f"{len(self)} items have {len(ids.codes)} different semantic IDs: items {one!r} and "
            f"{other!r} both have {ids.codes[first].tolist()}",
            fix="pass shared=True to keep several items on one semantic ID",
        )

    def _check_sizes(self) -> None:
        too_large = (self.codes >= torch.tensor(self.codebook_sizes)).nonzero()
        if len(too_large) and min(self.codebook_sizes) < self.codebook_size:
            row, level = too_large[0].tolist()
            raise UserError(
                "no catalog can be built from these codes",
                cause=f"row {row} has code {int(self.codes[row, level])} on level {level}, which has "
                f"{self.codebook_sizes[level]} codes",
                fix="pass a larger size for that level",
            )

    def code_tokens(self, given: TokenMap | CodeTokens | None = None) -> CodeTokens:
        """The token of each code.

        Args:
            given: A token map as in `from_codes`; None for the catalog's own.

        Raises:
            UserError: There is no map, ``given`` differs from the catalog's own, or a code in use has no
                token.
        """
        if given is None:
            if self.tokens is None:
                raise UserError(
                    "the tokens of the codes are not known",
                    cause="the catalog has no token map, and code_token_start was not passed",
                    fix="pass code_token_start, or read the catalog with its tokenizer: "
                    "Catalog.read(path, tokenizer=…)",
                )
            return self.tokens
        tokens = CodeTokens.of(given, self.codebook_sizes)
        if self.tokens is not None and not torch.equal(tokens.table, self.tokens.table):
            raise UserError(
                "code_token_start differs from the token map of the catalog",
                fix="omit code_token_start",
            )
        tokens.check_codes(self.codes)
        return tokens

    def ids_of(self, items: Tensor) -> list[list[int | str | None]]:
        """Item ids of the values that the trie's leaves return, [B, top]; None for −1 (no item)."""
        if not self.named:
            return [[i if i >= 0 else None for i in row] for row in items.tolist()]
        return [[self.item_ids[i] if i >= 0 else None for i in row] for row in items.tolist()]

    def rows_of(self, item_ids: Sequence[int | str]) -> list[int]:
        """Rows of item ids. Raises UserError with the first id that is not in the catalog."""
        row_of = self.row_of
        try:
            return [row_of[item] for item in item_ids]
        except KeyError as error:
            raise UserError(
                f"item {error.args[0]!r} is not in the catalog of {len(self)} items",
                fix=f"use ids as the catalog has them, such as {self.item_ids[0]!r}",
            ) from None

    def only(self, item_ids: Sequence[int | str]) -> ItemFilter | SharedFilter:
        """A filter that admits only these items. Combine filters with ``~``, ``&`` and ``|``.

        Raises:
            UserError: An item id is unknown.
        """
        allowed = torch.zeros(len(self), dtype=torch.bool)
        allowed[self.rows_of(item_ids)] = True
        if self.shared is not None:
            return SharedFilter(self.shared, allowed)
        return ItemFilter.from_mask(self.trie, allowed)

    def excluding(self, histories: Sequence[Sequence[int | str]]) -> RequestFilter | SharedFilter:
        """A filter of B requests; each admits all items except those of its own history.

        Raises:
            UserError: An item id is unknown.
        """
        rows = [self.rows_of(history) for history in histories]
        if self.shared is None:
            return RequestFilter.excluding(self.trie, rows if self.named else histories)
        allowed = torch.ones(len(rows), len(self), dtype=torch.bool)
        for request, history_rows in enumerate(rows):
            allowed[request, history_rows] = False
        return SharedFilter(self.shared, allowed)

    @cached_property
    def row_of(self) -> dict[int | str, int]:
        """The row of each item id, not to be changed."""
        return dict(zip(self.item_ids, range(len(self)), strict=True))

    def extended(self, codes: Tensor, item_ids: Sequence[str] | Sequence[int]) -> Catalog:
        """A new catalog with items added at the end. Existing rows and codes do not change.

        Args:
            codes: Semantic IDs of the items, integers [n, levels].
            item_ids: Their ids.

        Raises:
            UserError: As in `from_codes`.
        """
        counts, new = self.counts, as_list(item_ids)
        _check_item_ids([*self.item_ids[:1], *new])  # the others are valid
        known = next((item for item in new if item in self.row_of), None)
        if known is not None:
            raise UserError(f"item id {known!r} occurs more than once")
        if len(new) != len(codes):
            raise UserError(f"{len(new)} item ids for {len(codes)} rows of codes")
        if self.shared is not None and not ids_are_valid(new):
            raise UserError("item ids must be strings, or integers from 0 on")
        if counts is not None:
            counts = torch.cat([counts, counts.new_zeros(len(codes))])
        catalog = Catalog(
            torch.cat([self.codes, codes.to(torch.int64)]), self.codebook_sizes, [*self.item_ids, *new],
            tokens=self.tokens, shared=self.shared is not None, counts=counts,
        )  # fmt: skip
        rows = zip(new, range(len(self), len(catalog)), strict=True)
        catalog.__dict__["row_of"] = self.row_of | dict(rows)
        return catalog

    def with_tokens(self, tokens: TokenMap | CodeTokens) -> Catalog:
        """The same catalog with a token map. Raises UserError if it already has a different one."""
        return Catalog(
            self.codes, self.codebook_sizes, self.item_ids, tokens=self.code_tokens(tokens),
            shared=self.shared is not None, counts=self.counts,
        )  # fmt: skip

    def first(self, count: int) -> Catalog:
        """The catalog of the first ``count`` items."""
        return self if count >= len(self) else self.take(range(count))

    def take(self, rows: Sequence[int]) -> Catalog:
        """The catalog of some rows, in the given order."""
        kept_ids: list[Any] = [self.item_ids[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64)
        return Catalog(
            self.codes[index], self.codebook_sizes, kept_ids, tokens=self.tokens,
            shared=self.shared is not None, counts=None if self.counts is None else self.counts[index],
        )  # fmt: skip

    def save(self, folder: Path | str) -> None:
        """Write ``catalog.safetensors`` (codes, token map, counts) and ``catalog.json`` (sizes, ids).

        Each file is replaced atomically.
        """
        folder = Path(folder)
        about = {
            "format": 1, "codebook_size": self.codebook_size, "item_ids": self.item_ids,
            "sha256": self.digest(), **self._extras(),
        }  # fmt: skip
        files.save_tensors(self._tensors(), folder / "catalog.safetensors")
        files.write_json(folder / "catalog.json", about, indent=None)

    @classmethod
    def load(cls, folder: Path | str) -> Catalog:
        """Read and check what `save` wrote. Raises DamagedError if it is missing or damaged."""
        folder = Path(folder)
        try:
            about = read_json(folder / "catalog.json", _About, fix=REMEDY)
            tensors = read_tensors(folder / "catalog.safetensors", fix=REMEDY)
            spec = {name: OPTIONAL[name] for name in tensors.keys() & OPTIONAL.keys()} | CODES
            check_tensors(folder / "catalog.safetensors", tensors, spec, fix=REMEDY)
            start = about.code_token_start
            catalog = cls.from_codes(
                tensors["codes"], about.codebook_sizes or about.codebook_size, about.item_ids,
                tokens=tensors.get("tokens") if start is None else start,
                shared=about.shared, counts=tensors.get("counts"),
            )  # fmt: skip
        except UserError as error:
            cause = f"{error.message}: {error.cause}" if error.cause else error.message
            raise DamagedError(f"{folder} has no readable catalog", cause=cause, fix=REMEDY) from error
        if (about.sha256 or catalog.digest()) != catalog.digest():
            cause = "the codes and item ids were not saved together"
            raise DamagedError(f"{folder} has a damaged catalog", cause=cause, fix=REMEDY)
        return catalog

    def digest(self) -> str:
        """sha256 of all that is saved."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        extras = self._extras()
        fields = [list(self.codes.shape), self.codebook_size, self.item_ids, *([extras] if extras else [])]
        tensors = b"".join(tensor.numpy().tobytes() for tensor in self._tensors().values())
        return hashlib.sha256(json.dumps(fields).encode() + tensors).hexdigest()

    def _extras(self) -> dict[str, object]:
        """Optional fields of ``catalog.json``."""
        extras: dict[str, object] = {}
        if min(self.codebook_sizes) < self.codebook_size:
            extras["codebook_sizes"] = list(self.codebook_sizes)
        if self.shared is not None:
            extras["shared"] = True
        if self.tokens is not None and self.tokens.start is not None:
            extras["code_token_start"] = self.tokens.start
        return extras

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of ``catalog.safetensors``."""
        tensors = {"codes": self.codes.contiguous()}
        if self.tokens is not None and self.tokens.start is None:
            tensors["tokens"] = self.tokens.table
        if self.counts is not None:
            tensors["counts"] = self.counts.contiguous()
        return tensors


def level_sizes(size: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Number of codes per level, from one number for all levels or one per level.

    Raises:
        UserError: ``size`` is neither, or out of range.
    """
    numbers = [size] * levels if isinstance(size, int) else size
    if isinstance(numbers, str) or not isinstance(numbers, Sequence | np.ndarray | Tensor):
        raise UserError(f"codebook_size must be an integer, or one per level, got {size!r}")
    sizes = tuple(int(n) if isinstance(n, int | np.integer | Tensor) else 0 for n in numbers)
    if len(sizes) != levels or min(sizes, default=1) < 1:
        raise UserError(
            f"codebook_size must be 1 or more, for all of the {levels} levels or one per level, got {size!r}"
        )
    if max(sizes, default=1) > MAX_CODEBOOK_SIZE:
        raise UserError(f"codebook_size must be at most {MAX_CODEBOOK_SIZE}, got {max(sizes)}")
    return sizes


def _check_item_ids(ids: list[Any]) -> None:
    """Raise UserError for ids that are not unique, of mixed types, or not valid as text."""
    if len({isinstance(i, str) for i in ids}) > 1:
        raise UserError("item ids must be all integers or all strings, got both")
    if len(set(ids)) != len(ids):
        raise UserError(f"item id {Counter(ids).most_common(1)[0][0]!r} occurs more than once")
    if ids and isinstance(ids[0], str):
        check_ids(ids, "item", source="catalog")


def ids_are_valid(ids: list[int] | list[str]) -> bool:
    """Whether ids are strings or integers from 0 on. Without shared IDs, the trie checks this."""
    return all(isinstance(i, str) or (isinstance(i, int | np.integer) and i >= 0) for i in ids)


def _as_counts(counts: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Counts as int64 [N]. Raises UserError for negative values and for values that are not integers."""
    given = torch.as_tensor(counts)
    integers = given.to(torch.int64) if not given.dtype.is_complex else None
    if integers is None or not torch.equal(integers.to(given.dtype), given) or bool((integers < 0).any()):
        raise UserError("counts must be integers from 0 on, one per item")
    return integers


def as_list(values: Sequence[Any] | np.ndarray | Tensor) -> list[Any]:
    """The values as Python numbers or strings."""
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
