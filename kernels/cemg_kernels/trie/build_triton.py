"""Builds the trie's arrays on a GPU: torch sorts the rows, two kernels write all levels, torch packs them.

N items, L levels. A program processes a block of ranks. The first kernel compares each rank with the previous
one and counts the nodes that start in its block, per level. The sums over the blocks give the first node of
each block on each level. With these, the second kernel writes the code and first child of every node in one
pass. The definition is ``build_reference`` (``build.py``).
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import on_its_gpu
from .arrays import TrieArrays, check_distinct, check_nodes, code_dtype, sorted_order
from .packed import pack

BLOCK = 1024
DTYPES = ("u8", "i8", "i16", "i32", "i64")


# N=1e8 L=4 int64: reads 6.4 GB of codes by row and 1.6 GB of order, writes 0.1 GB.
@triton.jit
def depth_kernel(
    codes_ptr, order_ptr, depth_ptr, counts_ptr, N, L, stride_codes, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the number of leading codes that each rank shares with the previous one.

    counts_ptr is int32 [blocks, L + 1]: the ranks that start a node on level 1, 2, ..., and the ranks whose
    codes equal those of the previous rank.
    """
    block = tl.program_id(0).to(tl.int64)
    rank = block * BLOCK + tl.arange(0, BLOCK)
    live = rank < N
    same = live & (rank > 0)
    row = tl.load(order_ptr + rank, mask=live, other=0)
    row_before = tl.load(order_ptr + rank - 1, mask=same, other=0)
    depth = tl.zeros([BLOCK], tl.int32)
    counts_ptr += block * (L + 1)
    for m in range(L):
        code = tl.load(codes_ptr + row * stride_codes + m, mask=same, other=0)
        code_before = tl.load(codes_ptr + row_before * stride_codes + m, mask=same, other=0)
        same = same & (code == code_before)
        depth += same.to(tl.int32)
        tl.store(counts_ptr + m, tl.sum((live & ~same).to(tl.int32), 0))
    tl.store(counts_ptr + L, tl.sum(same.to(tl.int32), 0))
    tl.store(depth_ptr + rank, depth.to(tl.uint8), mask=live)


# N=1e8 L=4 int64: reads 3.2 GB of codes, 0.8 GB of order and 0.1 GB of depth; writes 6 bytes per item, before
# packing.
@triton.jit
def write_kernel(
    codes_ptr, order_ptr, depth_ptr, first_ptr, code_ptr, first_child_ptr, N, L, stride_codes,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes codes and first children of the nodes of a block; first_ptr is [blocks, L], its first nodes."""
    block = tl.program_id(0).to(tl.int64)
    rank = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(order_ptr + rank, mask=rank < N, other=0)
    depth = tl.load(depth_ptr + rank, mask=rank < N, other=255).to(tl.int32)
    parent, parent_starts = tl.zeros([BLOCK], tl.int32), rank == 0
    for m in range(L):
        starts = (rank < N) & (depth <= m)
        node = tl.load(first_ptr + block * L + m) + tl.cumsum(starts.to(tl.int32), 0) - 1
        code = tl.load(codes_ptr + row * stride_codes + m, mask=starts, other=0)
        tl.store(code_ptr + node - 1, code.to(code_ptr.dtype.element_ty), mask=starts)
        # a node and its first child start at the same rank
        tl.store(first_child_ptr + parent, node, mask=parent_starts)
        parent, parent_starts = node, starts


@on_its_gpu
def build(codes: Tensor, codebook_size: int) -> TrieArrays:
    """Builds the arrays of checked ``codes`` [N, L] on their device; raises DuplicateCodes for equal rows."""
    (num_items, levels), device = codes.shape, codes.device
    codes = codes.contiguous()
    order = sorted_order(codes, codebook_size)
    blocks = triton.cdiv(num_items, BLOCK)
    depth = torch.empty(num_items, dtype=torch.uint8, device=device)
    counts = torch.empty(blocks, levels + 1, dtype=torch.int32, device=device)
    sizes = num_items, levels, codes.stride(0)
    depth_kernel[(blocks,)](codes, order, depth, counts, *sizes, BLOCK=BLOCK)
    ends = counts.cumsum(0)  # [blocks, L + 1] int64
    *nodes, duplicates = ends[-1].tolist()  # synchronizes with the GPU, as ``pack`` does once
    if duplicates:
        check_distinct(order, depth, levels)
    num_nodes = 1 + sum(nodes)
    check_nodes(num_nodes, num_items)
    begin = torch.tensor([1, *nodes[:-1]]).cumsum(0).to(device)  # [L], first nodes of levels 1, 2, ...
    first = ((ends - counts)[:, :levels] + begin).to(torch.int32).contiguous()
    code = torch.empty(num_nodes - 1, dtype=code_dtype(codebook_size), device=device)
    first_child = torch.empty(num_nodes - num_items + 1, dtype=torch.int32, device=device)
    first_child[-1] = num_nodes
    write_kernel[(blocks,)](codes, order, depth, first, code, first_child, *sizes, BLOCK=BLOCK)
    return TrieArrays(code, pack(first_child), order.to(torch.int32), levels, codebook_size)


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns cases for the dtypes of the input codes and the two dtypes of the stored codes."""
    dtypes = DTYPES if every else ("u8", "i64")
    cases = [_case(depth_kernel, codes, {"counts_ptr": "*i32"}) for codes in dtypes]
    for codes, written in product(dtypes, ("u8", "i16")):
        arrays = {"first_ptr": "*i32", "code_ptr": f"*{written}", "first_child_ptr": "*i32"}
        cases.append(_case(write_kernel, codes, arrays))
    return cases


def _case(kernel, codes: str, arrays: dict[str, str]) -> AotCase:
    types = {"codes_ptr": f"*{codes}", "order_ptr": "*i64", "depth_ptr": "*u8", **arrays}
    pointers = list(types)
    types |= {"N": "i32", "L": "i32", "stride_codes": "i32", "BLOCK": "constexpr"}
    name = f"trie_build {kernel.__name__} codes {codes}"
    name += f" as {arrays['code_ptr'][1:]}" if "code_ptr" in arrays else ""
    return AotCase(name, kernel, types, {"BLOCK": BLOCK}, {}, pointers)
