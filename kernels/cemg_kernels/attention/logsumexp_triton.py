# mypy: disable-error-code="no-untyped-def"
"""``row_logsumexp`` in one launch: a program a row, which it reads once, whatever its dtype."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot import AotCase, powers_of_two
from ..runtime.dispatch import on_its_gpu
from ..trie.filter_triton import finite

DTYPES = ("fp32", "bf16", "fp16")
MIN_BLOCK, MAX_BLOCK = 512, 8192  # columns at a time


# R=50 V=33k fp32: reads 6.6 MB from the L2 cache, where the product before left them: 2 us.
@triton.jit
def logsumexp_kernel(logits_ptr, out_ptr, stride_row, V, BLOCK: tl.constexpr):
    """Each lane keeps a maximum and a sum, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    highest, sums = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    odd = tl.zeros([BLOCK], tl.int32)  # lanes that met NaN
    for first in range(0, V, BLOCK):
        inside = first + at < V
        x = tl.load(logits_ptr + row * stride_row + first + at, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(highest, x)
        base = finite(higher)
        sums = sums * tl.exp(highest - base) + tl.exp(x - base)
        highest, odd = higher, odd | (x != x).to(tl.int32)
    top = tl.max(highest, 0)
    total = tl.log(tl.sum(sums * tl.exp(highest - finite(top)), 0))
    total = tl.where(top == float("inf"), top, finite(top) + total)
    tl.store(out_ptr + row, tl.where(tl.max(odd, 0) > 0, float("nan"), total))


@on_its_gpu
def logsumexp(logits: Tensor) -> Tensor:
    """Of checked logits [R, V]."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    out = torch.empty(rows, device=logits.device)
    block = block_of(columns)
    logsumexp_kernel[(rows,)](
        logits, out, logits.stride(0), columns, BLOCK=block, num_warps=warps_of(block)
    )  # fmt: skip
    return out


def block_of(columns: int) -> int:
    return min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(columns)))


def warps_of(block: int) -> int:
    return block // 512


def aot_cases(every: bool = False) -> list[AotCase]:
    """The dtypes, of every class of vocabularies or the largest."""
    blocks = [block for block in powers_of_two(MAX_BLOCK) if block >= MIN_BLOCK] if every else [MAX_BLOCK]
    return [_case(*choice) for choice in product(DTYPES, blocks)]


def _case(dtype: str, block: int) -> AotCase:
    types = {"logits_ptr": f"*{dtype}", "out_ptr": "*fp32", "stride_row": "i32", "V": "i32",
             "BLOCK": "constexpr"}  # fmt: skip
    return AotCase(f"row_logsumexp {dtype} at once {block}", logsumexp_kernel, types, {"BLOCK": block},
                   {"num_warps": warps_of(block)}, ["logits_ptr", "out_ptr"])  # fmt: skip
