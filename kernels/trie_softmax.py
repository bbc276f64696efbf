"""Log-probabilities of the codes that continue a node; all others -inf.

R rows, K codes a level.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .dispatch import pick
from .item_filter import ItemFilter
from .trie import Trie

Normalize = Literal["vocab", "level", "valid"]
NEVER = float("-inf")


def trie_softmax(
    logits: Tensor,
    nodes: Tensor,
    trie: Trie,
    normalize: Normalize = "vocab",
    logsumexp: Tensor | None = None,
    filter: ItemFilter | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities float32 [R, K] of ``logits`` [R, K] at ``nodes`` [R]; -inf where nothing continues.

    Over which logits the softmax runs: "vocab", the whole vocabulary, whose log-sum-exp [R] the caller
    passes as ``logsumexp`` (required there, refused elsewhere); "level", the row's K codes; "valid", the
    codes that continue the node and pass the filter. Each result is clamped to <= 0. In float32, NaN
    counts as -inf and +inf as the largest finite value; a row whose sum is empty, or whose logsumexp is
    NaN, is all -inf. ``backend``: "native" (C++ on the CPU), "reference", or None for the dispatcher's.
    Raises ValueError where shapes, dtypes, devices or arguments do not fit.
    """
    check_normalize(normalize, logsumexp, nodes.shape)
    check_logits(logits, nodes, trie, 2)
    if pick("trie_softmax", logits.device, backend) == "native":
        return _native(logits, nodes, trie, normalize, logsumexp, filter)
    return masked_log_prob(logits, trie.mask(nodes, filter=filter), normalize, logsumexp)


def _native(
    logits: Tensor, nodes: Tensor, trie: Trie, normalize: Normalize, logsumexp: Tensor | None,
    filter: ItemFilter | None,
) -> Tensor:  # fmt: skip
    logits, total, nodes = native_step(logits, logsumexp, nodes)
    out = torch.empty_like(logits)
    trie.view.softmax(
        *trie.filter_addresses(filter), logits.data_ptr(), 0 if total is None else total.data_ptr(),
        get_args(Normalize).index(normalize), nodes.data_ptr(), nodes.numel(), out.data_ptr(),
    )  # fmt: skip
    return out


def native_step(
    logits: Tensor, logsumexp: Tensor | None, nodes: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same as the C++ reads them: contiguous float32, float32 and int32."""
    total = None if logsumexp is None else logsumexp.float().contiguous()
    return logits.float().contiguous(), total, nodes.to(torch.int32).contiguous()


def masked_log_prob(
    logits: Tensor, allowed: Tensor, normalize: Normalize, logsumexp: Tensor | None
) -> Tensor:
    """The definition on any leading shape: ``logits`` and ``allowed`` [..., K], ``logsumexp`` [...]."""
    finite = tame(logits)
    valid = finite.masked_fill(~allowed, NEVER)
    if normalize == "vocab" and logsumexp is not None:
        total = logsumexp.float().clamp(max=torch.finfo(torch.float32).max)
    else:
        total = (finite if normalize == "level" else valid).logsumexp(-1)
    empty = total.isnan() | (total == NEVER)
    log_prob = (valid - total.masked_fill(empty, 0)[..., None]).clamp(max=0)
    return log_prob.masked_fill(empty[..., None], NEVER)


def tame(logits: Tensor) -> Tensor:
    """float32, with NaN as -inf and +inf as the largest finite value."""
    return torch.nan_to_num(logits.float(), nan=NEVER, neginf=NEVER)


def check_normalize(normalize: str, logsumexp: Tensor | None, shape: torch.Size) -> None:
    """ValueError where ``normalize`` is unknown or ``logsumexp`` does not go with it."""
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
    if (normalize == "vocab") != (logsumexp is not None):
        needs = (
            "needs logsumexp, of the logits of the whole vocabulary"
            if logsumexp is None
            else "has no use for logsumexp"
        )
        raise ValueError(f"normalize={normalize!r} {needs}; vocab takes it, level and valid do not")
    if logsumexp is not None and logsumexp.shape != shape:
        raise ValueError(f"logsumexp must be {list(shape)}, got {list(logsumexp.shape)}")


def check_logits(logits: Tensor, nodes: Tensor, trie: Trie, dim: int) -> None:
    """ValueError where ``logits`` [..., K] do not fit ``nodes`` [...] and the trie."""
    wanted = (*nodes.shape, trie.codebook_size)
    if logits.dim() != dim or logits.shape != wanted:
        raise ValueError(f"logits must be {list(wanted)}: nodes and codebook_size; got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if nodes.device != logits.device:
        raise ValueError(f"nodes are on {nodes.device}, logits on {logits.device}; move one with .to()")
    if logits.device != trie.device:
        raise ValueError(f"logits are on {logits.device}, the trie on {trie.device}; move one with .to()")
