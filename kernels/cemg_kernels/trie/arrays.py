"""The trie's flat arrays and their verification.

Nodes are numbered level by level from the root, 0, and siblings in ascending order of their codes. So the
children of a node are consecutive, and the edge into node c is edge c - 1. The leaves are the last N nodes,
the items in sorted order; the index of a leaf among the leaves is the rank of its item. N items, L levels, T
nodes, I inner nodes (T = I + N).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..runtime.dispatch import native, pick
from .packed import at, unpack, unpack_any

if TYPE_CHECKING:
    from .._native import TrieView

MAX_CODEBOOK_SIZE = 32768  # a code fits int16
MAX_LEVELS = 255
MAX_NODES = 2**31 - 1


@dataclass(frozen=True)
class TrieArrays:
    """The arrays of a trie.

    Args:
        code: uint8 or int16 [T - 1], the code of each edge.
        first_child: int64 [words], the first child of each inner node, then T, packed by ``packed.py``.
        rows: int32 [N], the row of the item at each rank.
        levels: L.
        codebook_size: K.
    """

    code: Tensor
    first_child: Tensor
    rows: Tensor
    levels: int
    codebook_size: int

    @property
    def num_nodes(self) -> int:
        """T."""
        return self.code.numel() + 1

    @property
    def num_inner(self) -> int:
        """I."""
        return self.num_nodes - self.rows.numel()

    @cached_property
    def view(self) -> TrieView:
        """The C++ view of the arrays, which borrows their memory."""
        view: TrieView = native().TrieView(
            code=self.code.data_ptr(),
            code_bytes=self.code.element_size(),
            first_child=self.first_child.data_ptr(),
            num_inner=self.num_inner,
            num_nodes=self.num_nodes,
            codebook_size=self.codebook_size,
        )
        return view

    @cached_property
    def first_children(self) -> Tensor:
        """The unpacked first children, then T, for the reference: int64 [I + 1]."""
        return unpack(self.first_child, self.num_inner + 1)

    @cached_property
    def level_begins(self) -> list[int]:
        """The first node of each level, from 0 (the root) to ``num_inner`` (the leaves)."""
        begins = [0]
        while begins[-1] < self.num_inner:
            begins.append(int(at(self.first_child, torch.tensor(begins[-1], device=self.code.device))))
        return begins

    @cached_property
    def _moved(self) -> WeakValueDictionary[torch.device, TrieArrays]:
        return WeakValueDictionary()

    def to(self, device: str | torch.device) -> TrieArrays:
        """Returns the arrays on another device, or themselves. All callers share one copy per device."""
        device = torch.empty(0, device=device).device  # with its index
        if device == self.code.device:
            return self
        moved = self._moved.get(device)
        if moved is None:
            code, first_child, rows = (t.to(device) for t in (self.code, self.first_child, self.rows))
            moved = TrieArrays(code, first_child, rows, self.levels, self.codebook_size)
            self._moved[device] = moved
        return moved


class DuplicateCodes(ValueError):
    """Some rows have equal codes; ``pairs`` lists them two by two."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = pairs
        super().__init__(f"{len(pairs)} rows have the codes of another row")


def code_dtype(codebook_size: int) -> torch.dtype:
    """Returns the smallest dtype that holds every code."""
    return torch.uint8 if codebook_size <= 256 else torch.int16


def fingerprint_of(arrays: TrieArrays, ids: Tensor | None) -> str:
    """Returns a hash of the arrays and of the ids in rank order."""
    digest = hashlib.sha256(f"{arrays.levels} {arrays.codebook_size} {ids is None}".encode())
    for tensor in (arrays.code, arrays.first_child, arrays.rows, ids):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def verify(arrays: TrieArrays) -> str:
    """Returns why these CPU arrays, read from a file, are not a valid trie, or "" if they are."""
    problem = _dtype_problem(arrays)
    if problem or pick("trie", torch.device("cpu")) != "native":
        return problem or problem_reference(arrays)
    code, first, rows = arrays.code.contiguous(), arrays.first_child.contiguous(), arrays.rows.contiguous()
    native_problem: str = native().trie_problem(
        code=code.data_ptr(), code_bytes=code.element_size(), first_child=first.data_ptr(),
        rows=rows.data_ptr(), num_edges=code.numel(), num_words=first.numel(), num_items=rows.numel(),
        levels=arrays.levels, codebook_size=arrays.codebook_size,
    )  # fmt: skip
    return native_problem


def problem_reference(arrays: TrieArrays) -> str:
    """The definition of ``verify``, for arrays with the right dtypes."""
    return _shape_problem(arrays) or _edge_problem(arrays) or _level_problem(arrays)


def check_nodes(num_nodes: int, num_items: int) -> None:
    """Raises ValueError if the number of nodes exceeds int32."""
    if num_nodes > MAX_NODES:
        raise ValueError(
            f"{num_items} items need {num_nodes} nodes, more than int32 counts; split the catalog"
        )


def sorted_order(codes: Tensor, codebook_size: int) -> Tensor:
    """Returns the permutation int64 [N] that sorts the rows of ``codes`` [N, L], stably."""
    levels, bits = codes.shape[1], max((codebook_size - 1).bit_length(), 1)
    if levels * bits <= 63:  # one key holds all codes
        key = codes[:, 0].long()
        for m in range(1, levels):
            key = (key << bits) | codes[:, m]
        return key.argsort(stable=True)
    order = torch.arange(codes.shape[0], device=codes.device)
    for m in reversed(range(levels)):  # stable sorts from the last code to the first
        order = order[codes[order, m].argsort(stable=True)]
    return order


def check_distinct(order: Tensor, depth: Tensor, levels: int) -> None:
    """Raises DuplicateCodes if a rank shares all ``levels`` codes with the previous one (``depth`` [N])."""
    equal = (depth == levels).nonzero()[:, 0]
    if equal.numel():
        raise DuplicateCodes(list(zip(order[equal - 1].tolist(), order[equal].tolist(), strict=True)))


def _dtype_problem(arrays: TrieArrays) -> str:
    if not 1 <= arrays.codebook_size <= MAX_CODEBOOK_SIZE:
        return f"codebook_size is {arrays.codebook_size}"
    if not 1 <= arrays.levels <= MAX_LEVELS:
        return f"levels is {arrays.levels}"
    expected = {"code": code_dtype(arrays.codebook_size), "first_child": torch.int64, "rows": torch.int32}
    for name, dtype in expected.items():
        tensor: Tensor = getattr(arrays, name)
        if tensor.dtype != dtype or tensor.dim() != 1:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not one-dimensional {dtype}"
    return ""


def _shape_problem(arrays: TrieArrays) -> str:
    num_items = arrays.rows.numel()
    if num_items < 1 or arrays.num_inner < 1:
        return f"{num_items} items do not make {arrays.num_nodes} nodes"
    rows = arrays.rows.long()
    if int(rows.min()) < 0 or int(rows.max()) >= num_items or rows.unique().numel() != num_items:
        return "rows is not a permutation of the items"
    return ""


def _edge_problem(arrays: TrieArrays) -> str:
    first = unpack_any(arrays.first_child, arrays.num_inner + 1)
    if first is None or int(first[0]) != 1 or int(first[-1]) != arrays.num_nodes:
        return "first_child does not ascend from 1 to the number of nodes"
    code = arrays.code.long()
    if int(code.min()) < 0 or int(code.max()) >= arrays.codebook_size:
        return f"a code is outside 0 to {arrays.codebook_size - 1}"
    ascends = torch.ones(arrays.num_nodes, dtype=torch.bool)
    ascends[2:] = code.diff() > 0  # is the code of node c above that of node c - 1?
    ascends[first[:-1]] = True  # a first child has no left sibling
    return "" if bool(ascends.all()) else "the codes of some siblings do not ascend"


def _level_problem(arrays: TrieArrays) -> str:
    begin = 0
    for _ in range(arrays.levels):
        if begin >= arrays.num_inner:
            return f"the levels end before level {arrays.levels}"
        begin = int(at(arrays.first_child, torch.tensor(begin)))
    return "" if begin == arrays.num_inner else f"the items are not on level {arrays.levels}"
