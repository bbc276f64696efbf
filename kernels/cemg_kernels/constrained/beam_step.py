"""One step of constrained beam search: mask, normalise, add, keep the best, walk on.

B users, W beams, K codes a level.

    candidate[b, w, k] = scores[b, w] + log_prob[b, w, k]       for each child k of nodes[b, w]
    keep the `width` best candidates of each user
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.dispatch import pick
from ..runtime.ranges import ranged
from ..trie import ops as trie_ops
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import FilterTensors
from ..trie.trie import Filter, Trie, as_nodes
from .softmax import (
    NEVER,
    OVER,
    Normalize,
    check_like,
    check_logits,
    check_normalize,
    dense,
    flat,
    masked_log_prob,
)

MAX_WIDTH = 2**24  # of a user: 400 MB of results


class BeamStep(NamedTuple):
    """The kept beams, best first, and the best candidate that was cut.

    ``scores`` [B, width] float32; ``parents`` [B, width] int64, the beam each grew from; ``codes``
    [B, width] int64; ``nodes`` [B, width] int32; ``pruned`` [B] float32. A dead place has score -inf,
    node -1, parent 0 and code 0; ``pruned`` is -inf where nothing was cut.
    """

    scores: Tensor
    parents: Tensor
    codes: Tensor
    nodes: Tensor
    pruned: Tensor


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
) -> BeamStep:
    """The ``width`` best continuations of each user's beams.

    ``logits`` [B, W, K], ``scores`` [B, W], ``nodes`` [B, W] int32, ``logsumexp`` [B, W] for "vocab".
    Exact: every child is a candidate before anything is cut. Log-probabilities are those of
    ``trie_softmax`` (each <= 0, so scores only fall); sums are float32. Best first, ties to the lowest
    (parent, code). A beam of score -inf or NaN, or of node -1, is dead and has no candidates; where fewer
    than ``width`` candidates live, the remaining places are dead, never filled up.
    ``backend``: "triton" (up to 256 beams, width 256 and 4,096 codes), "native" (C++ on the CPU), "torch",
    "reference", or None for the dispatcher's. For "vocab" all give the same bits; else their log-sum-exps
    may differ in the last bits, and so may the order of candidates as close as that.
    Raises ValueError where shapes, dtypes, devices or arguments do not fit.
    """
    check_logits(logits, nodes, trie, 3)
    check_normalize(normalize, logsumexp, nodes)
    check_like("scores", scores, nodes)
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width must be 1 to {MAX_WIDTH}, got {width}")
    allowed = trie.filter_tensors(filter, nodes.numel())
    operands = logits, scores, as_nodes(nodes, trie.num_nodes), width, OVER[normalize], logsumexp, backend
    if torch.compiler.is_compiling():
        return BeamStep(*torch.ops.cemg.trie_beam_step(*flat(trie.arrays, allowed), *operands))
    return _step(trie.arrays, allowed, *operands)


def _step(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, scores: Tensor, nodes: Tensor, width: int,
    normalize: int, logsumexp: Tensor | None, backend: str | None,
) -> BeamStep:  # fmt: skip
    """Checked input, on the backend of this name or the dispatcher's."""
    chosen = pick("trie_beam_step", logits.device, backend)
    if chosen == "triton":
        from . import step_triton as kernels

        if backend is not None or not kernels.problem(nodes.shape[1], trie.codebook_size, width):
            found = kernels.beam_step(logits, scores, nodes, trie, width, normalize, logsumexp, filter)
            return BeamStep(*found)
    if chosen == "native":
        return _native(trie, filter, logits, scores, nodes, width, normalize, logsumexp)
    with torch.no_grad():
        allowed = trie_ops.mask(trie, filter, nodes.flatten()).view(logits.shape)
        log_prob = masked_log_prob(logits, allowed, normalize, logsumexp)
        candidates = _candidates(log_prob, scores)  # [B, W * K]
        select = _select_reference if chosen == "reference" else _select
        return _walk_on(*select(candidates, width), nodes, trie, width)


def _native(
    trie: TrieArrays, filter: FilterTensors | None, logits: Tensor, scores: Tensor, nodes: Tensor, width: int,
    normalize: int, logsumexp: Tensor | None,
) -> BeamStep:  # fmt: skip
    users, beams = nodes.shape
    logits, scores, total = dense(logits), dense(scores), None if logsumexp is None else dense(logsumexp)
    nodes = nodes.resolve_neg()
    step = best, parents, codes, grown, pruned = empty_step(scores, nodes, width)
    trie.view.beam_step(
        None if filter is None else filter.fields(nodes.numel()), logits.data_ptr(),
        0 if total is None else total.data_ptr(), normalize, scores.data_ptr(), nodes.data_ptr(),
        (users, beams, width), best.data_ptr(), parents.data_ptr(), codes.data_ptr(), grown.data_ptr(),
        pruned.data_ptr(),
    )  # fmt: skip
    return step


def empty_step(scores: Tensor, nodes: Tensor, width: int) -> BeamStep:
    """Room for a step of ``scores`` [B, W] and ``nodes`` [B, W] int32, each tensor its own."""
    users = scores.shape[0]
    if scores.dtype is not torch.float32:
        scores = scores.new_empty(0, dtype=torch.float32)
    # sizes apart, and a dtype of one's own, take half the time of a tuple and of a dtype that is named
    parents = torch.empty(users, width, dtype=torch.int64, device=scores.device)
    return BeamStep(
        scores.new_empty(users, width), parents, parents.new_empty(users, width),
        nodes.new_empty(users, width), scores.new_empty(users),
    )  # fmt: skip


def _candidates(log_prob: Tensor, scores: Tensor) -> Tensor:
    """Scores of all continuations, [B, W * K]; -inf where there is none."""
    alive = torch.nan_to_num(scores.float(), nan=NEVER, neginf=NEVER)[..., None]  # [B, W, 1]
    return (alive + log_prob).flatten(1)


def _select_reference(candidates: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The definition: sort all, stably, best first. Scores and places, [B, up to width + 1]."""
    ordered, place = candidates.sort(dim=1, descending=True, stable=True)
    return ordered[:, : width + 1], place[:, : width + 1]


def _select(candidates: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The same by one top-k of integers: a score's bits, ordered as it is, over its place counted down.

    No two keys are equal, so ties fall as in a stable sort.
    """
    bits = (candidates + 0.0).view(torch.int32)  # + 0.0: one zero, not two
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # rises with the score
    count = candidates.shape[1]
    place = torch.arange(count, device=candidates.device)
    keys = (ordered << 32) + (count - 1 - place)
    best = keys.topk(min(width + 1, count), dim=1).values
    at = count - 1 - (best & 0xFFFFFFFF)
    return candidates.gather(1, at), at


def _walk_on(best: Tensor, place: Tensor, nodes: Tensor, trie: TrieArrays, width: int) -> BeamStep:
    """From the width + 1 best (fewer, where there are fewer) to the next beams."""
    missing = width + 1 - best.shape[1]
    best = torch.nn.functional.pad(best, (0, missing), value=NEVER)
    place = torch.nn.functional.pad(place, (0, missing))
    scores, dead = best[:, :width], best[:, :width] == NEVER
    place = place[:, :width].masked_fill(dead, 0)
    parents, codes = place // trie.codebook_size, place % trie.codebook_size
    nodes = torch.nn.functional.pad(nodes, (0, 1), value=-1)  # so that of no beams the dead have a parent
    grown = trie_ops.advance(trie, None, nodes.gather(1, parents).flatten(), codes.flatten())
    grown = grown.view(codes.shape).masked_fill(dead, -1)
    return BeamStep(scores.clone(), parents, codes, grown, best[:, width].clone())


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
    schema=f"({trie_ops.FLAT}, Tensor logits, Tensor scores, Tensor nodes, SymInt width, int normalize, "
    "Tensor? logsumexp, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_op.register_fake
def _fake(
    code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
    filter: Sequence[Tensor], logits: Tensor, scores: Tensor, nodes: Tensor, width: int, *_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(empty_step(scores, nodes, width))
