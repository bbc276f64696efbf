"""Log-probabilities of the codes that continue a node; all other codes get -inf.

R rows, K codes per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import native, pick
from ..runtime.operands import INTEGERS
from ..runtime.ranges import ranged
from ..runtime.registry import register
from ..trie import ops as trie_ops
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import Filter, FilterTensors
from ..trie.trie import Trie, as_nodes

Normalize = Literal["vocab", "level", "valid"]
# the numbers by which the kernels select a normalisation
NORMALIZE_INDEX = {name: index for index, name in enumerate(get_args(Normalize))}
LEVEL = NORMALIZE_INDEX["level"]
NEG_INF = float("-inf")


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
    """Computes the log-probabilities of the codes that continue each node.

    Each result is clamped to <= 0. Logits are read as float32; NaN counts as -inf and +inf as the largest
    finite value. A row is all -inf if its sum is empty or its logsumexp is NaN. There is no gradient.

    Args:
        logits: Floating point [R, K].
        nodes: Integers [R].
        trie: The trie of the valid semantic IDs.
        normalize: The logits that the softmax sums over: "vocab", the whole vocabulary; "level", the K codes
            of the row; "valid", the codes that continue the node and pass the filter.
        logsumexp: Floating point [R], the log-sum-exp over the whole vocabulary. Required for "vocab", not
            allowed otherwise.
        filter: Restricts the trie to the items that it allows.
        backend: "triton", "native" (C++ on the CPU), "reference", or None for the dispatcher's choice. The
            log-sum-exps of the backends may differ in the last bits.

    Returns:
        float32 [R, K]; -inf for codes that do not continue the node.

    Raises:
        ValueError: Shapes, dtypes, devices or arguments do not fit.

    Example:
        >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
        >>> trie_softmax(torch.zeros(1, 4), torch.tensor([0]), trie, "valid").exp().round(decimals=2).tolist()
        [[0.5, 0.0, 0.0, 0.5]]
    """
    check_logits(logits, nodes, trie, 2)
    check_normalize(normalize, logsumexp, nodes)
    allowed = trie.filter_tensors(filter, nodes.numel())
    operands = logits, as_nodes(nodes, trie.num_nodes), NORMALIZE_INDEX[normalize], logsumexp, backend
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.cemg.trie_softmax(*flat_arguments(trie.arrays, allowed), *operands)
        return out
    return log_probabilities(trie.arrays, allowed, *operands)


@torch.no_grad()
def log_probabilities(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, nodes: Tensor, normalize: int,
    logsumexp: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    """Runs checked arguments on ``backend`` or the dispatcher's choice."""
    chosen = pick("trie_softmax", logits.device, backend)
    if chosen == "triton":
        from .softmax_triton import softmax as triton_softmax

        return triton_softmax(logits, nodes, trie, normalize, logsumexp, filter)
    if chosen == "native":
        return _native(trie, filter, logits, nodes, normalize, logsumexp)
    return masked_log_prob(logits, trie_ops.mask(trie, filter, nodes), normalize, logsumexp).contiguous()


def _native(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, nodes: Tensor, normalize: int,
    logsumexp: Tensor | None,
) -> Tensor:  # fmt: skip
    logits, total = as_float32(logits), None if logsumexp is None else as_float32(logsumexp)
    nodes = nodes.resolve_neg()
    out = torch.empty_like(logits)
    native().trie_softmax(  # by position: keywords take 1 us, a small call 15
        trie.view, None if filter is None else filter.view(nodes.numel()), logits.data_ptr(),
        0 if total is None else total.data_ptr(), native_normalize(normalize), nodes.data_ptr(),
        nodes.numel(), out.data_ptr(),
    )  # fmt: skip
    return out


@cache
def native_normalize(normalize: int) -> Any:
    """Returns the member of the C++ enum with this number."""
    return native().Normalize(normalize)


def as_float32(tensor: Tensor) -> Tensor:
    """Converts to a contiguous float32 tensor; returns the tensor itself if it is one already."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.float().contiguous().resolve_neg()


def masked_log_prob(logits: Tensor, allowed: Tensor, normalize: int, logsumexp: Tensor | None) -> Tensor:
    """The definition, for any leading shape: ``logits`` and ``allowed`` [..., K], ``logsumexp`` [...].

    ``normalize`` is a value of ``NORMALIZE_INDEX``.
    """
    unmasked = sanitize(logits)
    valid = unmasked.masked_fill(~allowed, NEG_INF)
    if logsumexp is not None:
        total = logsumexp.float().clamp(max=torch.finfo(torch.float32).max)
    else:
        total = (unmasked if normalize == LEVEL else valid).logsumexp(-1)
    empty = total.isnan() | (total == NEG_INF)
    log_prob = (valid - total.masked_fill(empty, 0)[..., None]).clamp(max=0)
    return log_prob.masked_fill(empty[..., None], NEG_INF)


def sanitize(logits: Tensor) -> Tensor:
    """Converts to float32 and replaces NaN by -inf and +inf by the largest finite value."""
    return torch.nan_to_num(logits.float(), nan=NEG_INF, neginf=NEG_INF)


def check_normalize(normalize: str, logsumexp: Tensor | None, nodes: Tensor) -> None:
    """Checks ``normalize``, and that ``logsumexp`` fits it and ``nodes``; raises ValueError otherwise."""
    if normalize not in NORMALIZE_INDEX:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE_INDEX)}, got {normalize!r}")
    if (normalize == "vocab") != (logsumexp is not None):
        needs = (
            "needs logsumexp, of the logits of the whole vocabulary"
            if logsumexp is None
            else "does not take logsumexp"
        )
        raise ValueError(f"normalize={normalize!r} {needs}; only vocab takes it")
    if logsumexp is not None:
        check_like("logsumexp", logsumexp, nodes)


def check_like(name: str, tensor: Tensor, nodes: Tensor) -> None:
    """Checks that ``tensor`` is dense floating point with the shape and device of ``nodes``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != nodes.shape:
        raise ValueError(f"{name} must be {list(nodes.shape)}, got {list(tensor.shape)}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be floating point and dense, got {tensor.dtype}, {tensor.layout}")
    if tensor.device != nodes.device:
        raise ValueError(f"{name} are on {tensor.device}, nodes on {nodes.device}; move one with .to()")


def check_logits(logits: Tensor, nodes: Tensor, trie: Trie, dim: int) -> None:
    """Checks that ``logits`` [..., K] fit ``nodes`` [...] and the trie."""
    if not isinstance(logits, Tensor) or not isinstance(nodes, Tensor):
        raise TypeError(
            f"logits and nodes must be tensors, got {type(logits).__name__} and {type(nodes).__name__}"
        )
    shape, device = logits.shape, logits.device
    if len(shape) != dim or shape != (*nodes.shape, trie.codebook_size):
        expected = [*nodes.shape, trie.codebook_size]
        raise ValueError(f"logits must be {expected} (nodes and codebook_size), got {list(shape)}")
    if not logits.is_floating_point() or logits.layout is not torch.strided:
        raise ValueError(f"logits must be floating point and dense, got {logits.dtype}, {logits.layout}")
    if nodes.dtype not in INTEGERS or nodes.layout is not torch.strided:
        raise ValueError(f"nodes must be integers and dense, got {nodes.dtype}, {nodes.layout}")
    if nodes.device != device:
        raise ValueError(f"nodes are on {nodes.device}, logits on {device}; move one with .to()")
    if device != trie.device:
        raise ValueError(f"logits are on {device}, the trie on {trie.device}; move one with .to()")


def flat_arguments(trie: TrieArrays, filter: FilterTensors | None) -> tuple[Tensor | int | list[Tensor], ...]:
    """Returns a trie and a filter as the arguments of a custom op; see ``trie_ops.ARRAYS_AND_FILTER``."""
    return trie.code, trie.first_child, trie.rows, trie.levels, trie.codebook_size, list(filter or ())


def _custom_op(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, nodes: Tensor, normalize: int, logsumexp: Tensor | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    trie = TrieArrays(code, first_child, rows, levels, codebook_size)
    allowed = FilterTensors(*filter) if filter else None
    return log_probabilities(trie, allowed, logits, nodes, normalize, logsumexp, backend)


_op = torch.library.custom_op(
    "cemg::trie_softmax", _custom_op, mutates_args=(),
    schema=f"({trie_ops.ARRAYS_AND_FILTER}, Tensor logits, Tensor nodes, int normalize, "
    "Tensor? logsumexp, str? backend) -> Tensor",
)  # fmt: skip


@_op.register_fake
def _fake(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, *_: object,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .softmax_triton import aot_cases

    return aot_cases(every)


register("trie_softmax", ("triton", "native", "reference"), aot_cases=_aot_cases)
