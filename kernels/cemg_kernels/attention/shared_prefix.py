"""Attention of beams over the prompt of their user, whose keys and values are stored once per user.

B users, W beams per user, S positions in the prompt, H query heads over G key-value heads of dimension Dh.
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
def shared_prefix_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float = 1.0, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes softmax(scale * query . keys + mask) . values over the prompt. There is no gradient.

    Args:
        query: [B, W, H, Dh].
        keys: [B, G, S, Dh].
        values: [B, G, S, Dh].
        mask: [B, S], added to the scores; each row needs a finite entry.
        scale: The factor of the scores.
        backend: "triton", "reference", or None for the dispatcher's choice.

    Returns:
        The output [B, W, H, Dh] in the dtype of ``query``, and the log-sum-exp of the scores, float32 [B, W,
        H]. With the latter, ``beam_tree_attention`` merges the output with attention over other keys.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(query, keys, values, mask)
    if served_by_triton(query, backend):
        from .shared_prefix_triton import attend

        return attend(query, keys, values, mask, scale)
    return shared_prefix_attention_reference(query, keys, values, mask, scale)


def served_by_triton(query: Tensor, backend: str | None = None) -> bool:
    """Returns whether the Triton kernel runs for this query."""
    chosen = pick("shared_prefix_attention", query.device, backend)
    if chosen != "triton" or query.dtype not in TRITON_DTYPES:
        return False
    from .shared_prefix_triton import MAX_HEAD_DIM

    return query.shape[-1] <= MAX_HEAD_DIM


def shared_prefix_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: the dtype of ``query``, with a float32 softmax.

    Beams and heads that share keys become the rows of one matrix product, so no key is copied.
    """
    folded = query.unflatten(2, (keys.shape[1], -1)).transpose(1, 2).flatten(2, 3)  # [B, G, W * H / G, Dh]
    scores = (folded * scale) @ keys.transpose(2, 3) + mask[:, None, None]  # [B, G, W * H / G, S]
    scores = scores if scores.dtype is torch.float64 else scores.float()
    out = scores.softmax(3).to(values.dtype) @ values
    lse = scores.logsumexp(3, keepdim=True)
    # [B, W, G, H / G, c]
    unfolded = (t.unflatten(2, (query.shape[1], -1)).transpose(1, 2) for t in (out, lse))
    out, lse = (t.flatten(2, 3) for t in unfolded)
    return out, lse[..., 0]


def _check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> None:
    users, _, count, dim = query.shape
    fits = keys.ndim == 4 and keys.shape[0] == users and keys.shape[3] == dim and not count % keys.shape[1]
    if not fits or not keys.shape[2]:
        raise ValueError(f"keys must be [{users}, G, S, {dim}] with G a divisor of {count}, got "
                         f"{list(keys.shape)}")  # fmt: skip
    if values.shape != keys.shape:
        raise ValueError(f"values must be {list(keys.shape)} as the keys are, got {list(values.shape)}")
    if mask.shape != (users, keys.shape[2]):
        raise ValueError(f"mask must be {[users, keys.shape[2]]}, got {list(mask.shape)}")


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .shared_prefix_triton import aot_cases

    return aot_cases(every)


register("shared_prefix_attention", ("triton", "reference"), aot_cases=_aot_cases)
