# mypy: disable-error-code="no-untyped-def"
"""A decoding step on the trie, on a GPU: masked log-probabilities, and the choice of the next beams.

B users, W beams, K codes a level. A beam's candidates are its children, in the order of their codes; a
candidate is one int64, its score's bits, ordered as the score is, over its place (parent, child) counted
down: no two are equal, and ties fall to the lowest (parent, code).

A program takes one beam: it holds the scores of the children in registers and finds the best of them; a
second launch, a program a user, merges what the beams found. Any width + 1 candidates bound the width + 1
best from below; so a program with more than ``KEPT`` children keeps what reaches a bound, sorts that, and
where more than ``KEPT`` reach it, the first ``KEPT`` give a higher bound and it looks again: exact, and never
without end, since each round leaves KEPT - width - 1 out. The first bound comes from the maxima of ``KEPT``
groups, and as a rule is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot import REGISTERS, AotCase, pairwise, powers_of_two
from ..runtime.dispatch import on_its_gpu
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import FilterTensors
from ..trie.filter_triton import (
    allowed,
    child_range,
    filter_kinds,
    filter_operands,
    filter_types,
    finite,
    tame,
)

MAX_BEAMS, MAX_WIDTH, MAX_CODES = 256, 256, 4096
TOPS = (64, 256, 512)  # candidates that a beam leaves: more than the width
MIN_BLOCK_K, MIN_SOFTMAX_BLOCK = 32, 32  # fewer codes are computed as so many
FIRST_ROUND = 256  # candidates sorted at once, at least
PER_WARP = 512  # candidates
SOFTMAX_BLOCK = 512
MERGED = 256  # candidates that a merge sorts at once, at least
MERGE_WARPS = 8
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

DEAD = tl.constexpr(-(2**63))  # a key below every candidate's
NEVER = tl.constexpr(-2139095041)  # the ordered bits of -inf
LOW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(score):
    """The bits of a score as an int32 that rises with it; one zero, not two."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ LOW, bits)


# R=400 K=256 fp32, all children: read 0.4 MB logits, 0.1 MB codes, write 0.4 MB: 0.2 us at 4.8 TB/s.
@triton.jit
def softmax_kernel(
    logits_ptr, logsumexp_ptr, nodes_ptr, code_ptr, first_child_ptr, out_ptr,
    open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps, rows_per_request,
    stride_logits, K, num_inner,
    NORMALIZE: tl.constexpr, BITMAPS: tl.constexpr, CLOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its log-sum-exp, -inf everywhere, then the children's log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    out_ptr += row * K
    node = tl.load(nodes_ptr + row)
    inner = (node >= 0) & (node < num_inner)
    begin, end = child_range(first_child_ptr, node, inner)
    if NORMALIZE == 0:
        total = tame(tl.load(logsumexp_ptr + row))
    else:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)  # of each lane, reduced once at the end
        sums = tl.zeros([BLOCK], tl.float32)
        low, high = (begin, end) if NORMALIZE == 2 else (begin * 0, begin * 0 + K)
        for first in range(low, high, BLOCK):
            at = first + tl.arange(0, BLOCK)
            live = at < high
            if NORMALIZE == 2:
                code = tl.load(code_ptr + at - 1, mask=live, other=0).to(tl.int32)
                live = allowed(at, live, row, open_ptr, filter_of_ptr, closed_ptr, words, most_closed,
                               steps, rows_per_request, BITMAPS, CLOSED)  # fmt: skip
            else:
                code = at
            x = tame(tl.load(logits_ptr + code, mask=live, other=float("-inf")))
            higher = tl.maximum(highest, x)
            base = finite(higher)
            sums = sums * tl.exp(highest - base) + tl.exp(x - base)
            highest = higher
        top = tl.max(highest, 0)
        total = tl.sum(sums * tl.exp(highest - finite(top)), 0)
        total = top + tl.log(tl.where(top == float("-inf"), 1.0, total))
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + k, tl.full([BLOCK], float("-inf"), tl.float32), mask=k < K)
    tl.debug_barrier()  # what follows overwrites some of it
    end = tl.where(total == float("-inf"), begin, end)
    for first in range(begin, end, BLOCK):
        child = first + tl.arange(0, BLOCK)
        live = child < end
        live = allowed(child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps,
                       rows_per_request, BITMAPS, CLOSED)  # fmt: skip
        code = tl.load(code_ptr + child - 1, mask=live, other=0).to(tl.int32)
        x = tame(tl.load(logits_ptr + code, mask=live, other=float("-inf")))
        tl.store(out_ptr + code, tl.minimum(x - finite(total), 0.0), mask=live)


@triton.jit
def _total_of(x):
    """Log-sum-exp of ``x``; -inf where all are."""
    highest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - finite(highest)), 0)
    return highest + tl.log(tl.where(highest == float("-inf"), 1.0, total))


@triton.jit
def _element(x, place):
    """Element ``place`` of ``x`` [N] as a scalar. Of a maximum, since Triton 3.6 adds some elements twice
    where threads hold the same ones.
    """
    lowest: tl.constexpr = -(2 ** (x.dtype.primitive_bitwidth - 1))
    return tl.max(tl.where(tl.arange(0, x.shape[0]) == place, x, tl.full(x.shape, lowest, x.dtype)), 0)


@triton.jit
def _write_beams(
    keys, user, begins_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    width, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The next beams of ``user`` from its candidates ``keys``, best first, and the best that was cut."""
    at = tl.arange(0, keys.shape[0])
    alive = keys > DEAD
    bits = (keys >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ LOW, bits).to(tl.float32, bitcast=True)
    score = tl.where(alive, score, float("-inf"))
    place = tl.where(alive, LOW - (keys & LOW).to(tl.int32), 0)
    parent = place // BLOCK_K
    child = tl.load(begins_ptr + parent, mask=alive, other=0) + place % BLOCK_K
    code = tl.load(code_ptr + child - 1, mask=alive, other=0)
    out, kept = user * width + at, at < width
    tl.store(scores_ptr + out, score, mask=kept)
    tl.store(parents_ptr + out, parent.to(tl.int64), mask=kept)
    tl.store(codes_ptr + out, code.to(tl.int64), mask=kept)
    tl.store(new_nodes_ptr + out, tl.where(alive, child, -1), mask=kept)
    tl.store(pruned_ptr + user + at * 0, score, mask=at == width)


# B=1 W=50 K=256 fp32, all children: read 51 KB logits + 13 KB codes, write 26 KB of candidates. Bound by
# latency: five loads that wait for one another, two reductions, a sort of 256.
@triton.jit
def beam_step_kernel(
    logits_ptr, logsumexp_ptr, scores_ptr, nodes_ptr, code_ptr, first_child_ptr, begins_ptr, kept_ptr,
    best_ptr,
    open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps, rows_per_request,
    stride_user, stride_beam, W, K, num_inner, width,
    NORMALIZE: tl.constexpr, BITMAPS: tl.constexpr, CLOSED: tl.constexpr,
    BLOCK_K: tl.constexpr, TOP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One beam: its TOP best candidates, in order."""
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    node, score = tl.load(nodes_ptr + row), tame(tl.load(scores_ptr + row))
    inner = (node >= 0) & (node < num_inner) & (score > float("-inf"))
    begin, end = child_range(first_child_ptr, node, inner)
    tl.store(begins_ptr + row, begin)
    degree = end - begin
    j = tl.arange(0, BLOCK_K)
    child, live = begin + j, j < degree
    code = tl.load(code_ptr + child - 1, mask=live, other=0).to(tl.int32)
    live = allowed(child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps,
                   rows_per_request, BITMAPS, CLOSED)  # fmt: skip
    start = logits_ptr + (wide_row // W) * stride_user + (wide_row % W) * stride_beam
    x = tame(tl.load(start + code, mask=live, other=float("-inf")))
    if NORMALIZE == 0:
        total = tame(tl.load(logsumexp_ptr + row))
    elif NORMALIZE == 1:
        total = _total_of(tame(tl.load(start + j, mask=(degree > 0) & (j < K), other=float("-inf"))))
    else:
        total = _total_of(x)
    sums = score + tl.minimum(x - finite(total), 0.0)
    ordered = _ordered(tl.where(live, tl.where(total == float("-inf"), total, sums), float("-inf")))
    inverted = LOW - ((row % W) * BLOCK_K + j)
    key = (ordered.to(tl.int64) << 32) | inverted.to(tl.int64)

    if BLOCK_K == KEPT:
        best = tl.sort(tl.where(ordered > NEVER, key, DEAD), descending=True)
    else:
        bound, bound_place = tl.full([], NEVER, tl.int32), tl.full([], 0, tl.int32)
        if degree > KEPT:
            maxima = tl.max(tl.reshape(ordered, [BLOCK_K // KEPT, KEPT]), 0)
            bound = _element(tl.sort(maxima, descending=True), width)
        kept_ptr += wide_row * KEPT
        at = tl.arange(0, KEPT)
        best = tl.full([KEPT], DEAD, tl.int64)
        count = tl.full([], KEPT + 1, tl.int32)
        while count > KEPT:
            reach = (ordered > bound) | ((ordered == bound) & (inverted >= bound_place))
            ones = (reach & (ordered > NEVER)).to(tl.int32)
            place = tl.cumsum(ones, 0) - 1
            tl.store(kept_ptr + place, key, mask=(ones > 0) & (place < KEPT))
            count = tl.sum(ones, 0)
            tl.debug_barrier()  # what some threads wrote others read
            best = tl.sort(tl.load(kept_ptr + at, mask=at < count, other=DEAD), descending=True)
            tl.debug_barrier()
            last = _element(best, width)
            bound, bound_place = (last >> 32).to(tl.int32), (last & LOW).to(tl.int32)
    first = tl.arange(0, KEPT)
    tl.store(best_ptr + wide_row * TOP + first, best, mask=first < TOP)


@triton.jit
def merge_kernel(
    best_ptr, begins_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    W, width,
    BLOCK_K: tl.constexpr, TOP: tl.constexpr, LISTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One user: the best of its beams' lists [W, TOP], some ranks of all lists at a time."""
    user = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNK)
    beam, step = at % LISTS, at // LISTS
    lists_ptr = best_ptr + (user * W + beam) * TOP + step
    best = tl.full([CHUNK], DEAD, tl.int64)
    bound, next_best = tl.full([], DEAD, tl.int64), tl.full([], 2**63 - 1, tl.int64)
    rank = 0
    while (rank < TOP) & (next_best > bound):  # the lists fall, so what follows is below what was last
        here = (beam < W) & (rank + step < TOP)
        more = tl.load(lists_ptr + rank, mask=here, other=DEAD)
        next_best = tl.max(tl.where(step == CHUNK // LISTS - 1, more, DEAD), 0)
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
    """How a beam step is cut: a program a beam sorts ``kept`` candidates at once and leaves the ``top``
    best; a program a user merges the ``lists`` of its beams, ``chunk`` candidates at a time.
    """

    block_k: int
    top: int
    kept: int
    lists: int
    chunk: int

    @property
    def warps(self) -> int:
        return min(16, max(4, self.block_k // PER_WARP))

    @property
    def registers(self) -> int:
        """All that a thread can have: left to itself, ptxas rounds down for occupancy and spills a few."""
        return min(REGISTERS, 65536 // (32 * self.warps))

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_K": self.block_k, "TOP": self.top, "KEPT": self.kept}

    @property
    def merge(self) -> dict[str, int]:
        return {"BLOCK_K": self.block_k, "TOP": self.top, "LISTS": self.lists, "CHUNK": self.chunk}


def plan_of(beams: int, size: int, width: int) -> Plan:
    """Two launches; sizes are rounded up to few classes, so that all kernels compile ahead of time."""
    block_k = max(MIN_BLOCK_K, triton.next_power_of_2(size))
    wanted = next(top for top in TOPS if width < top)
    top, lists = min(wanted, block_k), triton.next_power_of_2(max(1, beams))
    kept = min(max(FIRST_ROUND, 2 * top), block_k)
    return Plan(block_k, top, kept, lists, max(wanted, lists, min(MERGED, top * lists)))


def problem(beams: int, size: int, width: int) -> str:
    """Why a beam step of this shape cannot run here; empty where it can."""
    if beams <= MAX_BEAMS and size <= MAX_CODES and width <= MAX_WIDTH:
        return ""
    return (
        f"the Triton backend takes up to {MAX_BEAMS} beams, {MAX_CODES} codes and width {MAX_WIDTH}, "
        f"got {beams}, {size} and {width}; use backend='torch'"
    )


@on_its_gpu
def softmax(
    logits: Tensor, nodes: Tensor, trie: TrieArrays, normalize: int, logsumexp: Tensor | None,
    filter: FilterTensors | None,
) -> Tensor:  # fmt: skip
    """Checked input: ``logits`` [R, K] at ``nodes`` [R] int32 -> log-probabilities float32 [R, K]."""
    logits = _readable(logits)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    rows, size = logits.shape
    if rows:
        softmax_kernel[(rows,)](
            logits, _total(logits, logsumexp), nodes, trie.code, trie.first_child, out,
            *filter_operands(filter, trie, rows), logits.stride(0), size, trie.num_inner,
            NORMALIZE=normalize, **filter_kinds(filter), BLOCK=softmax_block(size), num_warps=4,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return out


@on_its_gpu
def beam_step(
    logits: Tensor, scores: Tensor, nodes: Tensor, trie: TrieArrays, width: int, normalize: int,
    logsumexp: Tensor | None, filter: FilterTensors | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Checked input: ``logits`` [B, W, K], ``scores`` and ``nodes`` (int32) [B, W] -> what BeamStep holds."""
    users, beams, size = logits.shape
    refused = problem(beams, size, width)
    if refused:
        raise ValueError(refused)
    logits, scores, device = _readable(logits), scores.float().contiguous(), logits.device
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
        logits, _total(logits, logsumexp), scores, nodes, trie.code, trie.first_child, begins, kept, best,
        *filter_operands(filter, trie, rows), logits.stride(0), logits.stride(1), beams, size,
        trie.num_inner, width,
        NORMALIZE=normalize, **filter_kinds(filter), **plan.constants, num_warps=plan.warps,
        maxnreg=plan.registers,
    )  # fmt: skip
    merge_kernel[(users,)](best, begins, trie.code, *out, beams, width, **plan.merge,
                           num_warps=MERGE_WARPS)  # fmt: skip
    return out


def softmax_block(size: int) -> int:
    return min(SOFTMAX_BLOCK, max(MIN_SOFTMAX_BLOCK, triton.next_power_of_2(size)))


def _readable(logits: Tensor) -> Tensor:
    """Of a dtype the kernels read, each row's codes side by side."""
    logits = logits if logits.dtype in DTYPES else logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _total(logits: Tensor, logsumexp: Tensor | None) -> Tensor:
    """The pointer where the kernel expects the log-sum-exp; any other where it reads none."""
    return logits if logsumexp is None else logsumexp.float().contiguous()


def aot_cases(every: bool = False) -> list[AotCase]:
    """Any two of normalisation, dtype, filter and the widest cuts meet, or all that there are."""
    kinds = range(3), tuple(DTYPES.values()), range(3), (False, True)
    sizes, beams = powers_of_two(MAX_CODES), powers_of_two(MAX_BEAMS)
    cuts = list(product(beams, sizes, (*(top - 1 for top in TOPS[:-1]), MAX_WIDTH)))
    if every:
        own = {(*plan_of(*cut).constants.values(),): cut for cut in cuts}
        cases = [_beam_step_case(*choice) for choice in product(own.values(), *kinds)]
        blocks = {softmax_block(size) for size in sizes}
        cases += [_softmax_case(*choice) for choice in product(sorted(blocks), *kinds)]
        return cases + [_merge_case(*cut) for cut in _merges(cuts)]
    cases = [_beam_step_case(*choice) for choice in pairwise(_widest(cuts), *kinds)]
    cases += [_softmax_case(*choice) for choice in pairwise((1, 256, SOFTMAX_BLOCK), *kinds)]
    return [*cases, _merge_case(MAX_BEAMS, MAX_CODES, MAX_WIDTH)]


def _merges(cuts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """One of those (beams, size, width) that want the same merge; BLOCK_K is only a divisor there."""
    return list({(*plan_of(*c).merge.values(),)[1:]: c for c in cuts}.values())


def _widest(cuts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Of each number of warps, the (beams, size, width) whose threads hold most."""
    fullest: dict[int, tuple[int, tuple[int, int, int]]] = {}
    for cut in cuts:
        plan = plan_of(*cut)
        held = plan.block_k + plan.kept
        fullest[plan.warps] = max(fullest.get(plan.warps, (0, cut)), (held, cut))
    return [cut for _, cut in fullest.values()]


def _code(size: int) -> str:
    return "*u8" if size <= 256 else "*i16"


def _name(normalize: int, dtype: str, bitmaps: int, closed: bool) -> str:
    filters = ("", " bitmap", " bitmaps")[bitmaps] + (" closed" if closed else "")
    return f"{('vocab', 'level', 'valid')[normalize]} {dtype}{filters}"


def _case(
    name: str, kernel, types: dict[str, str], constants: dict[str, int], warps: int, **options: int | None
) -> AotCase:
    pointers = [argument for argument in types if argument.endswith("_ptr")]
    types = types | dict.fromkeys(constants, "constexpr")
    return AotCase(name, kernel, types, constants, {"num_warps": warps, **options}, pointers)


def _softmax_case(size: int, normalize: int, dtype: str, bitmaps: int, closed: bool) -> AotCase:
    types = {
        "logits_ptr": f"*{dtype}", "logsumexp_ptr": f"*{dtype if normalize else 'fp32'}", "nodes_ptr": "*i32",
        "code_ptr": _code(size), "first_child_ptr": "*i64", "out_ptr": "*fp32",
        **filter_types(), "stride_logits": "i32", "K": "i32", "num_inner": "i32",
    }  # fmt: skip
    constants = {"NORMALIZE": normalize, "BITMAPS": bitmaps, "CLOSED": closed,
                 "BLOCK": softmax_block(size)}  # fmt: skip
    name = f"trie_softmax K={size} {_name(normalize, dtype, bitmaps, closed)}"
    return _case(name, softmax_kernel, types, constants, 4, maxnreg=REGISTERS)


def _beam_step_case(
    cut: tuple[int, int, int], normalize: int, dtype: str, bitmaps: int, closed: bool
) -> AotCase:
    beams, size, width = cut
    plan = plan_of(*cut)
    types = {
        "logits_ptr": f"*{dtype}", "logsumexp_ptr": f"*{dtype if normalize else 'fp32'}",
        "scores_ptr": "*fp32", "nodes_ptr": "*i32", "code_ptr": _code(size), "first_child_ptr": "*i64",
        "begins_ptr": "*i32", "kept_ptr": "*i64", "best_ptr": "*i64",
        **filter_types(), "stride_user": "i32",
        "stride_beam": "i32", "W": "i32", "K": "i32", "num_inner": "i32", "width": "i32",
    }  # fmt: skip
    constants = {"NORMALIZE": normalize, "BITMAPS": bitmaps, "CLOSED": closed, **plan.constants}
    name = f"trie_beam_step W={beams} K={size} width={width} {_name(normalize, dtype, bitmaps, closed)}"
    return _case(name, beam_step_kernel, types, constants, plan.warps, maxnreg=plan.registers)


def _step_types() -> dict[str, str]:
    return {"out_scores_ptr": "*fp32", "parents_ptr": "*i64", "codes_ptr": "*i64", "new_nodes_ptr": "*i32",
            "pruned_ptr": "*fp32"}  # fmt: skip


def _merge_case(beams: int, size: int, width: int) -> AotCase:
    types = {"best_ptr": "*i64", "begins_ptr": "*i32", "code_ptr": _code(size)}
    results = {"scores_ptr" if name == "out_scores_ptr" else name: t for name, t in _step_types().items()}
    types |= results | {"W": "i32", "width": "i32"}
    name = f"trie_beam_step merge W={beams} K={size} width={width}"
    return _case(name, merge_kernel, types, plan_of(beams, size, width).merge, MERGE_WARPS)
