"""The Triton kernel of ``shared_prefix_attention``: one program per tile of beams and heads that share keys.

The softmax is online. The definition is ``shared_prefix_attention_reference`` (``shared_prefix.py``). Sums
are float32.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import MAX_REGISTERS, AotCase, powers_of_two
from ..runtime.dispatch import on_its_gpu
from ..runtime.triton_math import zero_if_neg_inf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_HEAD_DIM = 128
QUERIES = 16  # per program; a matrix product needs at least 16 rows


# B=1 W=50 H=8 Dh=64 S=80 fp32: reads 0.4 MB, each key by four programs; 8 MFLOP. Bound by latency.
@triton.jit
def shared_prefix_kernel(
    query_ptr, keys_ptr, values_ptr, mask_ptr, out_ptr, lse_ptr, scale, W, H, G, S, D,
    query_user, query_beam, query_head, keys_user, keys_head, keys_position, values_user, values_head,
    values_position, mask_user, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_ptr is [B, W, H, D] in the dtype of query_ptr; the last dimension of each operand is dense."""
    user, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shared = H // G
    index = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = index < W * shared
    beam, head = index // shared, group * shared + index % shared
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < D)[None, :]
    offset = beam[:, None].to(tl.int64) * query_beam + head[:, None] * query_head + d[None, :]
    query = tl.load(query_ptr + user * query_user + offset, mask=inside, other=0).to(tl.float32)
    keys_ptr += user * keys_user + group * keys_head
    values_ptr += user * values_user + group * values_head
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        exists = (s < S)[:, None] & (d < D)[None, :]
        keys = tl.load(keys_ptr + s[:, None] * keys_position + d[None, :], mask=exists, other=0).to(
            tl.float32
        )
        bias = tl.load(mask_ptr + user * mask_user + s, mask=s < S, other=0).to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale + bias[None, :]
        scores = tl.where((s < S)[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        base = zero_if_neg_inf(above)  # all positions so far may be masked
        shrink, weight = tl.exp(highest - base), tl.exp(scores - base[:, None])
        values = tl.load(values_ptr + s[:, None] * values_position + d[None, :], mask=exists, other=0)
        values = values.to(tl.float32)
        out = tl.dot(weight, values, out * shrink[:, None], input_precision=PRECISION)
        total, highest = total * shrink + tl.sum(weight, 1), above
    row = (user * W + beam) * H + head
    out = out / total[:, None]
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row, highest + tl.log(total), mask=live)


@on_its_gpu
def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Runs the kernel on checked tensors."""
    users, beams, heads, dim = query.shape
    query, keys, values, mask = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, keys, values, mask)
    )
    out = torch.empty(users, beams, heads, dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(users, beams, heads, device=query.device)
    groups, positions = keys.shape[1:3]
    grid = (users, groups, triton.cdiv(beams * (heads // groups), QUERIES))
    if users and beams:
        shared_prefix_kernel[grid](
            query, keys, values, mask, out, lse, float(scale), beams, heads, groups, positions, dim,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], mask.stride(0),
            **constants_of(dim, query.dtype), num_warps=warps_of(dim), maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return out, lse


def constants_of(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the constexprs for heads of dimension ``dim``.

    A matrix product needs at least 16 columns. TF32 represents bfloat16 and float16 exactly. For float32,
    three products of TF32 parts drop only the 22nd bit and those after it.
    """
    block = max(16, triton.next_power_of_2(dim))
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    return {"PRECISION": precision, "BLOCK_Q": QUERIES, "BLOCK_S": 32, "BLOCK_D": block}


def warps_of(dim: int) -> int:
    """Returns the warps per program for heads of dimension ``dim``."""
    return 4 if dim < 64 else 8


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns the cases of each dtype, for all head dimensions or two."""
    dims = powers_of_two(MAX_HEAD_DIM)[4:] if every else [64, MAX_HEAD_DIM]
    return [_case(*axes) for axes in product(DTYPES, dims)]


def _case(dtype: str, dim: int) -> AotCase:
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("query", "keys", "values", "mask", "out")}
    pointers |= {"lse_ptr": "*fp32"}
    constants = constants_of(dim, DTYPES[dtype])
    sizes = shared_prefix_kernel.arg_names[len(pointers) + 1 : -len(constants)]
    types = pointers | {"scale": "fp32"} | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    return AotCase(f"shared_prefix_attention {dtype} Dh {dim}", shared_prefix_kernel, types, constants,
                   {"num_warps": warps_of(dim), "maxnreg": MAX_REGISTERS}, list(pointers))  # fmt: skip
