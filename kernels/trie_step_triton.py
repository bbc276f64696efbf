# mypy: disable-error-code="no-untyped-def"
"""A decoding step on the trie, on a GPU: masked log-probabilities, and the choice of the next beams.

B users, W beams, K codes a level. A beam's candidates are its children, in the order of their codes; a
candidate is one int64, its score's bits, ordered as the score is, over its place (parent, child) counted
down: no two are equal, and ties fall to the lowest (parent, code).

A program holds the scores of a tile of parents in registers. Any width + 1 candidates bound the width + 1
best from below; so it keeps what reaches a bound, sorts that, and where more than ``KEPT`` reach it, the
first ``KEPT`` give a higher bound and it looks again: exact, and never without end, since each round leaves
KEPT - width - 1 out. The first bound comes from the maxima of ``KEPT`` groups, and as a rule is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase, pairwise, powers_of_two
from .filter_tensors import FilterTensors
from .trie_arrays import TrieArrays
from .trie_filter_triton import (
    allowed,
    filter_kinds,
    filter_operands,
    filter_types,
    finite,
    first_child,
    tame,
)

MAX_BEAMS, MAX_WIDTH, MAX_CODES = 256, 256, 4096
WHOLE = 16384  # candidates of a user that one program takes
TILE = 8192  # of a program, where a user's are more: then a second launch merges
FIRST_ROUND = 256  # candidates sorted at once, at least
PER_WARP = 256  # candidates at a time, so that none of a thread's registers spills
SOFTMAX_BLOCK = 512
MERGE_WARPS = 8
SOFTMAX_REGISTERS = 255  # as many as it wants: left to itself, ptxas keeps to 32 and spills a few
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
    rows = tl.program_id(0) + tl.arange(0, 1)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    out_ptr += row * K
    node = tl.load(nodes_ptr + row)
    inner = (node >= 0) & (node < num_inner)
    begin = first_child(first_child_ptr, node, inner)
    end = first_child(first_child_ptr, node + 1, inner)
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
                live = allowed(at, live, rows, open_ptr, filter_of_ptr, closed_ptr, words, most_closed,
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
        live = allowed(child, live, rows, open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps,
                       rows_per_request, BITMAPS, CLOSED)  # fmt: skip
        code = tl.load(code_ptr + child - 1, mask=live, other=0).to(tl.int32)
        x = tame(tl.load(logits_ptr + code, mask=live, other=float("-inf")))
        tl.store(out_ptr + code, tl.minimum(x - finite(total), 0.0), mask=live)


@triton.jit
def _row_total(x, highest):
    """Log-sum-exp of the rows of ``x``, whose maxima are ``highest``; [P, 1], -inf where all are."""
    total = tl.sum(tl.exp(x - finite(highest)), 1)[:, None]
    return highest + tl.log(tl.where(highest == float("-inf"), 1.0, total))


@triton.jit
def _group_maxima(ordered, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """The maxima of GROUP_ROWS * COLUMNS groups of ``ordered`` [ROWS, BLOCK_K]."""
    maxima = tl.max(tl.reshape(ordered, [ROWS, BLOCK_K // COLUMNS, COLUMNS]), 1)  # [ROWS, COLUMNS]
    maxima = tl.max(tl.reshape(maxima, [ROWS // GROUP_ROWS, GROUP_ROWS, COLUMNS]), 0)
    return tl.reshape(maxima, [GROUP_ROWS * COLUMNS])


@triton.jit
def _element(x, place):
    """Element ``place`` of ``x`` [N] as a scalar."""
    at = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(at == place, x, tl.zeros_like(x)), 0)


@triton.jit
def _write_beams(
    keys, user, ranges_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    width, P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The next beams of ``user`` from its candidates ``keys``, best first, and the best that was cut."""
    at = tl.arange(0, keys.shape[0])
    alive = keys > DEAD
    bits = (keys >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ LOW, bits).to(tl.float32, bitcast=True)
    score = tl.where(alive, score, float("-inf"))
    place = tl.where(alive, LOW - (keys & LOW).to(tl.int32), 0)
    parent = place // BLOCK_K
    # from the ranges of the first tile on
    begin = tl.load(ranges_ptr + parent // P * (P * BLOCK_K + 2 * P) + parent % P, mask=alive, other=0)
    child = begin + place % BLOCK_K
    code = tl.load(code_ptr + child - 1, mask=alive, other=0)
    out, kept = user * width + at, at < width
    tl.store(scores_ptr + out, score, mask=kept)
    tl.store(parents_ptr + out, parent.to(tl.int64), mask=kept)
    tl.store(codes_ptr + out, code.to(tl.int64), mask=kept)
    tl.store(new_nodes_ptr + out, tl.where(alive, child, -1), mask=kept)
    tl.store(pruned_ptr + user + at * 0, score, mask=at == width)


# B=1 W=50 K=256 fp32, all children: read 51 KB logits + 13 KB codes, write 1 KB. Bound by latency: loads that
# wait for one another, two sorts of 256.
@triton.jit
def beam_step_kernel(
    logits_ptr, logsumexp_ptr, scores_ptr, nodes_ptr, code_ptr, first_child_ptr, sums_ptr, kept_ptr, best_ptr,
    out_scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps, rows_per_request,
    stride_user, stride_beam, W, K, num_inner, tiles, width,
    NORMALIZE: tl.constexpr, BITMAPS: tl.constexpr, CLOSED: tl.constexpr, FINAL: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TOP: tl.constexpr, KEPT: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of P parents, ROWS at a time: where FINAL the next beams, else the TOP best, in order."""
    program = tl.program_id(0)
    user, tile = program // tiles, program % tiles
    wide_user, wide_program = user.to(tl.int64), program.to(tl.int64)
    j = tl.arange(0, BLOCK_K)[None, :]
    sums_ptr += wide_program * (P * BLOCK_K + 2 * P)
    ranges_ptr = sums_ptr + P * BLOCK_K  # of each parent where its children begin, then how many they are
    kept_ptr += wide_program * KEPT
    many: tl.constexpr = P * BLOCK_K > KEPT
    maxima = tl.full([KEPT], NEVER, tl.int32)
    every = tl.arange(0, P)
    parents = tile * P + every
    rows = user * W + tl.minimum(parents, W - 1)
    nodes = tl.load(nodes_ptr + rows)
    inner = (parents < W) & (nodes >= 0) & (nodes < num_inner)
    inner = inner & (tame(tl.load(scores_ptr + rows)) > float("-inf"))
    begins = first_child(first_child_ptr, nodes, inner)
    tl.store(ranges_ptr + every, begins)
    tl.store(ranges_ptr + P + every, first_child(first_child_ptr, nodes + 1, inner) - begins)
    tl.debug_barrier()  # what some threads wrote others read
    for first in range(0, P, ROWS):
        in_tile = first + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
        parent = tile * P + in_tile
        row = user * W + tl.minimum(parent, W - 1)
        score = tame(tl.load(scores_ptr + row))
        begin = tl.load(ranges_ptr + in_tile)
        degree = tl.load(ranges_ptr + P + in_tile)
        child, live = begin + j, j < degree  # [ROWS, BLOCK_K]
        code = tl.load(code_ptr + child - 1, mask=live, other=0).to(tl.int32)
        live = allowed(child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps,
                       rows_per_request, BITMAPS, CLOSED)  # fmt: skip
        start = logits_ptr + wide_user * stride_user + parent.to(tl.int64) * stride_beam  # [ROWS, 1]
        x = tame(tl.load(start + code, mask=live, other=float("-inf")))
        if NORMALIZE == 0:
            total = tame(tl.load(logsumexp_ptr + row))
        elif NORMALIZE == 1:
            columns = tame(tl.load(start + j, mask=(degree > 0) & (j < K), other=float("-inf")))
            total = _row_total(columns, tl.max(columns, 1)[:, None])
        else:
            total = _row_total(x, tl.max(x, 1)[:, None])
        sums = score + tl.minimum(x - finite(total), 0.0)
        ordered = _ordered(tl.where(live & (total > float("-inf")), sums, float("-inf")))
        tl.store(sums_ptr + in_tile * BLOCK_K + j, ordered)
        if many:
            maxima = tl.maximum(maxima, _group_maxima(ordered, ROWS, BLOCK_K, GROUP_ROWS, KEPT // GROUP_ROWS))
    tl.debug_barrier()

    bound, bound_place = tl.full([], NEVER, tl.int32), tl.full([], 0, tl.int32)
    if many:
        bound = _element(tl.sort(maxima, descending=True), width)
    at = tl.arange(0, KEPT)
    best = tl.full([KEPT], DEAD, tl.int64)
    count = tl.full([], KEPT + 1, tl.int32)
    while count > KEPT:
        count = tl.full([], 0, tl.int32)
        for first in range(0, P, ROWS):
            in_tile = first + tl.arange(0, ROWS)[:, None]
            ordered = tl.load(sums_ptr + in_tile * BLOCK_K + j)
            inverted = LOW - ((tile * P + in_tile) * BLOCK_K + j)
            reach = (ordered > bound) | ((ordered == bound) & (inverted >= bound_place))
            reach = reach & (ordered > NEVER)
            ones = reach.to(tl.int32)
            of_row = tl.sum(ones, 1)
            place = count + (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(ones, 1) - 1
            key = (ordered.to(tl.int64) << 32) | inverted.to(tl.int64)
            tl.store(kept_ptr + place, key, mask=reach & (place < KEPT))
            count += tl.sum(of_row, 0)
        tl.debug_barrier()
        best = tl.sort(tl.load(kept_ptr + at, mask=at < count, other=DEAD), descending=True)
        tl.debug_barrier()
        last = _element(best, width)
        bound, bound_place = (last >> 32).to(tl.int32), (last & LOW).to(tl.int32)
    if FINAL:
        _write_beams(best, wide_user, ranges_ptr, code_ptr, out_scores_ptr, parents_ptr, codes_ptr,
                     new_nodes_ptr, pruned_ptr, width, P, BLOCK_K)  # fmt: skip
    else:
        tl.store(best_ptr + wide_program * TOP + at, best, mask=at < TOP)


@triton.jit
def merge_kernel(
    best_ptr, sums_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr, pruned_ptr,
    tiles, width,
    P: tl.constexpr, BLOCK_K: tl.constexpr, TOP: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One user: the best of its tiles' lists [tiles, TOP], some ranks of all lists at a time."""
    user = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNK)
    tile, step = at % TILES, at // TILES
    best = tl.full([CHUNK], DEAD, tl.int64)
    bound, next_best = tl.full([], DEAD, tl.int64), tl.full([], 2**63 - 1, tl.int64)
    rank = 0
    while (rank < TOP) & (next_best > bound):  # the lists fall, so what follows is below what was last
        here = (tile < tiles) & (rank + step < TOP)
        more = tl.load(best_ptr + (user * tiles + tile) * TOP + rank + step, mask=here, other=DEAD)
        best = tl.topk(tl.reshape(tl.join(best, more), [2 * CHUNK]), CHUNK)
        next_best = tl.max(tl.where(step == CHUNK // TILES - 1, more, DEAD), 0)
        bound = _element(best, width)
        rank += CHUNK // TILES
    ranges_ptr = sums_ptr + user * tiles * (P * BLOCK_K + 2 * P) + P * BLOCK_K
    _write_beams(best, user, ranges_ptr, code_ptr, scores_ptr, parents_ptr, codes_ptr, new_nodes_ptr,
                 pruned_ptr, width, P, BLOCK_K)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """How a beam step is cut: ``tiles`` programs a user, each of ``parents`` beams, ``rows`` at a time; the
    ``kept`` best candidates are sorted at once, groups take every ``group_rows``-th row.
    """

    tiles: int
    parents: int
    rows: int
    block_k: int
    top: int
    kept: int
    group_rows: int
    warps: int

    @property
    def registers(self) -> int:
        """All that a thread can have: left to itself, ptxas rounds down for occupancy and spills a few."""
        return min(255, 65536 // (32 * self.warps))

    @property
    def constants(self) -> dict[str, int]:
        return {"FINAL": self.tiles == 1, "P": self.parents, "ROWS": self.rows, "BLOCK_K": self.block_k,
                "TOP": self.top, "KEPT": self.kept, "GROUP_ROWS": self.group_rows}  # fmt: skip

    @property
    def merge(self) -> dict[str, int]:
        tiles = triton.next_power_of_2(self.tiles)
        return {
            "P": self.parents,
            "BLOCK_K": self.block_k,
            "TOP": self.top,
            "TILES": tiles,
            "CHUNK": max(self.top, tiles),
        }


def plan_of(beams: int, size: int, width: int) -> Plan:
    """One launch up to ``WHOLE`` candidates a user (W <= 64 and K <= 256), two beyond."""
    block_k, parents = triton.next_power_of_2(size), triton.next_power_of_2(beams)
    top = triton.next_power_of_2(width + 1)
    if parents * block_k > WHOLE:
        parents = max(1, TILE // block_k)
    candidates = parents * block_k
    warps = min(16 if parents > 1 else 8, max(4, candidates // 256))
    rows = min(parents, max(1, warps * PER_WARP // block_k))
    kept = max(top, min(max(FIRST_ROUND, 2 * top), candidates))
    group_rows = min(rows, max(8, kept // block_k))
    return Plan(triton.cdiv(beams, parents), parents, rows, block_k, top, kept, group_rows, warps)


def problem(beams: int, size: int, width: int) -> str:
    """Why a beam step of this shape cannot run here; empty where it can."""
    if beams <= MAX_BEAMS and size <= MAX_CODES and width <= MAX_WIDTH:
        return ""
    return (
        f"the Triton backend takes up to {MAX_BEAMS} beams, {MAX_CODES} codes and width {MAX_WIDTH}, "
        f"got {beams}, {size} and {width}; use backend='torch'"
    )


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
            maxnreg=SOFTMAX_REGISTERS,
        )  # fmt: skip
    return out


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
    programs = users * plan.tiles
    room = plan.parents * plan.block_k + 2 * plan.parents  # sums of scores, and the parents' children
    sums = torch.empty(programs, room, dtype=torch.int32, device=device)
    kept = torch.empty(programs, plan.kept, dtype=torch.int64, device=device)
    best = kept if plan.tiles == 1 else torch.empty(programs, plan.top, dtype=torch.int64, device=device)
    beam_step_kernel[(programs,)](
        logits, _total(logits, logsumexp), scores, nodes, trie.code, trie.first_child, sums, kept, best, *out,
        *filter_operands(filter, trie, users * beams), logits.stride(0), logits.stride(1), beams, size,
        trie.num_inner, plan.tiles, width,
        NORMALIZE=normalize, **filter_kinds(filter), **plan.constants, num_warps=plan.warps,
        maxnreg=plan.registers,
    )  # fmt: skip
    if plan.tiles > 1:
        merge_kernel[(users,)](best, sums, trie.code, *out, plan.tiles, width, **plan.merge,
                             num_warps=MERGE_WARPS)  # fmt: skip
    return out


def softmax_block(size: int) -> int:
    return min(SOFTMAX_BLOCK, triton.next_power_of_2(size))


def _readable(logits: Tensor) -> Tensor:
    """Of a dtype the kernels read, each row's codes side by side."""
    logits = logits if logits.dtype in DTYPES else logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _total(logits: Tensor, logsumexp: Tensor | None) -> Tensor:
    """The pointer where the kernel expects the log-sum-exp; any other where it reads none."""
    return logits if logsumexp is None else logsumexp.float().contiguous()


def aot_cases(every: bool = False) -> list[AotCase]:
    """Any two of normalisation, dtype, filter and the widest cuts meet, or every class of sizes as well;
    of the softmax all that there are.
    """
    kinds = range(3), tuple(DTYPES.values()), range(3), (False, True)
    sizes, beams = powers_of_two(MAX_CODES), powers_of_two(MAX_BEAMS)
    widths = [min(top - 1, MAX_WIDTH) for top in powers_of_two(2 * MAX_WIDTH)[1:]]
    wide = _widest(product(beams, sizes, widths))
    steps = [(*cut, *kind) for cut, *kind in pairwise(wide, *kinds)]
    merges, rows = [(MAX_BEAMS, MAX_CODES, MAX_WIDTH)], pairwise((1, 256, SOFTMAX_BLOCK), *kinds)
    if every:
        steps += pairwise(beams, sizes, widths, *kinds)
        merges, rows = (
            _merges(product(beams, sizes, widths)),
            list(product(powers_of_two(SOFTMAX_BLOCK), *kinds)),
        )
    cases = [_beam_step_case(*step) for step in steps] + [_merge_case(*cut) for cut in merges]
    cases += [_softmax_case(*row) for row in rows]
    return list({case.name: case for case in cases}.values())


def _merges(cuts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """One of those (beams, size, width) that want the same merge; P and BLOCK_K are only divisors there."""
    return list({(*plan_of(*c).merge.values(),)[2:]: c for c in cuts if plan_of(*c).tiles > 1}.values())


def _widest(cuts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Of each number of warps, the (beams, size, width) whose threads hold most."""
    fullest: dict[int, tuple[int, tuple[int, int, int]]] = {}
    for cut in cuts:
        plan = plan_of(*cut)
        held = plan.rows * plan.block_k + plan.kept
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
    return _case(name, softmax_kernel, types, constants, 4, maxnreg=SOFTMAX_REGISTERS)


def _beam_step_case(
    beams: int, size: int, width: int, normalize: int, dtype: str, bitmaps: int, closed: bool
) -> AotCase:
    plan = plan_of(beams, size, width)
    types = {
        "logits_ptr": f"*{dtype}", "logsumexp_ptr": f"*{dtype if normalize else 'fp32'}",
        "scores_ptr": "*fp32", "nodes_ptr": "*i32", "code_ptr": _code(size), "first_child_ptr": "*i64",
        "sums_ptr": "*i32", "kept_ptr": "*i64", "best_ptr": "*i64", **_step_types(),
        **filter_types(), "stride_user": "i32",
        "stride_beam": "i32", "W": "i32", "K": "i32", "num_inner": "i32", "tiles": "i32",
        "width": "i32",
    }  # fmt: skip
    constants = {"NORMALIZE": normalize, "BITMAPS": bitmaps, "CLOSED": closed, **plan.constants}
    name = f"trie_beam_step W={beams} K={size} width={width} {_name(normalize, dtype, bitmaps, closed)}"
    return _case(name, beam_step_kernel, types, constants, plan.warps, maxnreg=plan.registers)


def _step_types() -> dict[str, str]:
    return {"out_scores_ptr": "*fp32", "parents_ptr": "*i64", "codes_ptr": "*i64", "new_nodes_ptr": "*i32",
            "pruned_ptr": "*fp32"}  # fmt: skip


def _merge_case(beams: int, size: int, width: int) -> AotCase:
    types = {"best_ptr": "*i64", "sums_ptr": "*i32", "code_ptr": _code(size)}
    results = {"scores_ptr" if name == "out_scores_ptr" else name: t for name, t in _step_types().items()}
    types |= results | {"tiles": "i32", "width": "i32"}
    name = f"trie_beam_step merge W={beams} K={size} width={width}"
    return _case(name, merge_kernel, types, plan_of(beams, size, width).merge, MERGE_WARPS)
