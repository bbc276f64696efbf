"""The trie of all valid semantic IDs, and its batched operations.

R or B rows, m codes of a prefix, K codes a level, N items. A node is one int32: the root 0, none -1.
Under 3 bytes an item (``nbytes``; random codes, K = 256, 4 levels, 1e6 items), and the ids apart
(``id_nbytes``). What runs is the C++ or CUDA of ``csrc/``, or the walk of ``trie_walk.py`` (``trie_ops.py``).
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.operands import device_of, integers_of
from ..runtime.ranges import ranged
from . import file as trie_file
from . import ops as trie_ops
from .arrays import DuplicateCodes, TrieArrays, build, check_codes, fingerprint_of
from .filter_tensors import FilterTensors
from .item_filter import ItemFilter
from .request_filter import RequestFilter

if TYPE_CHECKING:
    from ..runtime.operands import Numbers

Filter = ItemFilter | RequestFilter


class Trie:
    """All valid semantic IDs; made by ``from_codes`` or ``load``, never changed.

    >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
    >>> trie.items(trie.lookup(torch.tensor([[0, 2], [3, 3]]))).tolist()
    [1, -1]
    """

    def __init__(self, arrays: TrieArrays, ids: Tensor | None) -> None:
        """Internal: ``ids`` [N] int64 by rank, None where an item's id is its row."""
        self.arrays, self._ids = arrays, ids
        # attributes, since properties cost a step of decoding half a microsecond
        self.codebook_size, self.device = arrays.codebook_size, arrays.code.device

    @classmethod
    def from_codes(
        cls,
        codes: Numbers,
        codebook_size: int,
        item_ids: Numbers | None = None,
        device: str | torch.device = "cpu",
    ) -> Trie:
        """The trie of ``codes`` [N, levels] (any integer dtype), each in 0 ... codebook_size - 1.

        ``item_ids`` [N] are distinct integers from 0 on; without them an item's id is its row. Both may be
        numpy arrays or lists, here and in all methods.
        Raises ValueError on codes out of range, a dtype or shape that is no code, equal codes (naming the
        items), or more nodes than int32 counts.
        """
        device, codes, codebook_size = device_of(device), integers_of("codes", codes), index(codebook_size)
        check_codes(codes, codebook_size)
        ids = None if item_ids is None else _checked_ids(item_ids, codes.shape[0])
        try:
            arrays = build(codes, codebook_size)
        except DuplicateCodes as error:
            raise ValueError(_duplicate_message(error.pairs, codes, ids)) from None
        by_rank = None if ids is None else ids.to(arrays.rows.device)[arrays.rows.long()]
        return cls(arrays, by_rank).to(device)

    @property
    def num_items(self) -> int:
        return self.arrays.rows.numel()

    @property
    def num_nodes(self) -> int:
        return self.arrays.num_nodes

    @property
    def levels(self) -> int:
        return self.arrays.levels

    @property
    def nbytes(self) -> int:
        """Bytes of the trie itself, codes and first children; the ids are in ``id_nbytes``."""
        return self.arrays.code.nbytes + self.arrays.first_child.nbytes

    @property
    def id_nbytes(self) -> int:
        """Bytes of what leads from a leaf to its row and id."""
        return self.arrays.rows.nbytes + (0 if self._ids is None else self._ids.nbytes)

    @property
    def rows(self) -> Tensor:
        """The row, in ``from_codes``' order, of each rank: [N] int32."""
        return self.arrays.rows

    @property
    def ids_by_rank(self) -> Tensor:
        """The item id of each rank: [N] int64."""
        return self.arrays.rows.long() if self._ids is None else self._ids

    @cached_property
    def fingerprint(self) -> str:
        """A hash of codes, rows and ids: what a filter must share with its trie."""
        return fingerprint_of(self.arrays, self._ids)

    def codes_by_rank(self) -> Tensor:
        """The codes of each rank, [N, levels] uint8 or int16: what the trie was built from, in order."""
        columns = []
        for begin, end in pairwise([*self.arrays.level_begins[1:], self.num_nodes]):
            nodes = torch.arange(begin, end, dtype=torch.int32, device=self.device)
            below = self.interval(nodes)
            columns.append(self.arrays.code[begin - 1 : end - 1].repeat_interleave(below[:, 1] - below[:, 0]))
        return torch.stack(columns, 1)

    def to(self, device: str | torch.device) -> Trie:
        """The same trie on another device; itself where it is there already."""
        device = device_of(device)
        if device == self.device:
            return self
        moved = Trie(self.arrays.to(device), None if self._ids is None else self._ids.to(device))
        if "fingerprint" in self.__dict__:
            moved.fingerprint = self.fingerprint
        return moved

    def lookup(self, prefixes: Numbers, *, filter: Filter | None = None) -> Tensor:
        """The node each prefix leads to from the root: [B, m] integers, 0 <= m <= levels -> [B] int32.

        -1 where no item (that the filter allows) starts with the prefix.
        """
        prefixes = self._here("prefixes", prefixes).long().contiguous()
        if prefixes.dim() != 2 or prefixes.shape[1] > self.levels:
            raise ValueError(f"prefixes must be [B, m] with m <= {self.levels}, got {list(prefixes.shape)}")
        return trie_ops.run("lookup", self.arrays, self.filter_tensors(filter, prefixes.shape[0]), prefixes)

    def advance(self, nodes: Numbers, codes: Numbers, *, filter: Filter | None = None) -> Tensor:
        """The child of each node along each code: any equal shapes -> the same shape, int32.

        -1 where there is no such child, or where the filter allows nothing below it.
        """
        nodes = self._nodes(nodes)
        codes = self._here("codes", codes).long().contiguous()
        if nodes.shape != codes.shape:
            raise ValueError(f"nodes {list(nodes.shape)} and codes {list(codes.shape)} must have one shape")
        allowed = self.filter_tensors(filter, nodes.numel())
        found = trie_ops.run("advance", self.arrays, allowed, nodes.flatten(), codes.flatten())
        return found.view(nodes.shape)

    def children(self, nodes: Numbers, *, filter: Filter | None = None) -> tuple[Tensor, Tensor]:
        """Codes and nodes of the children of ``nodes`` [B]: two int32 [B, K].

        A row holds its children first, by ascending code, and then -1.
        """
        nodes = self._nodes(nodes, 1)
        return trie_ops.run("children", self.arrays, self.filter_tensors(filter, nodes.numel()), nodes)

    def mask(self, nodes: Numbers, *, filter: Filter | None = None) -> Tensor:
        """Which codes continue each of ``nodes`` [B]: bool [B, K]; a row of -1 is all False."""
        nodes = self._nodes(nodes, 1)
        return trie_ops.run("mask", self.arrays, self.filter_tensors(filter, nodes.numel()), nodes)

    @ranged
    def items(self, leaves: Numbers, *, filter: Filter | None = None) -> Tensor:
        """The item id at each leaf (any shape), int64; -1 for -1 and for whatever is no leaf."""
        found: Tensor = self._nodes(leaves)
        allowed = self.filter_tensors(filter, found.numel())
        if allowed is not None:
            found = trie_ops.run("keep", self.arrays, allowed, found.flatten()).view(found.shape)
        rank = found.long() - self.arrays.num_inner
        is_leaf = (rank >= 0) & (rank < self.num_items)
        safe = torch.where(is_leaf, rank, 0)
        ids = self.arrays.rows[safe].long() if self._ids is None else self._ids[safe]
        return torch.where(is_leaf, ids, -1)

    def interval(self, nodes: Numbers) -> Tensor:
        """The ranks of the items below each of ``nodes`` [B]: [B, 2] int32, half open; (0, 0) for -1."""
        return trie_ops.run("interval", self.arrays, None, self._nodes(nodes, 1))

    def ranks_of(self, ids: Numbers) -> Tensor:
        """The rank of each item id (any shape), int64; -1 where the trie has no such item."""
        ids = self._here("ids", ids).long()
        known, order = self._by_id
        place = ids if known is None else torch.searchsorted(known, ids)
        safe = place.clamp(0, self.num_items - 1)
        found = safe == ids if known is None else known[safe] == ids
        return torch.where(found, order[safe].long(), -1)

    def save(self, path: str | Path) -> None:
        """Write the trie as safetensors, whole or not at all."""
        trie_file.write(Path(path), self.arrays, self._ids)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trie:
        """Map what ``save`` wrote into memory, and verify it; on the CPU nothing is copied.

        Raises ValueError where the file is missing, foreign, or not as it was written.
        """
        device = device_of(device)
        arrays, ids, fingerprint = trie_file.read(Path(path))
        trie = cls(arrays, ids)
        trie.fingerprint = fingerprint
        return trie.to(device)

    def filter_tensors(self, filter: Filter | None, rows: int) -> FilterTensors | None:
        """What the operations read of a filter, checked for a call of ``rows`` rows; None for None.

        Raises ValueError where it belongs to another trie or device, or where its requests do not divide
        the rows.
        """
        if filter is None:
            return None
        if not isinstance(filter, ItemFilter | RequestFilter):
            raise TypeError(
                f"filter must be an ItemFilter or a RequestFilter, got {type(filter).__name__}; "
                "make one with ItemFilter.from_mask"
            )
        if filter.fingerprint != self.fingerprint:
            raise ValueError("the filter belongs to another trie; make it anew with ItemFilter.from_mask")
        if filter.device != self.device:
            raise ValueError(f"the filter is on {filter.device}, the trie on {self.device}; use .to()")
        if isinstance(filter, RequestFilter) and rows % filter.num_requests:
            raise ValueError(
                f"a filter of {filter.num_requests} requests cannot serve {rows} rows; "
                "pass as many rows for each request, in order, or choose with .select()"
            )
        return filter.tensors

    @cached_property
    def _by_id(self) -> tuple[Tensor | None, Tensor]:
        """Ids in order (None: 0 ... N - 1) and the rank of each, int32."""
        if self._ids is not None:
            known, rank = self._ids.sort()
            return known, rank.to(torch.int32)
        rank = torch.empty_like(self.arrays.rows)
        rank[self.arrays.rows.long()] = torch.arange(self.num_items, dtype=torch.int32, device=self.device)
        return None, rank

    def _here(self, name: str, value: Numbers) -> Tensor:
        """Integers on the trie's device; lists and numpy arrays are moved there."""
        tensor = integers_of(name, value)
        if tensor.device != self.device:
            if isinstance(value, Tensor):
                raise ValueError(f"{name} are on {tensor.device}, the trie on {self.device}; use .to()")
            tensor = tensor.to(self.device)
        return tensor

    def _nodes(self, nodes: Numbers, dim: int | None = None) -> Tensor:
        nodes = self._here("nodes", nodes)
        if dim is not None and nodes.dim() != dim:
            raise ValueError(f"nodes must be one-dimensional, got {list(nodes.shape)}; use .flatten()")
        return as_nodes(nodes, self.num_nodes)


def as_nodes(nodes: Tensor, num_nodes: int) -> Tensor:
    """``nodes`` (any integers) int32 and contiguous; of wider integers what is no node becomes -1."""
    if nodes.dtype is not torch.int32:
        wide = nodes.long()
        nodes = torch.where((wide < 0) | (wide >= num_nodes), -1, wide).to(torch.int32)
    return nodes.contiguous()


def _checked_ids(item_ids: Numbers, num_items: int) -> Tensor:
    ids = integers_of("item_ids", item_ids).to("cpu", torch.int64).contiguous()
    problem = trie_file.ids_problem(ids, num_items)
    if problem:
        raise ValueError(f"{problem}; pass one distinct integer from 0 on for each item")
    return ids


def _duplicate_message(pairs: list[tuple[int, int]], codes: Tensor, ids: Tensor | None) -> str:
    named = [(a, b) if ids is None else (int(ids[a]), int(ids[b])) for a, b in pairs[:5]]
    shown = ", ".join(
        f"items {a} and {b} ({codes[row].tolist()})" for (a, b), (row, _) in zip(named, pairs, strict=False)
    )
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    return f"items must have distinct codes, but {shown}{more} share theirs; resolve the collisions first"
