"""One step of constrained beam search: mask, normalise, add, select the best, advance in the trie.

B users, W beams, K codes per level.

    candidate[b, w, k] = scores[b, w] + log_prob[b, w, k]       for each child k of nodes[b, w]
    keep the `width` best candidates of each user

With an item prior (``prior.py``), candidates are ranked by the mixture of generator and prior. ``scores``
are then the scores of the mixture, and ``generator_scores`` the sums above, which the beams carry along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import native, pick
from ..runtime.ranges import ranged
from ..runtime.registry import register
from ..trie import ops as trie_ops
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import Filter, FilterTensors
from ..trie.trie import Trie, as_nodes
from .prior import PriorTensors, check_prior, child_masses, mixed_scores
from .softmax import (
    NEG_INF,
    NORMALIZE_INDEX,
    Normalize,
    as_float32,
    check_like,
    check_logits,
    check_normalize,
    flat_arguments,
    log_probabilities,
    masked_log_prob,
    native_normalize,
)

MAX_WIDTH = 2**24  # 400 MB of results per user


class BeamStep(NamedTuple):
    """The next beams of each user, best first, and the score of the best pruned candidate.

    A dead beam has score -inf, node -1, parent 0 and code 0.

    Args:
        scores: float32 [B, width], cumulative log-probabilities.
        parents: int64 [B, width], the beam that each was expanded from.
        codes: int64 [B, width], the code that each added.
        nodes: int32 [B, width], the node of each.
        pruned: float32 [B], the score of the best candidate that was not kept; -inf if all were kept.
    """

    scores: Tensor
    parents: Tensor
    codes: Tensor
    nodes: Tensor
    pruned: Tensor


class MixedStep(NamedTuple):
    """A ``BeamStep`` under a prior: ``scores`` and ``pruned`` are those of the mixture.

    ``generator_scores`` float32 [B, width] are the generator's own scores of the beams; -inf for dead beams.
    """

    scores: Tensor
    parents: Tensor
    codes: Tensor
    nodes: Tensor
    pruned: Tensor
    generator_scores: Tensor


@overload
def trie_beam_step(
    logits: Tensor, scores: Tensor, nodes: Tensor, trie: Trie, width: int, normalize: Normalize = "vocab",
    logsumexp: Tensor | None = None, filter: Filter | None = None, *, backend: str | None = None,
    prior: None = None, generator_scores: None = None,
) -> BeamStep: ...  # fmt: skip


@overload
def trie_beam_step(
    logits: Tensor, scores: Tensor, nodes: Tensor, trie: Trie, width: int, normalize: Normalize = "vocab",
    logsumexp: Tensor | None = None, filter: Filter | None = None, *, backend: str | None = None,
    prior: PriorTensors, generator_scores: Tensor,
) -> MixedStep: ...  # fmt: skip


@ranged
def trie_beam_step(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    trie: Trie,
    width: int,
    normalize: Normalize = "vocab",
    logsumexp: Tensor | None = None,
    filter: Filter | None = None,
    *,
    backend: str | None = None,
    prior: PriorTensors | None = None,
    generator_scores: Tensor | None = None,
) -> BeamStep | MixedStep:
    """Selects the ``width`` best continuations of each user's beams.

    The selection is exact: every child of every beam is a candidate. Log-probabilities are those of
    ``trie_softmax``, each <= 0, so scores never rise. Sums are float32. Ties go to the lowest (parent, code).
    A beam with score -inf or NaN, or with node -1, is dead and has no candidates. If a user has fewer than
    ``width`` candidates, the remaining beams are dead.

    With a prior, the score of a candidate is log((1 - weight) * exp(g) + weight * mass), where g is its
    ``generator_scores[b, w] + log_prob[b, w, k]`` (float32) and mass the prior's mass below the child. It is
    computed in float64 and rounded to float32. Candidates without a finite score are not kept: under a weight
    of 1, children without mass. A candidate with mass stays if g is -inf. A weight of 0 gives the bits of
    a step without prior.

    Args:
        logits: Floating point [B, W, K].
        scores: Floating point [B, W], cumulative log-probabilities; with a prior, scores of the mixture.
        nodes: Integers [B, W].
        trie: The trie of the valid semantic IDs.
        width: The number of beams to keep per user.
        normalize: The logits that the softmax sums over, as in ``trie_softmax``.
        logsumexp: Floating point [B, W], the log-sum-exp over the whole vocabulary; required for "vocab"
            only.
        filter: Restricts the trie to the items that it allows.
        backend: "triton" (up to 256 beams, width 256 and 4,096 codes), "native" (C++ on the CPU), "torch",
            "reference", or None for the dispatcher's choice. For "vocab", all backends return the same bits.
            Otherwise their log-sum-exps may differ in the last bits, and so may the order of candidates whose
            scores differ by no more than that.
        prior: The masses of the items of each user, from ``ItemPrior.on`` with the same filter.
        generator_scores: Floating point [B, W], the generator's own scores; required with a prior only.

    Returns:
        A ``BeamStep``, or a ``MixedStep`` if there is a prior.

    Raises:
        ValueError: Shapes, dtypes, devices or arguments do not fit.

    Example:
        >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
        >>> root = torch.zeros(1, 1, dtype=torch.int32)
        >>> logits = torch.tensor([[[1.0, 9.0, 0.0, 2.0]]])
        >>> trie_beam_step(logits, torch.zeros(1, 1), root, trie, 2, "valid").codes.tolist()
        [[3, 0]]
    """
    check_logits(logits, nodes, trie, 3)
    check_normalize(normalize, logsumexp, nodes)
    check_like("scores", scores, nodes)
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width must be 1 to {MAX_WIDTH}, got {width}")
    allowed = trie.filter_tensors(filter, nodes.numel())
    operands = (
        logits,
        scores,
        as_nodes(nodes, trie.num_nodes),
        width,
        NORMALIZE_INDEX[normalize],
        logsumexp,
        backend,
    )
    if prior is not None or generator_scores is not None:
        prior, own = check_prior(prior, generator_scores, nodes)
        check_like("generator_scores", own, nodes)
        if torch.compiler.is_compiling():
            flat = flat_arguments(trie.arrays, allowed)
            return MixedStep(*torch.ops.cemg.trie_mixed_beam_step(*flat, *operands, list(prior), own))
        return _mixed_step(trie.arrays, allowed, *operands, prior, own)
    if torch.compiler.is_compiling():
        return BeamStep(*torch.ops.cemg.trie_beam_step(*flat_arguments(trie.arrays, allowed), *operands))
    return _step(trie.arrays, allowed, *operands)


def _step(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, scores: Tensor, nodes: Tensor, width: int,
    normalize: int, logsumexp: Tensor | None, backend: str | None,
) -> BeamStep:  # fmt: skip
    """Runs checked arguments on ``backend`` or the dispatcher's choice."""
    chosen = pick("trie_beam_step", logits.device, backend)
    if chosen == "triton":
        from . import beam_step_triton as kernels

        if backend is not None or not kernels.problem(nodes.shape[1], trie.codebook_size, width):
            step = kernels.beam_step(logits, scores, nodes, trie, width, normalize, logsumexp, filter)
            return BeamStep(*step)
    if chosen == "native":
        return _native(trie, filter, logits, scores, nodes, width, normalize, logsumexp)
    with torch.no_grad():
        allowed = trie_ops.mask(trie, filter, nodes.flatten()).view(logits.shape)
        log_prob = masked_log_prob(logits, allowed, normalize, logsumexp)
        candidates = _candidates(log_prob, scores)  # [B, W * K]
        select = _select_reference if chosen == "reference" else _select
        return _advance(*select(candidates, width), nodes, trie, width)


@torch.no_grad()
def _mixed_step(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, scores: Tensor, nodes: Tensor, width: int,
    normalize: int, logsumexp: Tensor | None, backend: str | None, prior: PriorTensors,
    generator_scores: Tensor,
) -> MixedStep:  # fmt: skip
    """``_step`` under a prior. Backends without a mixture of their own run the PyTorch code."""
    chosen = pick("trie_beam_step", logits.device, backend)
    if chosen == "native":
        before = as_float32(generator_scores)
        after = before.new_empty(len(before), width)
        own_operands = prior.view(), before.data_ptr(), after.data_ptr()
        step = _native(trie, filter, logits, scores, nodes, width, normalize, logsumexp, *own_operands)
        return MixedStep(*step, after)
    if chosen == "triton":
        from . import beam_step_triton as kernels
        from . import mixture_triton

        if backend is not None or not kernels.problem(nodes.shape[1], trie.codebook_size, width):
            operands = logits, scores, nodes, trie, width, normalize, logsumexp, filter, prior
            parts, candidates = mixture_triton.mixed_beam_step(*operands, generator_scores)
            return _with_own(BeamStep(*parts), candidates, trie.codebook_size)
    allowed = trie_ops.mask(trie, filter, nodes.flatten()).view(logits.shape)
    softmax = "triton" if chosen == "triton" else "reference"  # the same log-sum-exps
    total = None if logsumexp is None else logsumexp.flatten()
    rows = logits.flatten(0, 1)
    log_prob = log_probabilities(trie, filter, rows, nodes.flatten(), normalize, total, softmax)
    own = _candidates(log_prob.view(logits.shape), generator_scores).view(logits.shape)  # [B, W, K]
    dead = scores.isnan() | (scores == NEG_INF)
    mass = child_masses(trie, prior, nodes).masked_fill_(~allowed, 0.0)
    mixed = mixed_scores(own, mass, prior.weight).masked_fill_(dead[..., None], NEG_INF).flatten(1)
    select = _select_reference if chosen == "reference" else _select
    best, position = select(mixed, width)
    step = _advance(best, position, nodes, trie, width)
    return _with_own(step, own, trie.codebook_size)


def _with_own(step: BeamStep, own: Tensor, codebook_size: int) -> MixedStep:
    """Adds the generator's scores of the beams, from those of all candidates [B, W, K]."""
    place = step.parents * codebook_size + step.codes
    # place 0 must exist even if there are no beams
    padded = torch.nn.functional.pad(own.flatten(1), (0, 1), value=NEG_INF)
    return MixedStep(*step, padded.gather(1, place).masked_fill_(step.nodes < 0, NEG_INF))


def _native(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, scores: Tensor, nodes: Tensor, width: int,
    normalize: int, logsumexp: Tensor | None, *mixed: Any,
) -> BeamStep:  # fmt: skip
    """``mixed``: the view of a prior, and the addresses of the generator's scores before and after."""
    users, beams = nodes.shape
    logits, scores = as_float32(logits), as_float32(scores)
    total = None if logsumexp is None else as_float32(logsumexp)
    nodes = nodes.resolve_neg()
    step = best, parents, codes, next_nodes, pruned = empty_step(scores, nodes, width)
    native().trie_beam_step(  # by position: keywords take 1 us, a small call 15
        trie.view, None if filter is None else filter.view(nodes.numel()), logits.data_ptr(),
        0 if total is None else total.data_ptr(), native_normalize(normalize), scores.data_ptr(),
        nodes.data_ptr(), users, beams, width, best.data_ptr(), parents.data_ptr(), codes.data_ptr(),
        next_nodes.data_ptr(), pruned.data_ptr(), *mixed,
    )  # fmt: skip
    return step


def empty_step(scores: Tensor, nodes: Tensor, width: int) -> BeamStep:
    """Allocates the tensors of a step from ``scores`` [B, W] and ``nodes`` int32 [B, W]."""
    users = scores.shape[0]
    if scores.dtype is not torch.float32:
        scores = scores.new_empty(0, dtype=torch.float32)
    # new_empty with separate sizes and an inherited dtype takes half the time of a size tuple and a given
    # dtype
    parents = torch.empty(users, width, dtype=torch.int64, device=scores.device)
    return BeamStep(
        scores.new_empty(users, width), parents, parents.new_empty(users, width),
        nodes.new_empty(users, width), scores.new_empty(users),
    )  # fmt: skip


def _candidates(log_prob: Tensor, scores: Tensor) -> Tensor:
    """Returns the scores of all continuations [B, W * K]; -inf for codes that do not continue."""
    alive = torch.nan_to_num(scores.float(), nan=NEG_INF, neginf=NEG_INF)[..., None]  # [B, W, 1]
    return (alive + log_prob).flatten(1)


def _select_reference(candidates: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The definition: a stable descending sort. Returns scores and positions [B, up to width + 1]."""
    ordered, position = candidates.sort(dim=1, descending=True, stable=True)
    return ordered[:, : width + 1], position[:, : width + 1]


def _select(candidates: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the same from one top-k of integer keys.

    A key holds the order-preserving bits of the score, then the inverted position. No two keys are equal, so
    ties resolve as in a stable sort.
    """
    bits = (candidates + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # in the order of the scores
    count = candidates.shape[1]
    inverted = count - 1 - torch.arange(count, device=candidates.device)
    keys = (ordered << 32) + inverted
    best = keys.topk(min(width + 1, count), dim=1).values
    position = count - 1 - (best & 0xFFFFFFFF)
    return candidates.gather(1, position), position


def _advance(best: Tensor, position: Tensor, nodes: Tensor, trie: TrieArrays, width: int) -> BeamStep:
    """Returns the next beams from the up to width + 1 best candidates."""
    missing = width + 1 - best.shape[1]
    best = torch.nn.functional.pad(best, (0, missing), value=NEG_INF)
    position = torch.nn.functional.pad(position, (0, missing))
    scores, dead = best[:, :width], best[:, :width] == NEG_INF
    position = position[:, :width].masked_fill(dead, 0)
    parents, codes = position // trie.codebook_size, position % trie.codebook_size
    nodes = torch.nn.functional.pad(nodes, (0, 1), value=-1)  # parent 0 exists even if there are no beams
    next_nodes = trie_ops.advance(trie, None, nodes.gather(1, parents).flatten(), codes.flatten())
    next_nodes = next_nodes.view(codes.shape).masked_fill(dead, -1)
    return BeamStep(scores.clone(), parents, codes, next_nodes, best[:, width].clone())


def _custom_op(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, scores: Tensor, nodes: Tensor, width: int, normalize: int,
    logsumexp: Tensor | None, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    trie = TrieArrays(code, first_child, rows, levels, codebook_size)
    allowed = FilterTensors(*filter) if filter else None
    return tuple(_step(trie, allowed, logits, scores, nodes, width, normalize, logsumexp, backend))


_op = torch.library.custom_op(
    "cemg::trie_beam_step", _custom_op, mutates_args=(),
    schema=f"({trie_ops.ARRAYS_AND_FILTER}, Tensor logits, Tensor scores, Tensor nodes, SymInt width, "
    "int normalize, Tensor? logsumexp, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_op.register_fake
def _fake(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, scores: Tensor, nodes: Tensor, width: int, *_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(empty_step(scores, nodes, width))


def _mixed_custom_op(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, scores: Tensor, nodes: Tensor, width: int, normalize: int,
    logsumexp: Tensor | None, backend: str | None, prior: Sequence[Tensor], generator_scores: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    trie = TrieArrays(code, first_child, rows, levels, codebook_size)
    allowed = FilterTensors(*filter) if filter else None
    masses = PriorTensors(*prior)
    return tuple(_mixed_step(trie, allowed, logits, scores, nodes, width, normalize, logsumexp, backend,
                             masses, generator_scores))  # fmt: skip


_mixed_op = torch.library.custom_op(
    "cemg::trie_mixed_beam_step", _mixed_custom_op, mutates_args=(),
    schema=f"({trie_ops.ARRAYS_AND_FILTER}, Tensor logits, Tensor scores, Tensor nodes, SymInt width, "
    "int normalize, Tensor? logsumexp, str? backend, Tensor[] prior, Tensor generator_scores) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_mixed_op.register_fake
def _mixed_fake(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, scores: Tensor, nodes: Tensor, width: int, *_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    step = empty_step(scores, nodes, width)
    return (*step, torch.empty_like(step.scores))


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .beam_step_triton import aot_cases
    from .mixture_triton import mixture_aot_cases

    return aot_cases(every) + mixture_aot_cases(every)


register("trie_beam_step", ("triton", "native", "torch", "reference"), aot_cases=_aot_cases)
