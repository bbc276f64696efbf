"""Attention of each beam over its own tokens; an ancestor table locates their keys and values in the cache.

Reordering beams then only rewrites the table; no keys or values are copied.
R beams, T tokens per beam, H query heads over G key-value heads of dimension Dh, N rows in the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import TRITON_DTYPES, pick
from ..runtime.ranges import ranged
from ..runtime.registry import register


@ranged
def beam_tree_attention(
    query: Tensor, cache: Tensor, ancestors: Tensor, scale: float = 1.0, bias: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Computes softmax(scale * query . keys + bias) . values over the tokens of each beam.

    There is no gradient.

    Args:
        query: [R, H, Dh].
        cache: [N, 2, G, Dh], the keys and values of all generated tokens.
        ancestors: int64 [T, R], the row of ``cache`` that holds token t of each beam.
        scale: The factor of the scores.
        bias: [T, H], added to the scores, such as a relative position bias.
        prefix: The result of attention over other keys, to be merged: its output [R, H, Dh] and the
            log-sum-exp of its scores, float32 [R, H]. ``shared_prefix_attention`` returns such a pair.
        backend: "triton", "reference", or None for the dispatcher's choice.

    Returns:
        [R, H * Dh] in the dtype of ``query``.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(query, cache, ancestors, bias, prefix)
    if pick("beam_tree_attention", query.device, backend) == "triton" and query.dtype in TRITON_DTYPES:
        from .beam_tree_triton import attend

        return attend(query, cache, ancestors, scale, bias, prefix)
    return beam_tree_attention_reference(query, cache, ancestors, scale, bias, prefix)


def beam_tree_attention_reference(
    query: Tensor, cache: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """The definition: the dtype of ``query``, with a float32 softmax."""
    keys, values = cache[ancestors.t()].unbind(2)  # each [R, T, G, Dh]
    grouped = query.unflatten(1, (keys.shape[2], -1))[:, None]  # [R, 1, G, H / G, Dh]
    scores = (grouped * keys[:, :, :, None]).sum(-1).flatten(2)  # [R, T, H]
    scores = scores if scale == 1.0 else scores * scale
    scores = scores if bias is None else scores + bias
    scores = scores if scores.dtype is torch.float64 else scores.float()
    if prefix is not None:
        scores = torch.cat((scores, prefix[1][:, None]), dim=1)  # [R, T + 1, H]
    weights = scores.softmax(1).to(query.dtype)
    grouped_weights = weights[:, : len(ancestors)].unflatten(2, (keys.shape[2], -1))  # [R, T, G, H / G]
    out: Tensor = (grouped_weights[..., None] * values[:, :, :, None]).sum(1).flatten(1, 2)  # [R, H, Dh]
    if prefix is not None:
        out = out + weights[:, -1, :, None] * prefix[0]
    return out.flatten(1)


def _check(
    query: Tensor, cache: Tensor, ancestors: Tensor, bias: Tensor | None, prefix: tuple[Tensor, Tensor] | None
) -> None:
    rows, count, dim = query.shape
    if cache.ndim != 4 or cache.shape[1] != 2 or cache.shape[3] != dim or count % cache.shape[2]:
        raise ValueError(
            f"cache must be [N, 2, G, {dim}] with G a divisor of {count}, got {list(cache.shape)}"
        )
    if ancestors.ndim != 2 or ancestors.shape[1] != rows or not len(ancestors):
        raise ValueError(f"ancestors must be [T, {rows}] with T of at least 1, got {list(ancestors.shape)}")
    if bias is not None and bias.shape != (len(ancestors), count):
        raise ValueError(f"bias must be {[len(ancestors), count]}, got {list(bias.shape)}")
    if prefix is not None and (prefix[0].shape != query.shape or prefix[1].shape != (rows, count)):
        raise ValueError(f"prefix must be {list(query.shape)} and {[rows, count]}, got "
                         f"{list(prefix[0].shape)} and {list(prefix[1].shape)}")  # fmt: skip


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .beam_tree_triton import aot_cases

    return aot_cases(every)


register("beam_tree_attention", ("triton", "reference"), aot_cases=_aot_cases)
