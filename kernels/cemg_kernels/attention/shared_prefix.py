"""Attention of beams over the prompt of their user, whose keys and values exist once (DESIGN §5.3).

B users, W beams each, S cells of a prompt, H query heads over G key-value heads of Dh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.dispatch import TRITON_DTYPES, pick
from ..runtime.ranges import ranged

MAX_DIM = 128  # of a head in the kernel


@ranged
def prompt_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float = 1.0, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax of ``scale * query . keys + mask``, times the values, and the log-sum-exp of the scores, by
    which it is merged with attention over other keys: [B, W, H, Dh] of the dtype of ``query``, and [B, W, H]
    float32.

    ``query`` [B, W, H, Dh]; ``keys`` and ``values`` [B, G, S, Dh]; ``mask`` [B, S], finite somewhere in each
    row. No gradient. Raises ValueError where shapes do not fit.
    """
    _check(query, keys, values, mask)
    if served_by_triton(query, backend):
        from .shared_prefix_triton import attend

        return attend(query, keys, values, mask, scale)
    return attend_reference(query, keys, values, mask, scale)


def served_by_triton(query: Tensor, backend: str | None = None) -> bool:
    """Whether the kernel would take it."""
    chosen = pick("prompt_attention", query.device, backend)
    return chosen == "triton" and query.dtype in TRITON_DTYPES and query.shape[-1] <= MAX_DIM


def attend_reference(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of ``query``, its softmax in float32. Beams, and the heads that share
    keys, are the rows of one product: no key is copied.
    """
    folded = query.unflatten(2, (keys.shape[1], -1)).transpose(1, 2).flatten(2, 3)  # [B, G, W * H / G, Dh]
    scores = (folded * scale) @ keys.transpose(2, 3) + mask[:, None, None]  # [B, G, W * H / G, S]
    scores = scores if scores.dtype is torch.float64 else scores.float()
    out = scores.softmax(3).to(values.dtype) @ values
    lse = scores.logsumexp(3, keepdim=True)
    apart = (t.unflatten(2, (query.shape[1], -1)).transpose(1, 2) for t in (out, lse))  # [B, W, G, H / G, c]
    out, lse = (t.flatten(2, 3) for t in apart)
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
