"""The trie of all valid semantic IDs, and its batched operations.

B or R rows, m codes per prefix, K codes per level, N items. A node is an int32: 0 is the root, -1 means none.
The trie takes less than 3 bytes per item (``nbytes``, for random codes, K = 256, 4 levels, 1e6 items), plus
the ids (``id_nbytes``). ``ops.py`` runs the C++ or CUDA code of ``csrc/``, or the reference in
``reference.py``.

Source: constrained decoding over a trie of valid identifiers, De Cao et al. 2021
(https://arxiv.org/abs/2010.00904), applied to semantic IDs as in TIGER (https://arxiv.org/abs/2305.05065).
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
from .arrays import DuplicateCodes, TrieArrays, fingerprint_of
from .build import build, check_codes
from .filter_tensors import Filter, FilterTensors

if TYPE_CHECKING:
    from ..runtime.operands import Numbers


class Trie:
    """The trie of all valid semantic IDs. Create it with ``from_codes`` or ``load``; it is immutable.

    Every method also accepts numpy arrays and nested lists in place of tensors.

    Example:
        >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
        >>> trie.items(trie.lookup(torch.tensor([[0, 2], [3, 3]]))).tolist()
        [1, -1]
    """

    def __init__(self, arrays: TrieArrays, ids: Tensor | None) -> None:
        """Internal. ``ids`` is int64 [N] in rank order, or None if the id of each item is its row."""
        self.arrays, self._ids = arrays, ids
        # attributes, because properties add half a microsecond to each decode step
        self.codebook_size, self.device = arrays.codebook_size, arrays.code.device

    @classmethod
    def from_codes(
        cls,
        codes: Numbers,
        codebook_size: int,
        item_ids: Numbers | None = None,
        device: str | torch.device = "cpu",
    ) -> Trie:
        """Builds the trie of a catalog.

        Args:
            codes: Integers [N, levels], each from 0 to ``codebook_size - 1``.
            codebook_size: K, the number of codes per level, at most 32,768.
            item_ids: Distinct integers [N], 0 or larger. By default the id of an item is its row.
            device: Where to store the trie.

        Raises:
            ValueError: Codes are out of range or not integers, the shape is wrong, two items have equal codes
                (the message names them), or the trie needs more nodes than int32 can count.
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
        """N."""
        return self.arrays.rows.numel()

    @property
    def num_nodes(self) -> int:
        """The number of nodes, including the root and the leaves."""
        return self.arrays.num_nodes

    @property
    def levels(self) -> int:
        """The number of codes per item."""
        return self.arrays.levels

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and first children, without the ids."""
        return self.arrays.code.nbytes + self.arrays.first_child.nbytes

    @property
    def id_nbytes(self) -> int:
        """Bytes of the tables that map a leaf to its row and id."""
        return self.arrays.rows.nbytes + (0 if self._ids is None else self._ids.nbytes)

    @property
    def rows(self) -> Tensor:
        """The row of the item at each rank, in the order of ``from_codes``: int32 [N]."""
        return self.arrays.rows

    @property
    def ids_by_rank(self) -> Tensor:
        """The item id at each rank: int64 [N]."""
        return self.arrays.rows.long() if self._ids is None else self._ids

    @cached_property
    def fingerprint(self) -> str:
        """A hash of codes, rows and ids. A filter stores the fingerprint of its trie."""
        return fingerprint_of(self.arrays, self._ids)

    def codes_by_rank(self) -> Tensor:
        """Returns the codes of the item at each rank: uint8 or int16 [N, levels]."""
        columns = []
        for begin, end in pairwise([*self.arrays.level_begins[1:], self.num_nodes]):
            nodes = torch.arange(begin, end, dtype=torch.int32, device=self.device)
            ranks = self.interval(nodes)
            columns.append(self.arrays.code[begin - 1 : end - 1].repeat_interleave(ranks[:, 1] - ranks[:, 0]))
        return torch.stack(columns, 1)

    def to(self, device: str | torch.device) -> Trie:
        """Returns the trie on another device, or itself if it is already there."""
        device = device_of(device)
        if device == self.device:
            return self
        moved = Trie(self.arrays.to(device), None if self._ids is None else self._ids.to(device))
        if "fingerprint" in self.__dict__:
            moved.fingerprint = self.fingerprint
        return moved

    def lookup(self, prefixes: Numbers, *, filter: Filter | None = None) -> Tensor:
        """Finds the node of each prefix.

        Args:
            prefixes: Integers [B, m] with 0 <= m <= levels.
            filter: Restricts the trie to the items that it allows.

        Returns:
            int32 [B]; -1 if no allowed item starts with the prefix.

        Raises:
            ValueError: The shape, dtype or device does not fit.
        """
        prefixes = self._on_device("prefixes", prefixes).long().contiguous()
        if prefixes.dim() != 2 or prefixes.shape[1] > self.levels:
            raise ValueError(f"prefixes must be [B, m] with m <= {self.levels}, got {list(prefixes.shape)}")
        allowed = self.filter_tensors(filter, prefixes.shape[0])
        nodes: Tensor = trie_ops.run("lookup", self.arrays, allowed, prefixes)
        return nodes

    def advance(self, nodes: Numbers, codes: Numbers, *, filter: Filter | None = None) -> Tensor:
        """Finds the child of each node for a code.

        Args:
            nodes: Integers of any shape.
            codes: Integers of the same shape.
            filter: Restricts the trie to the items that it allows.

        Returns:
            int32 of the same shape; -1 if there is no such child or the filter allows no item below it.

        Raises:
            ValueError: The shapes, dtypes or devices do not fit.
        """
        nodes = self._nodes(nodes)
        codes = self._on_device("codes", codes).long().contiguous()
        if nodes.shape != codes.shape:
            raise ValueError(f"nodes {list(nodes.shape)} and codes {list(codes.shape)} must have one shape")
        allowed = self.filter_tensors(filter, nodes.numel())
        children: Tensor = trie_ops.run("advance", self.arrays, allowed, nodes.flatten(), codes.flatten())
        return children.view(nodes.shape)

    def children(self, nodes: Numbers, *, filter: Filter | None = None) -> tuple[Tensor, Tensor]:
        """Lists the children of each node.

        Args:
            nodes: Integers [B].
            filter: Restricts the trie to the items that it allows.

        Returns:
            The codes and the nodes of the children, two int32 [B, K], in ascending order of the codes; the
            rest of each row is -1.
        """
        nodes = self._nodes(nodes, 1)
        allowed = self.filter_tensors(filter, nodes.numel())
        codes, children = trie_ops.run("children", self.arrays, allowed, nodes)
        return codes, children

    def mask(self, nodes: Numbers, *, filter: Filter | None = None) -> Tensor:
        """Returns which codes continue each node.

        Args:
            nodes: Integers [B]; the row of -1 is all False.
            filter: Restricts the trie to the items that it allows.

        Returns:
            bool [B, K].
        """
        nodes = self._nodes(nodes, 1)
        valid: Tensor = trie_ops.run("mask", self.arrays, self.filter_tensors(filter, nodes.numel()), nodes)
        return valid

    @ranged
    def items(self, leaves: Numbers, *, filter: Filter | None = None) -> Tensor:
        """Returns the item id at each leaf.

        Args:
            leaves: Integers of any shape.
            filter: Restricts the trie to the items that it allows.

        Returns:
            int64 of the same shape; -1 for -1, for nodes that are not leaves, and for items not allowed.
        """
        nodes: Tensor = self._nodes(leaves)
        allowed = self.filter_tensors(filter, nodes.numel())
        if allowed is not None:
            nodes = trie_ops.run("keep", self.arrays, allowed, nodes.flatten()).view(nodes.shape)
        rank = nodes.long() - self.arrays.num_inner
        is_leaf = (rank >= 0) & (rank < self.num_items)
        safe = torch.where(is_leaf, rank, 0)
        ids = self.arrays.rows[safe].long() if self._ids is None else self._ids[safe]
        return torch.where(is_leaf, ids, -1)

    def interval(self, nodes: Numbers) -> Tensor:
        """Returns the ranks of the items below each node.

        Args:
            nodes: Integers [B].

        Returns:
            int32 [B, 2], first rank and one past the last; (0, 0) for -1.
        """
        ranks: Tensor = trie_ops.run("interval", self.arrays, None, self._nodes(nodes, 1))
        return ranks

    def ranks_of(self, ids: Numbers) -> Tensor:
        """Returns the rank of each item id.

        Args:
            ids: Integers of any shape.

        Returns:
            int64 of the same shape; -1 if the trie has no item with this id.
        """
        ids = self._on_device("ids", ids).long()
        known, order = self.by_id
        position = ids if known is None else torch.searchsorted(known, ids)
        safe = position.clamp(0, self.num_items - 1)
        exists = safe == ids if known is None else known[safe] == ids
        return torch.where(exists, order[safe].long(), -1)

    def save(self, path: str | Path) -> None:
        """Writes the trie as a safetensors file, atomically."""
        trie_file.write(Path(path), self.arrays, self._ids)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trie:
        """Maps a file that ``save`` wrote into memory and verifies it; copies nothing on the CPU.

        Args:
            path: The file.
            device: Where to store the trie.

        Raises:
            ValueError: The file is missing, has another format, or was modified after it was written.
        """
        device = device_of(device)
        arrays, ids, fingerprint = trie_file.read(Path(path))
        trie = cls(arrays, ids)
        trie.fingerprint = fingerprint
        return trie.to(device)

    def filter_tensors(self, filter: Filter | None, rows: int) -> FilterTensors | None:
        """Checks a filter for a call with ``rows`` rows and returns its tensors; None for None.

        Raises:
            TypeError: ``filter`` is neither an ``ItemFilter`` nor a ``RequestFilter``.
            ValueError: The filter belongs to another trie or device, or ``rows`` is not a multiple of its
                number of requests.
        """
        if filter is None:
            return None
        if not isinstance(filter, Filter):
            raise TypeError(
                f"filter must be an ItemFilter or a RequestFilter, got {type(filter).__name__}; "
                "make one with ItemFilter.from_mask"
            )
        if filter.fingerprint != self.fingerprint:
            raise ValueError("the filter belongs to another trie; create it again with ItemFilter.from_mask")
        if filter.device != self.device:
            raise ValueError(f"the filter is on {filter.device}, the trie on {self.device}; use .to()")
        requests = filter.tensors.num_requests
        if requests and rows % requests:
            raise ValueError(
                f"a filter of {requests} requests cannot serve {rows} rows; "
                "pass the same number of rows per request, in order, or choose requests with .select()"
            )
        return filter.tensors

    @cached_property
    def by_id(self) -> tuple[Tensor | None, Tensor]:
        """The ids in ascending order (None for 0 ... N - 1) and the rank of each, int32."""
        if self._ids is not None:
            known, rank = self._ids.sort()
            return known, rank.to(torch.int32)
        rank = torch.empty_like(self.arrays.rows)
        rank[self.arrays.rows.long()] = torch.arange(self.num_items, dtype=torch.int32, device=self.device)
        return None, rank

    def _on_device(self, name: str, value: Numbers) -> Tensor:
        """Returns integers on the trie's device; moves lists and numpy arrays there."""
        tensor = integers_of(name, value)
        if tensor.device != self.device:
            if isinstance(value, Tensor):
                raise ValueError(f"{name} are on {tensor.device}, the trie on {self.device}; use .to()")
            tensor = tensor.to(self.device)
        return tensor

    def _nodes(self, nodes: Numbers, dim: int | None = None) -> Tensor:
        nodes = self._on_device("nodes", nodes)
        if dim is not None and nodes.dim() != dim:
            raise ValueError(f"nodes must be one-dimensional, got {list(nodes.shape)}; use .flatten()")
        return as_nodes(nodes, self.num_nodes)


def as_nodes(nodes: Tensor, num_nodes: int) -> Tensor:
    """Converts integers to contiguous int32; in other dtypes, values that are not nodes become -1."""
    if nodes.dtype is not torch.int32:
        as_int64 = nodes.long()
        nodes = torch.where((as_int64 < 0) | (as_int64 >= num_nodes), -1, as_int64).to(torch.int32)
    return nodes.contiguous()


def _checked_ids(item_ids: Numbers, num_items: int) -> Tensor:
    ids = integers_of("item_ids", item_ids).to("cpu", torch.int64).contiguous()
    problem = trie_file.ids_problem(ids, num_items)
    if problem:
        raise ValueError(f"{problem}; pass one distinct integer per item, 0 or larger")
    return ids


def _duplicate_message(pairs: list[tuple[int, int]], codes: Tensor, ids: Tensor | None) -> str:
    named = [(a, b) if ids is None else (int(ids[a]), int(ids[b])) for a, b in pairs[:5]]
    shown = ", ".join(
        f"items {a} and {b} ({codes[row].tolist()})" for (a, b), (row, _) in zip(named, pairs, strict=False)
    )
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    return f"items must have distinct codes, but {shown}{more} share theirs; resolve the collisions first"
