"""The trie's flat arrays, built and verified.

Nodes are numbered level by level, the root 0, siblings in the order of their codes. So a node's children
are consecutive, the edge into node c is edge c - 1, and the leaves, the last N nodes, are the items in
sorted order: a leaf's place among the leaves is the item's rank.
N items, L levels, T nodes, I inner nodes (T = I + N).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..runtime.dispatch import native, pick
from ..runtime.ranges import named_range
from .packed import at, pack, unpack, unpack_any

MAX_CODEBOOK_SIZE = 32768  # a code fits int16
MAX_LEVELS = 255
MAX_NODES = 2**31 - 1


@dataclass(frozen=True)
class TrieArrays:
    """``code`` [T - 1] uint8 or int16; ``first_child`` [words] int64, the I + 1 first children and their end,
    packed (``packed_ascending.py``); ``rows`` [N] int32 (rank -> row).
    """

    code: Tensor
    first_child: Tensor
    rows: Tensor
    levels: int
    codebook_size: int

    @property
    def num_nodes(self) -> int:
        return self.code.numel() + 1

    @property
    def num_inner(self) -> int:
        return self.num_nodes - self.rows.numel()

    @cached_property
    def view(self) -> Any:
        """The C++ view of the arrays."""
        return native().TrieView(
            code=self.code.data_ptr(),
            code_bytes=self.code.element_size(),
            first_child=self.first_child.data_ptr(),
            num_inner=self.num_inner,
            num_nodes=self.num_nodes,
            codebook_size=self.codebook_size,
        )

    @cached_property
    def first_children(self) -> Tensor:
        """The first children and their end, unpacked for the plain walk: [I + 1] int64."""
        return unpack(self.first_child, self.num_inner + 1)

    @cached_property
    def level_begins(self) -> list[int]:
        """The first node of each level, the root's 0 and the leaves' ``num_inner`` among them."""
        begins = [0]
        while begins[-1] < self.num_inner:
            begins.append(int(at(self.first_child, torch.tensor(begins[-1], device=self.code.device))))
        return begins

    @cached_property
    def _moved(self) -> WeakValueDictionary[torch.device, TrieArrays]:
        return WeakValueDictionary()

    def to(self, device: str | torch.device) -> TrieArrays:
        """The arrays on another device, one copy for all who ask; themselves where they are there."""
        device = torch.empty(0, device=device).device  # with its index
        if device == self.code.device:
            return self
        found = self._moved.get(device)
        if found is None:
            code, first_child, rows = (t.to(device) for t in (self.code, self.first_child, self.rows))
            found = TrieArrays(code, first_child, rows, self.levels, self.codebook_size)
            self._moved[device] = found
        return found


class DuplicateCodes(ValueError):
    """Rows with equal codes; ``pairs`` holds them two by two."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = pairs
        super().__init__(f"{len(pairs)} rows have the codes of another row")


def code_dtype(codebook_size: int) -> torch.dtype:
    """One byte where it holds every code, else two."""
    return torch.uint8 if codebook_size <= 256 else torch.int16


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """ValueError, with value and remedy, where ``codes`` [N, L] are not codes of ``codebook_size``."""
    if not 1 <= codebook_size <= MAX_CODEBOOK_SIZE:
        raise ValueError(f"codebook_size must be 1 to {MAX_CODEBOOK_SIZE}, got {codebook_size}")
    if codes.dim() != 2 or not 1 <= codes.shape[1] <= MAX_LEVELS or codes.shape[0] < 1:
        raise ValueError(
            f"codes must be [N, levels] with at least one item and 1 to {MAX_LEVELS} levels, "
            f"got {list(codes.shape)}"
        )
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be integers, got {codes.dtype}; convert them with .long()")
    if codes.shape[0] >= MAX_NODES:
        raise ValueError(f"{codes.shape[0]} items need more nodes than int32 counts; split the catalog")
    _check_range(codes, codebook_size)


def build(codes: Tensor, codebook_size: int, *, backend: str | None = None) -> TrieArrays:
    """The arrays of checked ``codes`` [N, L]; DuplicateCodes where two rows are equal.

    Codes on a GPU are sorted and built there.
    """
    codes = codes.detach()
    chosen = pick("trie_build", codes.device, backend)
    with named_range("trie_build"):
        if chosen == "triton":
            from .build_triton import build as build_triton

            return build_triton(codes, codebook_size)
        if chosen == "native":
            return _build_native(codes.contiguous(), codebook_size)
        return build_reference(codes, codebook_size)


def build_reference(codes: Tensor, codebook_size: int) -> TrieArrays:
    """The definition: sort the rows, start a node where a rank's leading codes differ from the last's."""
    num_items, levels = codes.shape
    order = sorted_order(codes, codebook_size)  # [N]
    codes = codes[order]
    depth = _shared_depth(codes)  # [N], leading codes shared with the rank before
    refuse_duplicates(order, depth, levels)
    starts = [depth <= m for m in range(levels)]  # [N] bool: does a node of level m + 1 start here?
    code = torch.cat([codes[s, m] for m, s in enumerate(starts)])
    counts = [0, *(int(s.sum()) for s in starts)]
    begin = 1 + torch.tensor(counts, device=codes.device).cumsum(0)  # of levels 1, 2, ...
    check_nodes(int(begin[-1]), num_items)
    first_child = [begin[:1]]
    for m in range(levels - 1):
        index = starts[m + 1].cumsum(0) - 1  # of each rank's node within level m + 2
        first_child.append(begin[m + 1] + index[starts[m]])
    first_child.append(begin[-1:])
    return TrieArrays(
        code.to(code_dtype(codebook_size)),
        pack(torch.cat(first_child)),
        order.to(torch.int32),
        levels,
        codebook_size,
    )


def fingerprint_of(arrays: TrieArrays, ids: Tensor | None) -> str:
    """A hash of the arrays and of the ids by rank."""
    digest = hashlib.sha256(f"{arrays.levels} {arrays.codebook_size} {ids is None}".encode())
    for tensor in (arrays.code, arrays.first_child, arrays.rows, ids):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def verify(arrays: TrieArrays) -> str:
    """What makes these CPU arrays, read from a file, no trie, in words; empty where they are one."""
    problem = _dtype_problem(arrays)
    if problem or pick("trie", torch.device("cpu")) != "native":
        return problem or problem_reference(arrays)
    code, first, rows = arrays.code.contiguous(), arrays.first_child.contiguous(), arrays.rows.contiguous()
    sizes = (code.numel(), first.numel(), rows.numel())
    return native().trie_problem(
        code.data_ptr(), code.element_size(), first.data_ptr(), rows.data_ptr(), sizes,
        arrays.levels, arrays.codebook_size,
    )  # fmt: skip


def problem_reference(arrays: TrieArrays) -> str:
    """The definition of ``verify``, for arrays of the right dtypes."""
    return _shape_problem(arrays) or _edge_problem(arrays) or _level_problem(arrays)


def _build_native(codes: Tensor, codebook_size: int) -> TrieArrays:
    num_items, levels = codes.shape
    if codes.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        codes = codes.to(torch.int32)
    builder = native().TrieBuilder(codes.data_ptr(), codes.element_size(), num_items, levels, codebook_size)
    if builder.duplicates:
        raise DuplicateCodes(builder.duplicates)
    code = torch.empty(builder.num_nodes - 1, dtype=code_dtype(codebook_size))
    rows = torch.empty(num_items, dtype=torch.int32)
    words = builder.write(code.data_ptr(), code.element_size(), rows.data_ptr())
    first_child = torch.empty(words.size, dtype=torch.int64)
    words.copy_to(first_child.data_ptr())
    return TrieArrays(code, first_child, rows, levels, codebook_size)


def _check_range(codes: Tensor, codebook_size: int) -> None:
    lowest, highest = map(int, codes.aminmax())
    if lowest < 0 or highest >= codebook_size:
        row, level = ((codes < 0) | (codes >= codebook_size)).nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has code {int(codes[row, level])} on level {level}; "
            f"codes are 0 to {codebook_size - 1}: raise codebook_size or mend the codes"
        )


def check_nodes(num_nodes: int, num_items: int) -> None:
    if num_nodes > MAX_NODES:
        raise ValueError(
            f"{num_items} items need {num_nodes} nodes, more than int32 counts; split the catalog"
        )


def sorted_order(codes: Tensor, codebook_size: int) -> Tensor:
    levels, bits = codes.shape[1], max((codebook_size - 1).bit_length(), 1)
    if levels * bits <= 63:  # one key holds all codes
        key = codes[:, 0].long()
        for m in range(1, levels):
            key = (key << bits) | codes[:, m]
        return key.argsort(stable=True)
    order = torch.arange(codes.shape[0], device=codes.device)
    for m in reversed(range(levels)):  # stable, so the first code weighs most
        order = order[codes[order, m].argsort(stable=True)]
    return order


def _shared_depth(codes: Tensor) -> Tensor:
    depth = torch.zeros(codes.shape[0], dtype=torch.int16, device=codes.device)
    same = torch.ones(codes.shape[0] - 1, dtype=torch.bool, device=codes.device)
    for code in codes.unbind(1):
        same &= code[1:] == code[:-1]
        depth[1:] += same
    return depth


def refuse_duplicates(order: Tensor, depth: Tensor, levels: int) -> None:
    again = (depth == levels).nonzero()[:, 0]
    if again.numel():
        raise DuplicateCodes(list(zip(order[again - 1].tolist(), order[again].tolist(), strict=True)))


def _dtype_problem(arrays: TrieArrays) -> str:
    if not 1 <= arrays.codebook_size <= MAX_CODEBOOK_SIZE:
        return f"codebook_size is {arrays.codebook_size}"
    if not 1 <= arrays.levels <= MAX_LEVELS:
        return f"levels is {arrays.levels}"
    wanted = {"code": code_dtype(arrays.codebook_size), "first_child": torch.int64, "rows": torch.int32}
    for name, dtype in wanted.items():
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
        return "first_child does not rise from 1 to the number of nodes"
    code = arrays.code.long()
    if int(code.min()) < 0 or int(code.max()) >= arrays.codebook_size:
        return f"a code lies outside 0 to {arrays.codebook_size - 1}"
    rises = torch.ones(arrays.num_nodes, dtype=torch.bool)
    rises[2:] = code.diff() > 0  # is node c's code above its left neighbour's?
    rises[first[:-1]] = True  # a first child has no left sibling
    return "" if bool(rises.all()) else "the codes of some siblings do not rise"


def _level_problem(arrays: TrieArrays) -> str:
    begin = 0
    for _ in range(arrays.levels):
        if begin >= arrays.num_inner:
            return f"the levels end before level {arrays.levels}"
        begin = int(at(arrays.first_child, torch.tensor(begin)))
    return "" if begin == arrays.num_inner else f"the items are not on level {arrays.levels}"
