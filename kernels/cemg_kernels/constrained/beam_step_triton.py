"""One step of constrained beam search on a GPU: masked log-probabilities and the selection of the next beams.

B users, W beams, K codes per level. The candidates of a beam are its children, in ascending order of their
codes. A candidate is one int64 key: the upper half holds the bits of its score in an order-preserving form,
the lower half its inverted position (parent, child). No two keys are equal, and ties go to the lowest
(parent, code).

The first kernel runs one program per beam, which holds the scores of the children in registers and finds the
best of them. The second kernel runs one program per user, which merges the lists of its beams.

The selection is exact. The lowest of any width + 1 candidates is a lower bound for the (width + 1)-th best. A
program with more than ``KEPT`` children collects the candidates that reach a bound and sorts them. If more
than ``KEPT`` reach it, the first ``KEPT`` of them give a higher bound, and the program repeats. Each round
rejects at least KEPT - width - 1 candidates, so the loop ends. The first bound comes from the maxima of
``KEPT`` groups; one round is usually enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import MAX_REGISTERS, AotCase, pairwise, powers_of_two
from ..runtime.dispatch import on_its_gpu
from ..runtime.triton_math import sanitize, zero_if_neg_inf
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import FilterTensors
from ..trie.filter_triton import allowed, child_range, filter_kinds, filter_operands, filter_types
from .softmax_triton import (
    BITMAP_KINDS,
    CLOSED_KINDS,
    DTYPES,
    MAX_CODES,
    NORMALIZATIONS,
    case_name,
    code_type,
    kernel_case,
    logsumexp_pointer,
    readable_logits,
)

MAX_BEAMS, MAX_WIDTH = 256, 256
LIST_SIZES = (64, 256, 512)  # candidates that the first kernel writes per beam: more than the width
MIN_BLOCK_K = 32
MIN_SORTED = 256  # the first kernel sorts at least this many candidates at once
PER_WARP = 512  # candidates
MIN_MERGED = 256  # the merge sorts at least this many candidates at once
MERGE_WARPS = 8
Shape = tuple[int, int, int]  # beams, codes per level, width

EMPTY_KEY = tl.constexpr(-(2**63))  # below the key of every candidate
NEG_INF_BITS = tl.constexpr(-2139095041)  # the ordered bits of -inf
LOW_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(score):
    """Returns the bits of a score as an int32 in the same order; -0 and 0 become equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ LOW_BITS, bits)


@triton.jit
def _logsumexp(x):
    """Returns the log-sum-exp of ``x``; -inf if all elements are -inf."""
    highest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - zero_if_neg_inf(highest)), 0)
    return highest + tl.log(tl.where(highest == float("-inf"), 1.0, total))


@triton.jit
def row_total(x, start, logsumexp_ptr, row, j, degree, K, NORMALIZE: tl.constexpr):
    """Returns the log-sum-exp of a beam: the caller's, over its K logits at ``start``, or over ``x``."""
    if NORMALIZE == 0:
        total = sanitize(tl.load(logsumexp_ptr + row))
    elif NORMALIZE == 1:
        total = _logsumexp(sanitize(tl.load(start + j, mask=(degree > 0) & (j < K), other=float("-inf"))))
    else:
        total = _logsumexp(x)
    return total


@triton.jit
def _element(x, index):
    """Returns element ``index`` of ``x`` [N] as a scalar. Uses a maximum, because a sum in Triton 3.6 adds an
    element twice if two threads hold it.
    """
    lowest: tl.constexpr = -(2 ** (x.dtype.primitive_bitwidth - 1))
    return tl.max(tl.where(tl.arange(0, x.shape[0]) == index, x, tl.full(x.shape, lowest, x.dtype)), 0)


@triton.jit
def _write_beams(
    keys, user, begins_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    width, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes the next beams of ``user`` from the sorted ``keys``, and the best pruned score."""
    at = tl.arange(0, keys.shape[0])
    alive = keys > EMPTY_KEY
    bits = (keys >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ LOW_BITS, bits).to(tl.float32, bitcast=True)
    score = tl.where(alive, score, float("-inf"))
    position = tl.where(alive, LOW_BITS - (keys & LOW_BITS).to(tl.int32), 0)
    parent = position // BLOCK_K
    child = tl.load(begins_ptr + parent, mask=alive, other=0) + position % BLOCK_K
    code = tl.load(code_ptr + child - 1, mask=alive, other=0)
    out, in_width = user * width + at, at < width
    tl.store(scores_ptr + out, score, mask=in_width)
    tl.store(parents_ptr + out, parent.to(tl.int64), mask=in_width)
    tl.store(codes_ptr + out, code.to(tl.int64), mask=in_width)
    tl.store(new_nodes_ptr + out, tl.where(alive, child, -1), mask=in_width)
    tl.store(pruned_ptr + user + at * 0, score, mask=at == width)


# B=1 W=50 K=256 fp32, all children: reads 51 KB of logits and 13 KB of codes, writes 26 KB of candidates.
# Bound by latency: five dependent loads, two reductions, a sort of 256.
@triton.jit
def beam_step_kernel(
    logits_ptr, logsumexp_ptr, scores_ptr, nodes_ptr, code_ptr, first_child_ptr, begins_ptr, kept_ptr,
    best_ptr,
    open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps, rows_per_request,
    stride_user, stride_beam, W, K, num_inner, width,
    NORMALIZE: tl.constexpr, BITMAPS: tl.constexpr, CLOSED: tl.constexpr,
    BLOCK_K: tl.constexpr, TOP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One beam: writes its TOP best candidates in order."""
    row = tl.program_id(0)
    row_64 = row.to(tl.int64)
    node, score = tl.load(nodes_ptr + row), sanitize(tl.load(scores_ptr + row))
    inner = (node >= 0) & (node < num_inner) & (score > float("-inf"))
    begin, end = child_range(first_child_ptr, node, inner)
    tl.store(begins_ptr + row, begin)
    degree = end - begin
    j = tl.arange(0, BLOCK_K)
    child, live = begin + j, j < degree
    code = tl.load(code_ptr + child - 1, mask=live, other=0).to(tl.int32)
    live = allowed(child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps,
                   rows_per_request, BITMAPS, CLOSED)  # fmt: skip
    start = logits_ptr + (row_64 // W) * stride_user + (row_64 % W) * stride_beam
    x = sanitize(tl.load(start + code, mask=live, other=float("-inf")))
    total = row_total(x, start, logsumexp_ptr, row, j, degree, K, NORMALIZE)
    sums = score + tl.minimum(x - zero_if_neg_inf(total), 0.0)
    ordered = _ordered(tl.where(live, tl.where(total == float("-inf"), total, sums), float("-inf")))
    inverted = LOW_BITS - ((row % W) * BLOCK_K + j)
    key = (ordered.to(tl.int64) << 32) | inverted.to(tl.int64)

    if BLOCK_K == KEPT:
        best = tl.sort(tl.where(ordered > NEG_INF_BITS, key, EMPTY_KEY), descending=True)
    else:
        bound, bound_position = tl.full([], NEG_INF_BITS, tl.int32), tl.full([], 0, tl.int32)
        if degree > KEPT:
            maxima = tl.max(tl.reshape(ordered, [BLOCK_K // KEPT, KEPT]), 0)
            bound = _element(tl.sort(maxima, descending=True), width)
        kept_ptr += row_64 * KEPT
        at = tl.arange(0, KEPT)
        best = tl.full([KEPT], EMPTY_KEY, tl.int64)
        count = tl.full([], KEPT + 1, tl.int32)
        while count > KEPT:
            reaches = (ordered > bound) | ((ordered == bound) & (inverted >= bound_position))
            ones = (reaches & (ordered > NEG_INF_BITS)).to(tl.int32)
            slot = tl.cumsum(ones, 0) - 1
            tl.store(kept_ptr + slot, key, mask=(ones > 0) & (slot < KEPT))
            count = tl.sum(ones, 0)
            tl.debug_barrier()  # threads read keys that other threads wrote
            best = tl.sort(tl.load(kept_ptr + at, mask=at < count, other=EMPTY_KEY), descending=True)
            tl.debug_barrier()
            last = _element(best, width)
            bound, bound_position = (last >> 32).to(tl.int32), (last & LOW_BITS).to(tl.int32)
    first = tl.arange(0, KEPT)
    tl.store(best_ptr + row_64 * TOP + first, best, mask=first < TOP)


@triton.jit
def merge_kernel(
    best_ptr, begins_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    W, width,
    BLOCK_K: tl.constexpr, TOP: tl.constexpr, LISTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One user: merges the sorted lists of its beams [W, TOP], a few ranks of all lists at a time."""
    user = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNK)
    beam, step = at % LISTS, at // LISTS
    lists_ptr = best_ptr + (user * W + beam) * TOP + step
    best = tl.full([CHUNK], EMPTY_KEY, tl.int64)
    bound, next_best = tl.full([], EMPTY_KEY, tl.int64), tl.full([], 2**63 - 1, tl.int64)
    rank = 0
    while (rank < TOP) & (next_best > bound):  # lists descend: later ranks are lower than the last
        exists = (beam < W) & (rank + step < TOP)
        more = tl.load(lists_ptr + rank, mask=exists, other=EMPTY_KEY)
        next_best = tl.max(tl.where(step == CHUNK // LISTS - 1, more, EMPTY_KEY), 0)
        if rank > 0:
            best = tl.topk(tl.reshape(tl.join(best, more), [2 * CHUNK]), CHUNK)
        else:
            best = tl.sort(more, descending=True)
        bound = _element(best, width)
        rank += CHUNK // LISTS
    _write_beams(best, user, begins_ptr + user * W, code_ptr, scores_ptr, parents_ptr, codes_ptr,
                 new_nodes_ptr, pruned_ptr, width, BLOCK_K)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """The tile sizes of a beam step.

    The first kernel sorts ``kept`` of ``block_k`` candidates at once per beam and writes the ``top`` best.
    The second merges ``lists`` such lists per user, ``chunk`` candidates at a time.
    """

    block_k: int
    top: int
    kept: int
    lists: int
    chunk: int

    @property
    def warps(self) -> int:
        """The warps per program of the first kernel."""
        return min(16, max(4, self.block_k // PER_WARP))

    @property
    def registers(self) -> int:
        """The most registers that a thread can have; by itself, ptxas uses fewer for occupancy and spills."""
        return min(MAX_REGISTERS, 65536 // (32 * self.warps))

    @property
    def constants(self) -> dict[str, int]:
        """The constexprs of the first kernel."""
        return {"BLOCK_K": self.block_k, "TOP": self.top, "KEPT": self.kept}

    @property
    def merge(self) -> dict[str, int]:
        """The constexprs of the merge."""
        return {"BLOCK_K": self.block_k, "TOP": self.top, "LISTS": self.lists, "CHUNK": self.chunk}


def plan_of(beams: int, size: int, width: int) -> Plan:
    """Returns tile sizes, rounded up to a few classes, so that all can be compiled ahead of time."""
    block_k = max(MIN_BLOCK_K, triton.next_power_of_2(size))
    list_size = next(size for size in LIST_SIZES if width < size)
    top, lists = min(list_size, block_k), triton.next_power_of_2(max(1, beams))
    kept = min(max(MIN_SORTED, 2 * top), block_k)
    return Plan(block_k, top, kept, lists, max(list_size, lists, min(MIN_MERGED, top * lists)))


def problem(beams: int, size: int, width: int) -> str:
    """Returns why the Triton backend cannot run this shape, or "" if it can."""
    if beams <= MAX_BEAMS and size <= MAX_CODES and width <= MAX_WIDTH:
        return ""
    return (
        f"the Triton backend takes up to {MAX_BEAMS} beams, {MAX_CODES} codes and width {MAX_WIDTH}, "
        f"got {beams}, {size} and {width}; use backend='torch'"
    )


@on_its_gpu
def beam_step(
    logits: Tensor, scores: Tensor, nodes: Tensor, trie: TrieArrays, width: int, normalize: int,
    logsumexp: Tensor | None, filter: FilterTensors | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes a ``BeamStep`` for checked logits [B, W, K], scores [B, W] and nodes int32 [B, W]."""
    users, beams, size = logits.shape
    reason = problem(beams, size, width)
    if reason:
        raise ValueError(reason)
    logits, scores, device = readable_logits(logits), scores.float().contiguous(), logits.device
    parents, codes = (torch.empty(users, width, dtype=torch.int64, device=device) for _ in range(2))
    out = (torch.empty(users, width, device=device), parents, codes,
           torch.empty(users, width, dtype=torch.int32, device=device),
           torch.empty(users, device=device))  # fmt: skip
    if not users:
        return out
    plan = plan_of(beams, size, width)
    rows = users * beams
    begins = torch.empty(rows, dtype=torch.int32, device=device)
    best = torch.empty(rows, plan.top, dtype=torch.int64, device=device)
    sorts_all = plan.kept == plan.block_k
    kept = best if sorts_all else torch.empty(rows, plan.kept, dtype=torch.int64, device=device)
    beam_step_kernel[(rows,)](
        logits, logsumexp_pointer(logits, logsumexp), scores, nodes, trie.code, trie.first_child, begins,
        kept, best,
        *filter_operands(filter, trie, rows), logits.stride(0), logits.stride(1), beams, size,
        trie.num_inner, width,
        NORMALIZE=normalize, **filter_kinds(filter), **plan.constants, num_warps=plan.warps,
        maxnreg=plan.registers,
    )  # fmt: skip
    merge_kernel[(users,)](best, begins, trie.code, *out, beams, width, **plan.merge,
                           num_warps=MERGE_WARPS)  # fmt: skip
    return out


AXES = NORMALIZATIONS, tuple(DTYPES.values()), BITMAP_KINDS, CLOSED_KINDS


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns cases in which any two of shape, normalisation, dtype and filter occur together, or all."""
    shapes = aot_shapes()
    if every:
        distinct = {(*plan_of(*shape).constants.values(),): shape for shape in shapes}
        cases = [_beam_step_case(*choice) for choice in product(distinct.values(), *AXES)]
        return cases + [_merge_case(*shape) for shape in _distinct_merges(shapes)]
    cases = [_beam_step_case(*choice) for choice in pairwise(largest_plans(shapes), *AXES)]
    return [*cases, _merge_case(MAX_BEAMS, MAX_CODES, MAX_WIDTH)]


def aot_shapes() -> list[Shape]:
    """Returns the shapes whose plans cover all."""
    sizes, beams = powers_of_two(MAX_CODES), powers_of_two(MAX_BEAMS)
    return list(product(beams, sizes, (*(size - 1 for size in LIST_SIZES[:-1]), MAX_WIDTH)))


def _distinct_merges(shapes: Iterable[Shape]) -> list[Shape]:
    """Returns one shape per distinct merge; BLOCK_K is ignored, because the merge only divides by it."""
    return list({(*plan_of(*shape).merge.values(),)[1:]: shape for shape in shapes}.values())


def largest_plans(shapes: Iterable[Shape]) -> list[Shape]:
    """Returns, for each number of warps, the shape with the most candidates per thread."""
    largest: dict[int, tuple[int, Shape]] = {}
    for shape in shapes:
        plan = plan_of(*shape)
        candidates = plan.block_k + plan.kept
        largest[plan.warps] = max(largest.get(plan.warps, (0, shape)), (candidates, shape))
    return [shape for _, shape in largest.values()]


def _beam_step_case(shape: Shape, normalize: int, dtype: str, bitmaps: int, closed: bool) -> AotCase:
    beams, size, width = shape
    plan = plan_of(*shape)
    types = {
        "logits_ptr": f"*{dtype}", "logsumexp_ptr": f"*{dtype if normalize else 'fp32'}",
        "scores_ptr": "*fp32", "nodes_ptr": "*i32", "code_ptr": code_type(size), "first_child_ptr": "*i64",
        "begins_ptr": "*i32", "kept_ptr": "*i64", "best_ptr": "*i64",
        **filter_types(), "stride_user": "i32",
        "stride_beam": "i32", "W": "i32", "K": "i32", "num_inner": "i32", "width": "i32",
    }  # fmt: skip
    constants = {"NORMALIZE": normalize, "BITMAPS": bitmaps, "CLOSED": closed, **plan.constants}
    name = f"trie_beam_step W={beams} K={size} width={width} {case_name(normalize, dtype, bitmaps, closed)}"
    return kernel_case(name, beam_step_kernel, types, constants, plan.warps, maxnreg=plan.registers)


def _merge_case(beams: int, size: int, width: int) -> AotCase:
    types = {"best_ptr": "*i64", "begins_ptr": "*i32", "code_ptr": code_type(size), "scores_ptr": "*fp32",
             "parents_ptr": "*i64", "codes_ptr": "*i64", "new_nodes_ptr": "*i32", "pruned_ptr": "*fp32",
             "W": "i32", "width": "i32"}  # fmt: skip
    name = f"trie_beam_step merge W={beams} K={size} width={width}"
    return kernel_case(name, merge_kernel, types, plan_of(beams, size, width).merge, MERGE_WARPS)
