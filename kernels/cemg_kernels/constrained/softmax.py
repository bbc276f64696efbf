"""Log-probabilities of the codes that continue a node; all others -inf.

R rows, K codes a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..runtime.dispatch import pick
from ..runtime.operands import INTEGERS
from ..runtime.ranges import ranged
from ..trie import ops as trie_ops
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import FilterTensors
from ..trie.trie import Filter, Trie, as_nodes

Normalize = Literal["vocab", "level", "valid"]
OVER = {name: number for number, name in enumerate(get_args(Normalize))}  # as the kernels count them
LEVEL = OVER["level"]
NEVER = float("-inf")


@ranged
def trie_softmax(
    logits: Tensor,
    nodes: Tensor,
    trie: Trie,
    normalize: Normalize = "vocab",
    logsumexp: Tensor | None = None,
    filter: Filter | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities float32 [R, K] of ``logits`` [R, K] at ``nodes`` [R]; -inf where nothing continues.

    Over which logits the softmax runs: "vocab", the whole vocabulary, whose log-sum-exp [R] the caller
    passes as ``logsumexp`` (required there, refused elsewhere); "level", the row's K codes; "valid", the
    codes that continue the node and pass the filter. Each result is clamped to <= 0. In float32, NaN
    counts as -inf and +inf as the largest finite value; a row whose sum is empty, or whose logsumexp is
    NaN, is all -inf. ``backend``: "triton", "native" (C++ on the CPU), "reference", or None for the
    dispatcher's; their log-sum-exps may differ in the last bits. It has no gradient.
    Raises ValueError where shapes, dtypes, devices or arguments do not fit.
    """
    check_logits(logits, nodes, trie, 2)
    check_normalize(normalize, logsumexp, nodes)
    allowed = trie.filter_tensors(filter, nodes.numel())
    operands = logits, as_nodes(nodes, trie.num_nodes), OVER[normalize], logsumexp, backend
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.cemg.trie_softmax(*flat(trie.arrays, allowed), *operands)
        return out
    return _softmax(trie.arrays, allowed, *operands)


@torch.no_grad()
def _softmax(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, nodes: Tensor, normalize: int,
    logsumexp: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    """Checked input, on the backend of this name or the dispatcher's."""
    chosen = pick("trie_softmax", logits.device, backend)
    if chosen == "triton":
        from .step_triton import softmax

        return softmax(logits, nodes, trie, normalize, logsumexp, filter)
    if chosen == "native":
        return _native(trie, filter, logits, nodes, normalize, logsumexp)
    return masked_log_prob(logits, trie_ops.mask(trie, filter, nodes), normalize, logsumexp).contiguous()


def _native(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, nodes: Tensor, normalize: int,
    logsumexp: Tensor | None,
) -> Tensor:  # fmt: skip
    logits, total = dense(logits), None if logsumexp is None else dense(logsumexp)
    nodes = nodes.resolve_neg()
    out = torch.empty_like(logits)
    trie.view.softmax(
        None if filter is None else filter.fields(nodes.numel()), logits.data_ptr(),
        0 if total is None else total.data_ptr(), normalize, nodes.data_ptr(), nodes.numel(), out.data_ptr(),
    )  # fmt: skip
    return out


def dense(tensor: Tensor) -> Tensor:
    """The same float32 and contiguous, as the kernels read it; itself where it is so already."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.float().contiguous().resolve_neg()


def masked_log_prob(logits: Tensor, allowed: Tensor, normalize: int, logsumexp: Tensor | None) -> Tensor:
    """The definition on any leading shape: ``logits`` and ``allowed`` [..., K], ``logsumexp`` [...].

    ``normalize`` counts the names of ``Normalize`` from 0.
    """
    finite = tame(logits)
    valid = finite.masked_fill(~allowed, NEVER)
    if logsumexp is not None:
        total = logsumexp.float().clamp(max=torch.finfo(torch.float32).max)
    else:
        total = (finite if normalize == LEVEL else valid).logsumexp(-1)
    empty = total.isnan() | (total == NEVER)
    log_prob = (valid - total.masked_fill(empty, 0)[..., None]).clamp(max=0)
    return log_prob.masked_fill(empty[..., None], NEVER)


def tame(logits: Tensor) -> Tensor:
    """float32, with NaN as -inf and +inf as the largest finite value."""
    return torch.nan_to_num(logits.float(), nan=NEVER, neginf=NEVER)


def check_normalize(normalize: str, logsumexp: Tensor | None, nodes: Tensor) -> None:
    """ValueError where ``normalize`` is unknown or ``logsumexp`` does not go with it and ``nodes``."""
    if normalize not in OVER:
        raise ValueError(f"normalize must be one of {', '.join(OVER)}, got {normalize!r}")
    if (normalize == "vocab") != (logsumexp is not None):
        needs = (
            "needs logsumexp, of the logits of the whole vocabulary"
            if logsumexp is None
            else "has no use for logsumexp"
        )
        raise ValueError(f"normalize={normalize!r} {needs}; vocab takes it, level and valid do not")
    if logsumexp is not None:
        check_like("logsumexp", logsumexp, nodes)


def check_like(name: str, tensor: Tensor, nodes: Tensor) -> None:
    """ValueError where ``tensor`` does not hold a floating-point number for each of ``nodes``, beside it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != nodes.shape:
        raise ValueError(f"{name} must be {list(nodes.shape)}, got {list(tensor.shape)}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be floating point and dense, got {tensor.dtype}, {tensor.layout}")
    if tensor.device != nodes.device:
        raise ValueError(f"{name} are on {tensor.device}, nodes on {nodes.device}; move one with .to()")


def check_logits(logits: Tensor, nodes: Tensor, trie: Trie, dim: int) -> None:
    """ValueError where ``logits`` [..., K] do not fit ``nodes`` [...] and the trie, TypeError for what is not
    a tensor."""
    if not isinstance(logits, Tensor) or not isinstance(nodes, Tensor):
        raise TypeError(
            f"logits and nodes must be tensors, got {type(logits).__name__} and {type(nodes).__name__}"
        )
    shape, device = logits.shape, logits.device
    if len(shape) != dim or shape != (*nodes.shape, trie.codebook_size):
        wanted = [*nodes.shape, trie.codebook_size]
        raise ValueError(f"logits must be {wanted}: nodes and codebook_size; got {list(shape)}")
    if not logits.is_floating_point() or logits.layout is not torch.strided:
        raise ValueError(f"logits must be floating point and dense, got {logits.dtype}, {logits.layout}")
    if nodes.dtype not in INTEGERS or nodes.layout is not torch.strided:
        raise ValueError(f"nodes must be integers and dense, got {nodes.dtype}, {nodes.layout}")
    if nodes.device != device:
        raise ValueError(f"nodes are on {nodes.device}, logits on {device}; move one with .to()")
    if device != trie.device:
        raise ValueError(f"logits are on {device}, the trie on {trie.device}; move one with .to()")


def flat(trie: TrieArrays, filter: FilterTensors | None) -> tuple[Tensor | int | list[Tensor], ...]:
    """What a custom op takes of a trie and a filter; ``trie_ops.FLAT`` names them."""
    return trie.code, trie.first_child, trie.rows, trie.levels, trie.codebook_size, list(filter or ())


def _custom_op(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, nodes: Tensor, normalize: int, logsumexp: Tensor | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    trie = TrieArrays(code, first_child, rows, levels, codebook_size)
    allowed = FilterTensors(*filter) if filter else None
    return _softmax(trie, allowed, logits, nodes, normalize, logsumexp, backend)


_op = torch.library.custom_op(
    "cemg::trie_softmax", _custom_op, mutates_args=(),
    schema=f"({trie_ops.FLAT}, Tensor logits, Tensor nodes, int normalize, Tensor? logsumexp, str? backend)"
    " -> Tensor",
)  # fmt: skip


@_op.register_fake
def _fake(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, *_: object,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape, dtype=torch.float32)
