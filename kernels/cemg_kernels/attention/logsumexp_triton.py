"""The Triton kernel of ``row_logsumexp``: one program per row, which reads each logit once."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import AotCase, powers_of_two
from ..runtime.dispatch import on_its_gpu
from ..runtime.triton_math import zero_if_neg_inf

DTYPES = ("fp32", "bf16", "fp16")
MIN_BLOCK, MAX_BLOCK = 512, 8192  # columns per iteration


# R=50 V=33k fp32: reads 6.6 MB, 2 us, from the L2 cache, where the preceding matrix product left them.
@triton.jit
def logsumexp_kernel(logits_ptr, out_ptr, stride_row, V, BLOCK: tl.constexpr):
    """Each lane computes a maximum and a sum; they are combined at the end."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    highest, sums = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    has_nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, V, BLOCK):
        inside = first + at < V
        x = tl.load(logits_ptr + row * stride_row + first + at, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(highest, x)
        base = zero_if_neg_inf(higher)
        sums = sums * tl.exp(highest - base) + tl.exp(x - base)
        highest, has_nan = higher, has_nan | (x != x).to(tl.int32)
    top = tl.max(highest, 0)
    total = tl.log(tl.sum(sums * tl.exp(highest - zero_if_neg_inf(top)), 0))
    total = tl.where(top == float("inf"), top, zero_if_neg_inf(top) + total)
    tl.store(out_ptr + row, tl.where(tl.max(has_nan, 0) > 0, float("nan"), total))


@on_its_gpu
def logsumexp(logits: Tensor) -> Tensor:
    """Computes the log-sum-exp float32 [R] of checked logits [R, V]."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    out = torch.empty(rows, device=logits.device)
    block = block_of(columns)
    logsumexp_kernel[(rows,)](
        logits, out, logits.stride(0), columns, BLOCK=block, num_warps=warps_of(block)
    )  # fmt: skip
    return out


def block_of(columns: int) -> int:
    """Returns the number of columns per iteration for V = ``columns``."""
    block: int = triton.next_power_of_2(columns)
    return min(MAX_BLOCK, max(MIN_BLOCK, block))


def warps_of(block: int) -> int:
    """Returns the warps per program: 16 columns per thread."""
    return block // 512


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns the cases of each dtype: for every class of vocabulary sizes, or the largest."""
    blocks = [block for block in powers_of_two(MAX_BLOCK) if block >= MIN_BLOCK] if every else [MAX_BLOCK]
    return [_case(*choice) for choice in product(DTYPES, blocks)]


def _case(dtype: str, block: int) -> AotCase:
    types = {"logits_ptr": f"*{dtype}", "out_ptr": "*fp32", "stride_row": "i32", "V": "i32",
             "BLOCK": "constexpr"}  # fmt: skip
    return AotCase(f"row_logsumexp {dtype} at once {block}", logsumexp_kernel, types, {"BLOCK": block},
                   {"num_warps": warps_of(block)}, ["logits_ptr", "out_ptr"])  # fmt: skip
