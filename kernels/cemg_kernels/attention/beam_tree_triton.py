# mypy: disable-error-code="no-untyped-def"
"""``ancestor_attention`` in one launch: a program a beam and head, its softmax on the way (online).

The definition is ``attend_reference`` (``ancestor_attention.py``); between load and store all is float32.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot import AotCase, powers_of_two
from ..runtime.dispatch import on_its_gpu

DTYPES = ("fp32", "bf16", "fp16")
WIDEST = 256  # of a head in the compiled cases


# R=50 H=8 Dh=64 T=3 fp32: reads 0.4 MB of queries, keys and values from the second cache, writes 0.1 MB.
@triton.jit
def attention_kernel(
    query_ptr, kept_ptr, ancestors_ptr, bias_ptr, prefix_ptr, lse_ptr, out_ptr, scale, R, T, H, G, D,
    stride_query, stride_head, stride_kept, HAS_BIAS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_ptr [R, H, D] of query_ptr's dtype; rows of kept_ptr are [2, G, D], dense within."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    place = tl.arange(0, BLOCK_D)
    live = place < D
    query = tl.load(query_ptr + row * stride_query + head * stride_head + place, mask=live, other=0)
    query = query.to(tl.float32) * scale
    kept_ptr += head // (H // G) * D + place
    highest, total = float("-inf"), 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    if HAS_PREFIX:  # a key whose score is the log-sum-exp of many
        highest, total = tl.load(lse_ptr + program), 1.0
        out = tl.load(prefix_ptr + program * D + place, mask=live, other=0).to(tl.float32)
    for t in range(T):
        own = kept_ptr + tl.load(ancestors_ptr + t * R + row) * stride_kept
        score = tl.sum(query * tl.load(own, mask=live, other=0).to(tl.float32), 0)
        if HAS_BIAS:
            score += tl.load(bias_ptr + t * H + head).to(tl.float32)
        above = tl.maximum(highest, score)
        shrink, weight = tl.exp(highest - above), tl.exp(score - above)
        out = out * shrink + weight * tl.load(own + G * D, mask=live, other=0).to(tl.float32)
        total, highest = total * shrink + weight, above
    tl.store(out_ptr + program * D + place, (out / total).to(out_ptr.dtype.element_ty), mask=live)


@on_its_gpu
def attend(
    query: Tensor, kept: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Of checked tensors."""
    rows, heads, dim = query.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    if kept.stride()[1:] != (kept.shape[2] * dim, dim, 1):
        kept = kept.contiguous()
    out = torch.empty(rows, heads * dim, dtype=query.dtype, device=query.device)
    given, lse = (out, out) if prefix is None else (prefix[0].contiguous(), prefix[1].contiguous())
    attention_kernel[(rows * heads,)](
        query, kept, ancestors.contiguous(), out if bias is None else bias.contiguous(), given, lse, out,
        float(scale), rows, len(ancestors), heads, kept.shape[2], dim, query.stride(0), query.stride(1),
        kept.stride(0), HAS_BIAS=bias is not None, HAS_PREFIX=prefix is not None,
        BLOCK_D=triton.next_power_of_2(dim), num_warps=1 if dim <= 64 else 4,
    )  # fmt: skip
    return out


def aot_cases(every: bool = False) -> list[AotCase]:
    """The dtypes, with and without bias and prefix, of every width of a head or the widest."""
    dims = powers_of_two(WIDEST) if every else [64, WIDEST]
    return [_case(*axes) for axes in product(DTYPES, (False, True), (False, True), dims)]


def _case(dtype: str, bias: bool, prefix: bool, dim: int) -> AotCase:
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("query", "kept")} | {"ancestors_ptr": "*i64"}
    pointers |= {f"{name}_ptr": f"*{dtype}" for name in ("bias", "prefix")}
    pointers |= {"lse_ptr": "*fp32" if prefix else f"*{dtype}", "out_ptr": f"*{dtype}"}
    sizes = ("R", "T", "H", "G", "D", "stride_query", "stride_head", "stride_kept")
    flags = {"HAS_BIAS": bias, "HAS_PREFIX": prefix, "BLOCK_D": dim}
    types = pointers | {"scale": "fp32"} | dict.fromkeys(sizes, "i32") | dict.fromkeys(flags, "constexpr")
    named = f"ancestor_attention {dtype} Dh {dim}{' bias' * bias}{' prefix' * prefix}"
    return AotCase(
        named, attention_kernel, types, flags, {"num_warps": 1 if dim <= 64 else 4}, list(pointers)
    )
