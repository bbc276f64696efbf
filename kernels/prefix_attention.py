"""Attention of many queries over the same keys: the beams of a user over its prompt, a prompt over itself.

B users, H heads over G key-value heads of Dh, Q queries, S keys.

    score[b, h, q, s] = scale * query[b, h, q] . keys[b, h * G // H, s] + bias[h, q, s] + padding[b, s]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import native, pick
from .ranges import ranged


@ranged
def prefix_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float = 1.0, *, bias: Tensor | None = None,
    padding: Tensor | None = None, causal: bool = False, with_lse: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Softmax of the scores over the keys, times the values: out [B, H, Q, Dh]; ``with_lse`` their
    log-sum-exp [B, H, Q] too, else None.

    ``query`` [B, H, Q, Dh]; ``keys``, ``values`` [B, G, S, Dh] with G dividing H; ``bias`` [H, Q, S] and
    ``padding`` [B, S] are added to the scores, so padding holds 0 or the lowest number; ``causal`` hides
    the keys after a query's own place, the last query's being the last key's. ``out`` may lie in memory as
    [B, Q, H, Dh]. ``backend``: "native" (float32 on the CPU), "torch" (its fused attention; without the
    log-sum-exp), "reference", or None for the dispatcher's.
    Raises ValueError where shapes do not fit. DESIGN: beams as queries.
    """
    users, heads, queries, size = query.shape
    groups, count = keys.shape[1], keys.shape[2]
    if (
        keys.shape != (users, groups, count, size)
        or values.shape != keys.shape
        or heads % groups
        or not count
    ):
        raise ValueError(
            f"keys and values must be [{users}, G, S, {size}] with G dividing {heads} and S >= 1, "
            f"got {list(keys.shape)} and {list(values.shape)}"
        )
    for name, term, wanted in (("bias", bias, (heads, queries, count)), ("padding", padding, (users, count))):
        if term is not None and term.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(term.shape)}")
    if causal and queries > count:
        raise ValueError(f"causal: {queries} queries cannot be the last of {count} keys")
    chosen = pick("prefix_attention", query.device, backend)
    if backend is None and chosen == "native" and query.dtype != torch.float32:
        chosen = "torch"
    if backend is None and chosen == "torch" and with_lse:
        chosen = "reference"
    if chosen == "torch":
        if with_lse:
            raise ValueError("the torch backend gives no log-sum-exp; use reference")
        return _torch(query, keys, values, scale, bias, padding, causal), None
    run = _native if chosen == "native" else prefix_attention_reference
    out, lse = run(query, keys, values, scale, bias, padding, causal)
    return out, lse if with_lse else None


def prefix_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None, padding: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition."""
    shared = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (keys, values))
    scores = query @ (keys * scale).transpose(2, 3)  # [B, H, Q, S]
    if bias is not None:
        scores = scores + bias
    if padding is not None:
        scores = scores + padding[:, None, None]
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        hidden = hidden.triu(1 + scores.shape[3] - scores.shape[2])
        scores = scores.masked_fill(hidden, float("-inf"))
    scores = scores.float()
    return scores.softmax(3).to(values.dtype) @ values, scores.logsumexp(3)


def _torch(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None, padding: Tensor | None,
    causal: bool,
) -> Tensor:  # fmt: skip
    shared = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (keys, values))
    mask = None if bias is None else bias[None]  # [B, H, Q, S], or what broadcasts to it
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
    if causal and (mask is not None or query.shape[2] != keys.shape[2]):
        hidden = query.new_full((query.shape[2], keys.shape[2]), float("-inf"))
        hidden = hidden.triu(1 + keys.shape[2] - query.shape[2])
        mask, causal = hidden if mask is None else mask + hidden, False
    mask = None if mask is None else mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, scale=scale)


def _native(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None, padding: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    users, heads, queries, size = query.shape
    operands = [t if t.stride(3) == 1 else t.contiguous() for t in (query, keys, values)]
    if any(t.dtype != torch.float32 for t in operands):
        raise ValueError(f"the native backend takes float32, got {query.dtype}; convert, or use reference")
    out = torch.empty(users, queries, heads, size).transpose(1, 2)
    lse = torch.empty(users, heads, queries)
    bias = None if bias is None else bias.float().contiguous()
    padding = None if padding is None else padding.float().contiguous()
    native().prefix_attention(
        (users, heads, keys.shape[1], queries, keys.shape[2], size),
        [(t.data_ptr(), *t.stride()[:3]) for t in (*operands, out)],
        scale, 0 if bias is None else bias.data_ptr(), 0 if padding is None else padding.data_ptr(), causal,
        lse.data_ptr(),
    )  # fmt: skip
    return out, lse
