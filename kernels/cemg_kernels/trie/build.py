"""Builds the trie's arrays from codes; the reference and the native backend.

N items, L levels, K codes per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import native, pick
from ..runtime.ranges import named_range
from ..runtime.registry import register
from .arrays import (
    MAX_CODEBOOK_SIZE,
    MAX_LEVELS,
    MAX_NODES,
    DuplicateCodes,
    TrieArrays,
    check_distinct,
    check_nodes,
    code_dtype,
    sorted_order,
)
from .packed import pack


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raises ValueError if ``codes`` [N, L] are not integers from 0 to ``codebook_size - 1``."""
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
    """Builds the arrays from checked codes, on the device of the codes.

    Args:
        codes: Integers [N, L].
        codebook_size: K.
        backend: "triton", "native", "reference", or None for the dispatcher's choice.

    Raises:
        DuplicateCodes: Two rows are equal.
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
    """The definition: sorts the rows and starts a node where the leading codes change from rank to rank."""
    num_items, levels = codes.shape
    order = sorted_order(codes, codebook_size)  # [N]
    codes = codes[order]
    depth = _shared_depth(codes)  # [N], leading codes shared with the previous rank
    check_distinct(order, depth, levels)
    starts = [depth <= m for m in range(levels)]  # [N] bool: does a node of level m + 1 start here?
    code = torch.cat([codes[s, m] for m, s in enumerate(starts)])
    counts = [0, *(int(s.sum()) for s in starts)]
    begin = 1 + torch.tensor(counts, device=codes.device).cumsum(0)  # first nodes of levels 1, 2, ...
    check_nodes(int(begin[-1]), num_items)
    first_child = [begin[:1]]
    for m in range(levels - 1):
        index = starts[m + 1].cumsum(0) - 1  # position of each rank's node within level m + 2
        first_child.append(begin[m + 1] + index[starts[m]])
    first_child.append(begin[-1:])
    return TrieArrays(
        code.to(code_dtype(codebook_size)),
        pack(torch.cat(first_child)),
        order.to(torch.int32),
        levels,
        codebook_size,
    )


def _build_native(codes: Tensor, codebook_size: int) -> TrieArrays:
    num_items, levels = codes.shape
    if codes.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        codes = codes.to(torch.int32)
    builder = native().TrieBuilder(
        codes=codes.data_ptr(), code_bytes=codes.element_size(), rows=num_items, levels=levels,
        codebook_size=codebook_size,
    )  # fmt: skip
    if builder.duplicates:
        raise DuplicateCodes(builder.duplicates)
    code = torch.empty(builder.num_nodes - 1, dtype=code_dtype(codebook_size))
    rows = torch.empty(num_items, dtype=torch.int32)
    words = builder.write(code=code.data_ptr(), code_bytes=code.element_size(), rows=rows.data_ptr())
    first_child = torch.empty(words.size, dtype=torch.int64)
    words.copy_to(first_child.data_ptr())
    return TrieArrays(code, first_child, rows, levels, codebook_size)


def _check_range(codes: Tensor, codebook_size: int) -> None:
    lowest, highest = map(int, codes.aminmax())
    if lowest < 0 or highest >= codebook_size:
        row, level = ((codes < 0) | (codes >= codebook_size)).nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has code {int(codes[row, level])} on level {level}; "
            f"codes are 0 to {codebook_size - 1}: raise codebook_size or correct the codes"
        )


def _shared_depth(codes: Tensor) -> Tensor:
    depth = torch.zeros(codes.shape[0], dtype=torch.int16, device=codes.device)
    same = torch.ones(codes.shape[0] - 1, dtype=torch.bool, device=codes.device)
    for code in codes.unbind(1):
        same &= code[1:] == code[:-1]
        depth[1:] += same
    return depth


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .build_triton import aot_cases

    return aot_cases(every)


register("trie_build", ("triton", "native", "reference"), aot_cases=_aot_cases)
