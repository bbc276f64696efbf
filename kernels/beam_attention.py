"""Attention of beams over their own tokens, through a table of ancestors: no cache is copied or re-ordered.

B users, W beams, R = B * W rows, T steps fed so far, H heads over G key-value heads of Dh.

    score[r, t, h] = scale * query[r, h] . keys[t][ancestors[t, r], h * G // H] + bias[t, h]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import native, pick
from .ranges import ranged


class Prefix(NamedTuple):
    """Attention over other keys, to be merged in: ``out`` [B, G, W * H / G, Dh], ``lse`` [B, G, W * H / G].

    The heads that share a key-value head lie next to each other, within a beam.
    """

    out: Tensor
    lse: Tensor


Step = tuple[Tensor, Tensor]


@ranged
def beam_attention(
    query: Tensor,
    steps: Sequence[Step],
    ancestors: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    prefix: Prefix | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Each row's softmax over its T own tokens, and over the keys of ``prefix``: [R, H * Dh].

    ``query`` [B, W, H, Dh]; ``steps``: T pairs of keys and values [R_t, G, Dh], the rows fed at that step;
    ``ancestors`` [T, R] int32: which of them row r descends from; ``bias`` [T, H], added to the scores.
    Contiguous within a row; rows may lie apart. ``backend``: "native" (float32 on the CPU), "reference",
    or None for the dispatcher's. Raises ValueError where shapes do not fit. DESIGN: beams as queries.
    """
    users, beams, heads, size = query.shape
    if not steps or ancestors.shape != (len(steps), users * beams) or ancestors.dtype != torch.int32:
        raise ValueError(
            f"ancestors must be int32 [{len(steps)}, {users * beams}] for {len(steps)} steps (at least one), "
            f"got {ancestors.dtype} {list(ancestors.shape)}"
        )
    for keys, values in steps:
        if keys.shape != values.shape or keys.dim() != 3 or keys.shape[2] != size or heads % keys.shape[1]:
            raise ValueError(
                f"keys and values must be [rows, G, {size}] with G dividing {heads}, "
                f"got {list(keys.shape)} and {list(values.shape)}"
            )
    if backend is None and query.dtype != torch.float32:
        backend = "reference"
    if pick("beam_attention", query.device, backend) == "native":
        return _native(query, steps, ancestors, scale, bias, prefix)
    return beam_attention_reference(query, steps, ancestors, scale, bias, prefix)


def beam_attention_reference(
    query: Tensor, steps: Sequence[Step], ancestors: Tensor, scale: float = 1.0, bias: Tensor | None = None,
    prefix: Prefix | None = None,
) -> Tensor:  # fmt: skip
    """The definition, by gathering each row's ancestors."""
    users, beams, heads, size = query.shape
    rows, groups = users * beams, steps[0][0].shape[1]
    keys, values = (
        torch.stack([step[which][row] for step, row in zip(steps, ancestors.long(), strict=True)], dim=1)
        for which in (0, 1)
    )  # [R, T, G, Dh]
    grouped = query.reshape(rows, 1, groups, heads // groups, size)
    scores = (grouped * keys[:, :, :, None]).sum(-1).flatten(2) * scale  # [R, T, H]
    if bias is not None:
        scores = scores + bias
    if prefix is not None:
        lse = _by_row(prefix.lse[..., None], users, beams)  # [R, H, 1]
        scores = torch.cat((scores, lse.transpose(1, 2).to(scores.dtype)), dim=1)  # [R, T + 1, H]
    weights = scores.softmax(1)
    own = weights[:, : len(steps)].unflatten(2, (groups, -1))[..., None] * values[:, :, :, None]
    out = own.sum(1).flatten(1, 2)  # [R, H, Dh]
    if prefix is not None:
        out = out + weights[:, -1, :, None] * _by_row(prefix.out, users, beams)
    return out.flatten(1).to(query.dtype)


def _by_row(folded: Tensor, users: int, beams: int) -> Tensor:
    """[B, G, W * H / G, c] -> [R, H, c]."""
    apart = folded.unflatten(2, (beams, -1)).permute(0, 2, 1, 3, 4)  # [B, W, G, H / G, c]
    return apart.reshape(users * beams, -1, folded.shape[3])


def _native(
    query: Tensor, steps: Sequence[Step], ancestors: Tensor, scale: float, bias: Tensor | None,
    prefix: Prefix | None,
) -> Tensor:  # fmt: skip
    users, beams, heads, size = query.shape
    rows = query.reshape(users * beams, heads * size)
    if any(t.dtype != torch.float32 for step in steps for t in step) or rows.dtype != torch.float32:
        raise ValueError(f"the native backend takes float32, got {query.dtype}; convert, or use reference")
    addresses = [(k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)) for k, v in steps]
    if any(t.stride()[1:] != (size, 1) for step in steps for t in step):
        raise ValueError("keys and values must be contiguous within a row")
    ancestors, bias = ancestors.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty(users * beams, heads * size)
    merged = []
    if prefix is not None:
        for part in (prefix.out, prefix.lse):
            merged += [part.data_ptr(), part.stride(0), part.stride(2), part.stride(1)]
    native().beam_attention(
        [users, beams, heads, steps[0][0].shape[1], size], rows.data_ptr(), rows.stride(0), addresses,
        ancestors.data_ptr(), 0 if bias is None else bias.data_ptr(), scale, merged, out.data_ptr(),
    )  # fmt: skip
    return out
