"""The Triton kernel of ``trie_softmax``; the definition is ``masked_log_prob`` (``softmax.py``).

R rows, K codes per level.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import MAX_REGISTERS, AotCase, pairwise, powers_of_two
from ..runtime.dispatch import on_its_gpu
from ..runtime.triton_math import sanitize, zero_if_neg_inf
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import FilterTensors
from ..trie.filter_triton import allowed, child_range, filter_kinds, filter_operands, filter_types

MAX_CODES = 4096  # of the cases compiled ahead of time; the kernel takes any number
MIN_SOFTMAX_BLOCK, SOFTMAX_BLOCK = 32, 512
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NORMALIZATIONS, BITMAP_KINDS, CLOSED_KINDS = range(3), range(3), (False, True)


# R=400 K=256 fp32, all children: reads 0.4 MB of logits and 0.1 MB of codes, writes 0.4 MB: 0.2 us at 4.8
# TB/s.
@triton.jit
def softmax_kernel(
    logits_ptr, logsumexp_ptr, nodes_ptr, code_ptr, first_child_ptr, out_ptr,
    open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps, rows_per_request,
    stride_logits, K, num_inner,
    NORMALIZE: tl.constexpr, BITMAPS: tl.constexpr, CLOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: computes the log-sum-exp, writes -inf to all codes, then the log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    out_ptr += row * K
    node = tl.load(nodes_ptr + row)
    inner = (node >= 0) & (node < num_inner)
    begin, end = child_range(first_child_ptr, node, inner)
    if NORMALIZE == 0:
        total = sanitize(tl.load(logsumexp_ptr + row))
    else:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)  # per lane; reduced once at the end
        sums = tl.zeros([BLOCK], tl.float32)
        low, high = (begin, end) if NORMALIZE == 2 else (begin * 0, begin * 0 + K)
        for first in range(low, high, BLOCK):
            at = first + tl.arange(0, BLOCK)
            live = at < high
            if NORMALIZE == 2:
                code = tl.load(code_ptr + at - 1, mask=live, other=0).to(tl.int32)
                live = allowed(at, live, row, open_ptr, filter_of_ptr, closed_ptr, words, max_closed,
                               steps, rows_per_request, BITMAPS, CLOSED)  # fmt: skip
            else:
                code = at
            x = sanitize(tl.load(logits_ptr + code, mask=live, other=float("-inf")))
            higher = tl.maximum(highest, x)
            base = zero_if_neg_inf(higher)
            sums = sums * tl.exp(highest - base) + tl.exp(x - base)
            highest = higher
        top = tl.max(highest, 0)
        total = tl.sum(sums * tl.exp(highest - zero_if_neg_inf(top)), 0)
        total = top + tl.log(tl.where(top == float("-inf"), 1.0, total))
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + k, tl.full([BLOCK], float("-inf"), tl.float32), mask=k < K)
    tl.debug_barrier()  # the stores below overwrite some of these
    end = tl.where(total == float("-inf"), begin, end)
    for first in range(begin, end, BLOCK):
        child = first + tl.arange(0, BLOCK)
        live = child < end
        live = allowed(child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps,
                       rows_per_request, BITMAPS, CLOSED)  # fmt: skip
        code = tl.load(code_ptr + child - 1, mask=live, other=0).to(tl.int32)
        x = sanitize(tl.load(logits_ptr + code, mask=live, other=float("-inf")))
        tl.store(out_ptr + code, tl.minimum(x - zero_if_neg_inf(total), 0.0), mask=live)


@on_its_gpu
def softmax(
    logits: Tensor, nodes: Tensor, trie: TrieArrays, normalize: int, logsumexp: Tensor | None,
    filter: FilterTensors | None,
) -> Tensor:  # fmt: skip
    """Computes log-probabilities float32 [R, K] of checked ``logits`` [R, K] at ``nodes`` int32 [R]."""
    logits = readable_logits(logits)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    rows, size = logits.shape
    if rows:
        softmax_kernel[(rows,)](
            logits, logsumexp_pointer(logits, logsumexp), nodes, trie.code, trie.first_child, out,
            *filter_operands(filter, trie, rows), logits.stride(0), size, trie.num_inner,
            NORMALIZE=normalize, **filter_kinds(filter), BLOCK=softmax_block(size), num_warps=4,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return out


def softmax_block(size: int) -> int:
    """Returns the number of codes that a program reads at a time, for K = ``size``."""
    block: int = triton.next_power_of_2(size)
    return min(SOFTMAX_BLOCK, max(MIN_SOFTMAX_BLOCK, block))


def readable_logits(logits: Tensor) -> Tensor:
    """Returns logits in a dtype that the kernels read, with a dense last dimension."""
    logits = logits if logits.dtype in DTYPES else logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def logsumexp_pointer(logits: Tensor, logsumexp: Tensor | None) -> Tensor:
    """Returns the kernel's logsumexp argument; an unused placeholder if there is none."""
    return logits if logsumexp is None else logsumexp.float().contiguous()


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns cases in which any two of block, normalisation, dtype and filter occur together, or all."""
    axes = NORMALIZATIONS, tuple(DTYPES.values()), BITMAP_KINDS, CLOSED_KINDS
    if not every:
        return [_softmax_case(*choice) for choice in pairwise((1, 256, SOFTMAX_BLOCK), *axes)]
    blocks = sorted({softmax_block(size) for size in powers_of_two(MAX_CODES)})
    return [_softmax_case(*choice) for choice in product(blocks, *axes)]


def code_type(size: int) -> str:
    return "*u8" if size <= 256 else "*i16"


def case_name(normalize: int, dtype: str, bitmaps: int, closed: bool) -> str:
    filters = ("", " bitmap", " bitmaps")[bitmaps] + (" closed" if closed else "")
    return f"{('vocab', 'level', 'valid')[normalize]} {dtype}{filters}"


def kernel_case(
    name: str, kernel, types: dict[str, str], constants: dict[str, int], warps: int, **options: int | None
) -> AotCase:
    pointers = [argument for argument in types if argument.endswith("_ptr")]
    types = types | dict.fromkeys(constants, "constexpr")
    return AotCase(name, kernel, types, constants, {"num_warps": warps, **options}, pointers)


def _softmax_case(size: int, normalize: int, dtype: str, bitmaps: int, closed: bool) -> AotCase:
    types = {
        "logits_ptr": f"*{dtype}", "logsumexp_ptr": f"*{dtype if normalize else 'fp32'}", "nodes_ptr": "*i32",
        "code_ptr": code_type(size), "first_child_ptr": "*i64", "out_ptr": "*fp32",
        **filter_types(), "stride_logits": "i32", "K": "i32", "num_inner": "i32",
    }  # fmt: skip
    constants = {"NORMALIZE": normalize, "BITMAPS": bitmaps, "CLOSED": closed,
                 "BLOCK": softmax_block(size)}  # fmt: skip
    name = f"trie_softmax K={size} {case_name(normalize, dtype, bitmaps, closed)}"
    return kernel_case(name, softmax_kernel, types, constants, 4, maxnreg=MAX_REGISTERS)
