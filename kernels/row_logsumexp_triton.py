# mypy: disable-error-code="no-untyped-def"
"""``row_logsumexp`` in one launch: a program a row, which it reads once, whatever its dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase, powers_of_two
from .trie_filter_triton import finite

DTYPES = ("fp32", "bf16", "fp16")
MOST_AT_ONCE = 8192  # columns


# R=50 V=33k fp32: reads 6.6 MB from the second cache, where the product before left them: 2 us.
@triton.jit
def logsumexp_kernel(logits_ptr, out_ptr, stride_row, V, BLOCK: tl.constexpr):
    """Each lane keeps a maximum and a sum, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    highest, sums = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        inside = first + at < V
        x = tl.load(logits_ptr + row * stride_row + first + at, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(highest, x)
        base = finite(higher)
        sums = sums * tl.exp(highest - base) + tl.exp(x - base)
        highest = higher
    top = tl.max(highest, 0)
    total = tl.log(tl.sum(sums * tl.exp(highest - finite(top)), 0))
    tl.store(out_ptr + row, tl.where(top == float("inf"), top, finite(top) + total))


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
    return min(MOST_AT_ONCE, triton.next_power_of_2(columns))


def warps_of(block: int) -> int:
    return min(16, max(1, block // 512))


def aot_cases(every: bool = False) -> list[AotCase]:
    """The dtypes, of every class of vocabularies or the largest."""
    return [
        _case(dtype, block)
        for dtype in DTYPES
        for block in (powers_of_two(MOST_AT_ONCE) if every else [MOST_AT_ONCE])
    ]


def _case(dtype: str, block: int) -> AotCase:
    types = {"logits_ptr": f"*{dtype}", "out_ptr": "*fp32", "stride_row": "i32", "V": "i32",
             "BLOCK": "constexpr"}  # fmt: skip
    return AotCase(f"row_logsumexp {dtype} at once {block}", logsumexp_kernel, types, {"BLOCK": block},
                   {"num_warps": warps_of(block)}, ["logits_ptr", "out_ptr"])  # fmt: skip
