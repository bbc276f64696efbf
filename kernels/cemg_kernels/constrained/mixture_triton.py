"""The scores of all candidates of a beam step under an item prior, in Triton; defined in ``prior.py``.

One program per beam writes two rows by code: the scores of the mixture and the generator's own. The step then
selects among the former, as it does among log-probabilities. The mass below a child is a difference of prefix
sums in float64, between the positions of its first rank and of the next child's in the sorted ranks.
B users, W beams, K codes per level, Z items per prior.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import AotCase, pairwise
from ..runtime.dispatch import on_its_gpu
from ..runtime.triton_math import sanitize, zero_if_neg_inf
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import FilterTensors
from ..trie.filter_triton import (
    allowed,
    child_range,
    filter_kinds,
    filter_operands,
    filter_types,
    first_child,
    lower_bound,
)
from .beam_step_triton import (
    AXES,
    Plan,
    Shape,
    aot_shapes,
    beam_step,
    largest_plans,
    plan_of,
    problem,
    row_total,
)
from .prior import PriorTensors
from .softmax_triton import case_name, code_type, kernel_case, logsumexp_pointer, readable_logits

PER_WARP = 64  # children whose masses a warp looks up at a time: more need float64 registers


@triton.jit
def _log_add_exp(a, b):
    """Returns log(exp(a) + exp(b)) in float64; -inf if both are."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return high + tl.log(1.0 + tl.exp(low - zero_if_neg_inf(high)))


# B=1 W=50 K=256 fp32, all children: reads 51 KB of logits, 13 KB of codes and up to 16 KB of prior per beam,
# writes 102 KB. Bound by latency: the walk to the leaves, then 11 steps of a binary search for 1,350 items.
@triton.jit
def mixture_kernel(
    logits_ptr, logsumexp_ptr, scores_ptr, own_ptr, nodes_ptr, code_ptr, first_child_ptr,
    ranks_ptr, sums_ptr, weight_ptr, log_weight_ptr, log_rest_ptr, mixed_out_ptr, own_out_ptr,
    open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps, rows_per_request,
    stride_user, stride_beam, W, K, num_inner, Z, search_steps,
    NORMALIZE: tl.constexpr, BITMAPS: tl.constexpr, CLOSED: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One beam: writes -inf to all codes, then the scores of its children."""
    row = tl.program_id(0)
    row_64 = row.to(tl.int64)
    user = row_64 // W
    node, score = tl.load(nodes_ptr + row), sanitize(tl.load(scores_ptr + row))
    inner = (node >= 0) & (node < num_inner) & (score > float("-inf"))
    begin, end = child_range(first_child_ptr, node, inner)
    degree = end - begin
    start = logits_ptr + user * stride_user + (row_64 % W) * stride_beam
    j = tl.arange(0, BLOCK_K)
    live = j < degree
    live = allowed(begin + j, live, row, open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps,
                   rows_per_request, BITMAPS, CLOSED)  # fmt: skip
    code = tl.load(code_ptr + begin + j - 1, mask=live, other=0).to(tl.int32)
    x = sanitize(tl.load(start + code, mask=live, other=float("-inf")))
    total = row_total(x, start, logsumexp_ptr, row, j, degree, K, NORMALIZE)

    own_score, weight = sanitize(tl.load(own_ptr + row)), tl.load(weight_ptr + user)
    log_weight, log_rest = tl.load(log_weight_ptr + user), tl.load(log_rest_ptr + user)
    ranks_ptr += user * Z
    sums_ptr += user * (Z + 1)
    mixed_out_ptr += row_64 * K
    own_out_ptr += row_64 * K
    nothing = tl.full([BLOCK_K], float("-inf"), tl.float32)
    tl.store(mixed_out_ptr + j, nothing, mask=j < K)
    tl.store(own_out_ptr + j, nothing, mask=j < K)
    tl.debug_barrier()  # the stores below overwrite some of these
    for first in range(0, degree, TILE):
        child = begin + first + tl.arange(0, TILE)
        exists = child < end
        passes = allowed(child, exists, row, open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps,
                         rows_per_request, BITMAPS, CLOSED)  # fmt: skip
        code_of = tl.load(code_ptr + child - 1, mask=passes, other=0).to(tl.int32)
        logit = sanitize(tl.load(start + code_of, mask=passes, other=float("-inf")))
        own = own_score + tl.minimum(logit - zero_if_neg_inf(total), 0.0)
        own = tl.where(total == float("-inf"), total, own)
        low, high, level = child, child + 1, begin  # the next node's first leaf ends a node's leaves
        while level < num_inner:
            low, high = first_child(first_child_ptr, low, exists), first_child(first_child_ptr, high, exists)
            level = first_child(first_child_ptr, level, level < num_inner)
        at_low = lower_bound(ranks_ptr, low - num_inner, Z, search_steps, exists)
        at_high = lower_bound(ranks_ptr, high - num_inner, Z, search_steps, exists)
        mass = tl.load(sums_ptr + at_high, mask=exists, other=0.0) - tl.load(
            sums_ptr + at_low, mask=exists, other=0.0
        )
        has_mass = mass > 0
        of_prior = log_weight + tl.log(tl.where(has_mass, mass, 1.0))
        of_prior = tl.where(has_mass, of_prior, float("-inf"))
        mixed = _log_add_exp(log_rest + own.to(tl.float64), of_prior).to(tl.float32)
        tl.store(mixed_out_ptr + code_of, tl.where(weight == 0, own, mixed), mask=passes)
        tl.store(own_out_ptr + code_of, own, mask=passes)


def tile_of(plan: Plan) -> int:
    """Returns the number of children whose masses a program looks up at a time."""
    return min(plan.block_k, PER_WARP * plan.warps)


@on_its_gpu
def mixed_beam_step(
    logits: Tensor, scores: Tensor, nodes: Tensor, trie: TrieArrays, width: int, normalize: int,
    logsumexp: Tensor | None, filter: FilterTensors | None, prior: PriorTensors, own: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    """Computes a ``BeamStep`` of the mixture, and the generator's scores of all candidates, [B, W, K].

    Arguments are checked: logits [B, W, K], scores and ``own`` [B, W], nodes int32 [B, W].
    """
    users, beams, size = logits.shape
    reason = problem(beams, size, width)
    if reason:
        raise ValueError(reason)
    logits = readable_logits(logits)
    mixed, all_own = (torch.empty(users, beams, size, device=logits.device) for _ in range(2))
    rows, plan, items = users * beams, plan_of(beams, size, width), prior.ranks.shape[1]
    if rows:
        mixture_kernel[(rows,)](
            logits, logsumexp_pointer(logits, logsumexp), scores.float().contiguous(),
            own.float().contiguous(), nodes, trie.code, trie.first_child, prior.ranks, prior.sums,
            prior.weight, prior.weight.log(), torch.log1p(-prior.weight), mixed, all_own,
            *filter_operands(filter, trie, rows), logits.stride(0), logits.stride(1), beams, size,
            trie.num_inner, items, items.bit_length(),
            NORMALIZE=normalize, **filter_kinds(filter), BLOCK_K=plan.block_k, TILE=tile_of(plan),
            num_warps=plan.warps, maxnreg=plan.registers,
        )  # fmt: skip
    zero = torch.zeros(users, beams, device=logits.device)
    return beam_step(mixed, zero, nodes, trie, width, 0, zero, None), all_own


def mixture_aot_cases(every: bool = False) -> list[AotCase]:
    """Returns cases in which any two of shape, normalisation, dtype and filter occur together, or all."""
    shapes = aot_shapes()
    if not every:
        return [_mixture_case(*choice) for choice in pairwise(largest_plans(shapes), *AXES)]
    distinct = {(plan.block_k, tile_of(plan)): shape for shape in shapes for plan in (plan_of(*shape),)}
    return [_mixture_case(*choice) for choice in product(distinct.values(), *AXES)]


def _mixture_case(shape: Shape, normalize: int, dtype: str, bitmaps: int, closed: bool) -> AotCase:
    """Returns one configuration for ahead-of-time compilation."""
    beams, size, _ = shape
    plan = plan_of(*shape)
    types = {
        "logits_ptr": f"*{dtype}", "logsumexp_ptr": f"*{dtype if normalize else 'fp32'}",
        "scores_ptr": "*fp32", "own_ptr": "*fp32", "nodes_ptr": "*i32", "code_ptr": code_type(size),
        "first_child_ptr": "*i64", "ranks_ptr": "*i32", "sums_ptr": "*fp64", "weight_ptr": "*fp64",
        "log_weight_ptr": "*fp64", "log_rest_ptr": "*fp64", "mixed_out_ptr": "*fp32", "own_out_ptr": "*fp32",
        **filter_types(), "stride_user": "i32", "stride_beam": "i32", "W": "i32", "K": "i32",
        "num_inner": "i32", "Z": "i32", "search_steps": "i32",
    }  # fmt: skip
    constants = {"NORMALIZE": normalize, "BITMAPS": bitmaps, "CLOSED": closed, "BLOCK_K": plan.block_k,
                 "TILE": tile_of(plan)}  # fmt: skip
    name = f"trie_beam_step prior W={beams} K={size} {case_name(normalize, dtype, bitmaps, closed)}"
    return kernel_case(name, mixture_kernel, types, constants, plan.warps, maxnreg=plan.registers)
