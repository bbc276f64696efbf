"""The Triton kernel of ``beam_tree_attention``: one program per beam and head, with an online softmax.

The definition is ``beam_tree_attention_reference`` (``beam_tree.py``). The kernel computes in float32.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import AotCase, powers_of_two
from ..runtime.dispatch import on_its_gpu

DTYPES = ("fp32", "bf16", "fp16")
MAX_HEAD_DIM = 256  # of the cases compiled ahead of time


# R=50 H=8 Dh=64 T=3 fp32: reads 0.4 MB of queries, keys and values from the L2 cache, writes 0.1 MB.
@triton.jit
def attention_kernel(
    query_ptr, cache_ptr, ancestors_ptr, bias_ptr, prefix_ptr, lse_ptr, out_ptr, scale, R, T, H, G, D,
    stride_query, stride_head, stride_cache, HAS_BIAS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_ptr is [R, H, D] in the dtype of query_ptr; each row of cache_ptr is a dense [2, G, D]."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    d = tl.arange(0, BLOCK_D)
    live = d < D
    query = tl.load(query_ptr + row * stride_query + head * stride_head + d, mask=live, other=0)
    query = query.to(tl.float32) * scale
    cache_ptr += head // (H // G) * D + d
    highest, total = float("-inf"), 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    if HAS_PREFIX:  # acts as one key whose score is the log-sum-exp of the prefix
        highest, total = tl.load(lse_ptr + program), 1.0
        out = tl.load(prefix_ptr + program * D + d, mask=live, other=0).to(tl.float32)
    for t in range(T):
        token_ptr = cache_ptr + tl.load(ancestors_ptr + t * R + row) * stride_cache
        score = tl.sum(query * tl.load(token_ptr, mask=live, other=0).to(tl.float32), 0)
        if HAS_BIAS:
            score += tl.load(bias_ptr + t * H + head).to(tl.float32)
        above = tl.maximum(highest, score)
        shrink, weight = tl.exp(highest - above), tl.exp(score - above)
        out = out * shrink + weight * tl.load(token_ptr + G * D, mask=live, other=0).to(tl.float32)
        total, highest = total * shrink + weight, above
    tl.store(out_ptr + program * D + d, (out / total).to(out_ptr.dtype.element_ty), mask=live)


@on_its_gpu
def attend(
    query: Tensor, cache: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Runs the kernel on checked tensors."""
    rows, heads, dim = query.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    if cache.stride()[1:] != (cache.shape[2] * dim, dim, 1):
        cache = cache.contiguous()
    out = torch.empty(rows, heads * dim, dtype=query.dtype, device=query.device)
    prefix_out, lse = (out, out) if prefix is None else (prefix[0].contiguous(), prefix[1].contiguous())
    attention_kernel[(rows * heads,)](
        query, cache, ancestors.contiguous(), out if bias is None else bias.contiguous(), prefix_out, lse,
        out, float(scale), rows, len(ancestors), heads, cache.shape[2], dim, query.stride(0), query.stride(1),
        cache.stride(0), HAS_BIAS=bias is not None, HAS_PREFIX=prefix is not None,
        BLOCK_D=triton.next_power_of_2(dim), num_warps=1 if dim <= 64 else 4,
    )  # fmt: skip
    return out


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns the cases of each dtype, with and without bias and prefix, for all head dimensions or two."""
    dims = powers_of_two(MAX_HEAD_DIM) if every else [64, MAX_HEAD_DIM]
    return [_case(*axes) for axes in product(DTYPES, (False, True), (False, True), dims)]


def _case(dtype: str, bias: bool, prefix: bool, dim: int) -> AotCase:
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("query", "cache")} | {"ancestors_ptr": "*i64"}
    pointers |= {f"{name}_ptr": f"*{dtype}" for name in ("bias", "prefix")}
    pointers |= {"lse_ptr": "*fp32" if prefix else f"*{dtype}", "out_ptr": f"*{dtype}"}
    sizes = ("R", "T", "H", "G", "D", "stride_query", "stride_head", "stride_cache")
    flags = {"HAS_BIAS": bias, "HAS_PREFIX": prefix, "BLOCK_D": dim}
    types = pointers | {"scale": "fp32"} | dict.fromkeys(sizes, "i32") | dict.fromkeys(flags, "constexpr")
    name = f"beam_tree_attention {dtype} Dh {dim}{' bias' * bias}{' prefix' * prefix}"
    return AotCase(name, attention_kernel, types, flags, {"num_warps": 1 if dim <= 64 else 4}, list(pointers))
