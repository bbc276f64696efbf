"""Attention of beams over the few tokens they were fed, which a table of ancestors finds (DESIGN §5.3, §5.8).

R beams, T tokens fed to each, H query heads over G key-value heads of Dh, N rows of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.dispatch import TRITON_DTYPES, pick
from ..runtime.ranges import ranged


@ranged
def ancestor_attention(
    query: Tensor, kept: Tensor, ancestors: Tensor, scale: float = 1.0, bias: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Softmax of ``scale * query . keys + bias``, times the values: [R, H * Dh] in the dtype of ``query``.

    ``query`` [R, H, Dh]; ``kept`` [N, 2, G, Dh], keys and values of all that was fed; ``ancestors`` [T, R]
    int64, the row of ``kept`` that each beam has for each token; ``bias`` [T, H]. ``prefix`` is attention
    over more keys, done already: what it gave [R, H, Dh] and the log-sum-exp [R, H] float32 of its scores.
    No gradient. Raises ValueError where shapes do not fit.
    """
    _check(query, kept, ancestors, bias, prefix)
    if pick("ancestor_attention", query.device, backend) == "triton" and query.dtype in TRITON_DTYPES:
        from .beam_tree_triton import attend

        return attend(query, kept, ancestors, scale, bias, prefix)
    return attend_reference(query, kept, ancestors, scale, bias, prefix)


def attend_reference(
    query: Tensor, kept: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """The definition, in the dtype of ``query``, its softmax in float32."""
    keys, values = kept[ancestors.t()].unbind(2)  # each [R, T, G, Dh]
    grouped = query.unflatten(1, (keys.shape[2], -1))[:, None]  # [R, 1, G, H / G, Dh]
    scores = (grouped * keys[:, :, :, None]).sum(-1).flatten(2)  # [R, T, H]
    scores = scores if scale == 1.0 else scores * scale
    scores = scores if bias is None else scores + bias
    scores = scores if scores.dtype is torch.float64 else scores.float()
    if prefix is not None:
        scores = torch.cat((scores, prefix[1][:, None]), dim=1)  # [R, T + 1, H]
    weights = scores.softmax(1).to(query.dtype)
    own = weights[:, : len(ancestors)].unflatten(2, (keys.shape[2], -1))[..., None] * values[:, :, :, None]
    out = own.sum(1).flatten(1, 2)  # [R, H, Dh]
    if prefix is not None:
        out = out + weights[:, -1, :, None] * prefix[0]
    return out.flatten(1)


def _check(
    query: Tensor, kept: Tensor, ancestors: Tensor, bias: Tensor | None, prefix: tuple[Tensor, Tensor] | None
) -> None:
    rows, count, dim = query.shape
    if kept.ndim != 4 or kept.shape[1] != 2 or kept.shape[3] != dim or count % kept.shape[2]:
        raise ValueError(f"kept must be [N, 2, G, {dim}] with G a divisor of {count}, got {list(kept.shape)}")
    if ancestors.ndim != 2 or ancestors.shape[1] != rows or not len(ancestors):
        raise ValueError(f"ancestors must be [T, {rows}] with T of at least 1, got {list(ancestors.shape)}")
    if bias is not None and bias.shape != (len(ancestors), count):
        raise ValueError(f"bias must be {[len(ancestors), count]}, got {list(bias.shape)}")
    if prefix is not None and (prefix[0].shape != query.shape or prefix[1].shape != (rows, count)):
        raise ValueError(f"prefix must be {list(query.shape)} and {[rows, count]}, got "
                         f"{list(prefix[0].shape)} and {list(prefix[1].shape)}")  # fmt: skip
