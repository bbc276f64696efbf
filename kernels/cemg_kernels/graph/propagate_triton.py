# mypy: disable-error-code="no-untyped-def"
"""LightGCN propagation on a GPU: neighbour rows are summed without an array of edge values.

V vertices, D dimensions, L layers. With s = D^-1/2 by vertex, a layer of Horner's form is

    y <- x + s * (A (s * y))

so a layer reads the table s * y, sums its neighbour rows in float32 and writes the next layer's table; the
last one divides by L + 1 instead. Vertices run in the order of their degrees: those of a
program have nearly as many neighbours each. A vertex of more than ``CHUNK`` neighbours is summed in two
steps, chunks first, so that no program is long; sums are in a fixed order, so results repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..runtime.aot import REGISTERS, AotCase, pairwise, powers_of_two
from ..runtime.dispatch import on_its_gpu
from .propagate import BipartiteGraph

MAX_DIM = 1024
FEW = 32  # up to so many neighbours, several vertices share a program
CHUNK = 256  # neighbours that one program adds up, one block after the other
PER_WARP = 1024  # numbers at a time
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TABLES = ("fp32", "bf16")


# Gowalla-shaped (71k vertices, 2.1 M directed edges), D = 64, fp32: 526 MB of gathered rows a layer, of which
# the 18 MB table stays in L2; 36 MB of x and tables otherwise. Bound by L2 bandwidth. A bf16 table halves it.
@triton.jit
def layer_kernel(
    order_ptr, begin_ptr, neighbours_ptr, table_ptr, x_ptr, scale_ptr, out_ptr, first, last, divisor,
    D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Vertices order[first:last]; where not GATHER, their summands lie one after the other in the table."""
    place = first + tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    alive = place < last
    vertex = tl.load(order_ptr + place, mask=alive, other=0).to(tl.int64)
    bounds = vertex if GATHER else (place - first).to(tl.int64)
    begin = tl.load(begin_ptr + bounds, mask=alive, other=0)
    degree = tl.where(alive, tl.load(begin_ptr + bounds + 1, mask=alive, other=0) - begin, 0)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for e0 in range(0, tl.max(degree, 0), BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        here = e[None, :] < degree[:, None]  # [BLOCK_V, BLOCK_E]
        row = begin[:, None] + e[None, :]
        if GATHER:
            row = tl.load(neighbours_ptr + row, mask=here, other=0).to(tl.int64)
        inside = here[:, :, None] & (d < D)[None, None, :]
        rows = tl.load(table_ptr + row[:, :, None] * D + d[None, None, :], mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32), 1)
    inside = alive[:, None] & (d < D)[None, :]
    at = vertex[:, None] * D + d[None, :]
    scale = tl.load(scale_ptr + vertex, mask=alive, other=0.0)[:, None]
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + scale * total
    y = y / divisor if FINAL else y * scale
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def chunk_kernel(
    chunk_ptr, neighbours_ptr, table_ptr, partial_ptr,
    D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the neighbour rows of one chunk of edges: chunk_ptr [chunks, 2] begin and end."""
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(chunk_ptr + 2 * chunk), tl.load(chunk_ptr + 2 * chunk + 1)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for e0 in range(0, end - begin, BLOCK_E):
        e = begin + e0 + tl.arange(0, BLOCK_E)
        row = tl.load(neighbours_ptr + e, mask=e < end, other=0).to(tl.int64)
        inside = (e < end)[:, None] & (d < D)[None, :]
        rows = tl.load(table_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    tl.store(partial_ptr + chunk * D + d, total, mask=d < D)


@dataclass(frozen=True, slots=True)
class Schedule:
    """In which order the vertices run: ``order`` [V] int32 by degree, few neighbours, more, over CHUNK.

    ``neighbours`` [2 E] int32; ``few`` and ``some`` end the first two kinds in ``order``; ``chunks``
    [C, 2] int64 are the edges of the third kind in pieces, ``chunk_begin`` its row pointers into them.
    """

    order: Tensor
    neighbours: Tensor
    few: int
    some: int
    chunks: Tensor
    chunk_begin: Tensor


_schedules = WeakTensorKeyDictionary()  # by neighbours, which compiled calls pass on as they are


def schedule_of(graph: BipartiteGraph) -> Schedule:
    """The graph's schedule, made at first use."""
    kept: Schedule | None = _schedules.get(graph.neighbours)
    if kept is None:
        degree = graph.row_ptr.diff()
        order = degree.argsort(stable=True)
        few, some = int((degree <= FEW).sum()), int((degree <= CHUNK).sum())
        heavy = order[some:]
        pieces = (degree[heavy] + CHUNK - 1) // CHUNK
        chunk_begin = torch.cat((pieces.new_zeros(1), pieces.cumsum(0)))
        owner = torch.repeat_interleave(torch.arange(heavy.numel(), device=graph.device), pieces)
        index = torch.arange(owner.numel(), device=graph.device) - chunk_begin[owner]
        begin = graph.row_ptr[heavy][owner] + index * CHUNK
        end = torch.minimum(begin + CHUNK, graph.row_ptr[heavy + 1][owner])
        kept = _schedules[graph.neighbours] = Schedule(
            order.to(torch.int32), graph.neighbours.to(torch.int32), few, some,
            torch.stack((begin, end), dim=1).contiguous(), chunk_begin,
        )  # fmt: skip
    return kept


@on_its_gpu
def propagate(
    graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None = None
) -> Tensor:
    """Checked input: ``x`` [V, D] -> the mean over the layers, of x's dtype.

    ``table_dtype`` of the gathered tables: float32 by default, or bfloat16, which halves what is read. It
    rounds a table by u = 2^-9 at most: what the j-th layer from the end gathers is off by u |y|, and so the
    sum by u A_hat^j |y|. There |y| <= the sum of A_hat^i |x| over i <= L - j; for all j that makes u times
    the sum of k A_hat^k |x|, so the mean is off by u L * (the mean of A_hat^k |x|) to first order in u.
    """
    dim = x.shape[1]
    if dim > MAX_DIM or x.dtype not in DTYPES:
        raise ValueError(
            f"the Triton backend takes float32, bfloat16 or float16 of up to {MAX_DIM} dimensions, "
            f"got {x.dtype} of {dim}; use backend='torch'"
        )
    x = x.contiguous()
    if layers == 0 or not x.numel() or not graph.neighbours.numel():
        return (x.float() / (layers + 1)).to(x.dtype)
    plan = schedule_of(graph)
    table = (x.float() * graph.inv_sqrt_degree[:, None]).to(table_dtype)
    partial = torch.empty(len(plan.chunks), dim, device=x.device)
    for layer in range(layers):
        final = layer == layers - 1
        out = torch.empty_like(x) if final else torch.empty_like(table)
        _layer(graph, plan, table, partial, x, out, float(layers + 1), final)
        table = out
    return table


def _layer(
    graph: BipartiteGraph, plan: Schedule, table: Tensor, partial: Tensor, x: Tensor, out: Tensor,
    divisor: float, final: bool,
) -> None:  # fmt: skip
    vertices, dim = x.shape
    scale = graph.inv_sqrt_degree
    ends = (0, plan.few, plan.some, vertices)
    if len(plan.chunks):
        chunk_kernel[(len(plan.chunks),)](
            plan.chunks, plan.neighbours, table, partial,
            D=dim, **chunk_blocks(dim), num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    for kind in range(3):
        first, last = ends[kind], ends[kind + 1]
        if first == last:
            continue
        blocks, warps = layer_blocks(dim, kind)
        grid = (triton.cdiv(last - first, blocks["BLOCK_V"]),)
        begin, source = (plan.chunk_begin, partial) if kind == 2 else (graph.row_ptr, table)
        layer_kernel[grid](
            plan.order, begin, plan.neighbours, source, x, scale, out, first, last, divisor,
            D=dim, **blocks, GATHER=kind < 2, FINAL=final, num_warps=warps, maxnreg=REGISTERS,
        )  # fmt: skip


def layer_blocks(dim: int, kind: int) -> tuple[dict[str, int], int]:
    """Tiles and warps for vertices of few neighbours (0), more (1) and those summed by chunks (2): as small
    as keeps a warp busy, so that no vertex waits for the neighbours of another.
    """
    block = triton.next_power_of_2(dim)
    edges = 4 if kind == 0 else max(4, PER_WARP // block)
    vertices = min(16, max(1, PER_WARP // (edges * block))) if kind == 0 else 1
    warps = max(1, vertices * edges * block // PER_WARP)
    return {"BLOCK_V": vertices, "BLOCK_E": edges, "BLOCK_D": block}, warps


def chunk_blocks(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK_E": max(4, 4 * PER_WARP // block), "BLOCK_D": block}


def aot_cases(every: bool = False) -> list[AotCase]:
    """Each kind of vertex, in a middle layer and the last, all that there are; or of some dimensions any two
    choices. Full tiles and not.
    """
    axes = tuple(DTYPES.values()), TABLES, range(3), (False, True)
    if every:
        dims = sorted({d for block in powers_of_two(MAX_DIM) for d in (block, block // 2 + 1)})
        cases, chunked = [_layer_case(*choice) for choice in product(dims, *axes)], dims
    else:
        some = pairwise([1, 64, 100, 256, MAX_DIM], *axes)
        cases, chunked = [_layer_case(*choice) for choice in some], [MAX_DIM]
    cases += [_chunk_case(dim, table) for dim in chunked for table in TABLES]
    return list({case.name: case for case in cases}.values())


def _layer_case(dim: int, dtype: str, table: str, kind: int, final: bool) -> AotCase:
    blocks, warps = layer_blocks(dim, kind)
    constants = {"D": dim, **blocks, "GATHER": kind < 2, "FINAL": final}
    types = {
        "order_ptr": "*i32", "begin_ptr": "*i64", "neighbours_ptr": "*i32",
        "table_ptr": "*fp32" if kind == 2 else f"*{table}", "x_ptr": f"*{dtype}", "scale_ptr": "*fp32",
        "out_ptr": f"*{dtype if final else table}", "first": "i32", "last": "i32", "divisor": "fp32",
    }  # fmt: skip
    read = "sums" if kind == 2 else table  # and the last layer writes x's dtype, whatever the table's
    name = f"lightgcn_propagate D={dim} {dtype} table {read} kind {kind}"
    name += " final" if final else f" to {table}"
    pointers = [argument for argument in types if argument.endswith("_ptr")]
    types |= dict.fromkeys(constants, "constexpr")
    return AotCase(name, layer_kernel, types, constants, {"num_warps": warps, "maxnreg": REGISTERS}, pointers)


def _chunk_case(dim: int, table: str) -> AotCase:
    constants = {"D": dim, **chunk_blocks(dim)}
    types = {"chunk_ptr": "*i64", "neighbours_ptr": "*i32", "table_ptr": f"*{table}", "partial_ptr": "*fp32"}
    pointers = list(types)
    types |= dict.fromkeys(constants, "constexpr")
    name = f"lightgcn_propagate chunks D={dim} table {table}"
    return AotCase(name, chunk_kernel, types, constants, {"num_warps": 4, "maxnreg": REGISTERS}, pointers)
