"""The Triton kernels of ``lightgcn_propagate``; they sum neighbour rows without an array of edge values.

V vertices, D dimensions, L layers. With s = D^-1/2 per vertex, one layer of Horner's scheme is

    y <- x + s * (A (s * y))

A layer reads the table s * y, sums its neighbour rows in float32 and writes the table of the next layer. The
last layer divides by L + 1 instead. Vertices run in the order of their degrees, so the vertices of one
program have similar numbers of neighbours. Vertices with more than ``CHUNK`` neighbours are summed in two
steps, first per chunk, so no program runs long. The order of every sum is fixed, so results are reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..runtime.aot_case import MAX_REGISTERS, AotCase, pairwise, powers_of_two
from ..runtime.dispatch import on_its_gpu
from .bipartite import BipartiteGraph

MAX_DIM = 1024
LIGHT_DEGREE = 32  # several vertices of at most this degree share a program
CHUNK = 256  # neighbours per program, summed block by block
PER_WARP = 1024  # table entries per iteration
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TABLES = ("fp32", "bf16")


# A graph like Gowalla (71k vertices, 2.1 M directed edges), D = 64, fp32: 526 MB of gathered rows per layer
# from an 18 MB table that stays in L2, and 36 MB of x and tables. Bound by L2 bandwidth; a bf16 table halves
# the bytes.
@triton.jit
def layer_kernel(
    order_ptr, begin_ptr, neighbours_ptr, table_ptr, x_ptr, scale_ptr, out_ptr, first, last, divisor,
    D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Vertices order[first:last]. If not GATHER, the rows to sum are consecutive in the table."""
    position = first + tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    alive = position < last
    vertex = tl.load(order_ptr + position, mask=alive, other=0).to(tl.int64)
    bounds = vertex if GATHER else (position - first).to(tl.int64)
    begin = tl.load(begin_ptr + bounds, mask=alive, other=0)
    degree = tl.where(alive, tl.load(begin_ptr + bounds + 1, mask=alive, other=0) - begin, 0)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for e0 in range(0, tl.max(degree, 0), BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        exists = e[None, :] < degree[:, None]  # [BLOCK_V, BLOCK_E]
        row = begin[:, None] + e[None, :]
        if GATHER:
            row = tl.load(neighbours_ptr + row, mask=exists, other=0).to(tl.int64)
        inside = exists[:, :, None] & (d < D)[None, None, :]
        rows = tl.load(table_ptr + row[:, :, None] * D + d[None, None, :], mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32), 1)
    inside = alive[:, None] & (d < D)[None, :]
    offset = vertex[:, None] * D + d[None, :]
    scale = tl.load(scale_ptr + vertex, mask=alive, other=0.0)[:, None]
    y = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + scale * total
    y = y / divisor if FINAL else y * scale
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def chunk_kernel(
    chunk_ptr, neighbours_ptr, table_ptr, partial_ptr,
    D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums the neighbour rows of one chunk of edges; chunk_ptr [chunks, 2] holds begin and end."""
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
    """The order in which the vertices run, in three kinds: light, medium (up to CHUNK neighbours) and heavy.

    Args:
        order: int32 [V], the vertices by degree.
        neighbours: int32 [2 E].
        light_end: The end of the light vertices in ``order``.
        medium_end: The end of the medium vertices in ``order``.
        chunks: int64 [C, 2], begin and end of the edges of the heavy vertices, in pieces of up to CHUNK.
        chunk_begin: int64, the first chunk of each heavy vertex, and the end.
    """

    order: Tensor
    neighbours: Tensor
    light_end: int
    medium_end: int
    chunks: Tensor
    chunk_begin: Tensor


_schedules = WeakTensorKeyDictionary()  # keyed by ``neighbours``, the same tensor in eager and compiled calls


def schedule_of(graph: BipartiteGraph) -> Schedule:
    """Returns the schedule of a graph; computes it at first use."""
    schedule: Schedule | None = _schedules.get(graph.neighbours)
    if schedule is None:
        degree = graph.row_ptr.diff()
        order = degree.argsort(stable=True)
        light_end, medium_end = int((degree <= LIGHT_DEGREE).sum()), int((degree <= CHUNK).sum())
        heavy = order[medium_end:]
        pieces = (degree[heavy] + CHUNK - 1) // CHUNK
        chunk_begin = torch.cat((pieces.new_zeros(1), pieces.cumsum(0)))
        owner = torch.repeat_interleave(torch.arange(heavy.numel(), device=graph.device), pieces)
        index = torch.arange(owner.numel(), device=graph.device) - chunk_begin[owner]
        begin = graph.row_ptr[heavy][owner] + index * CHUNK
        end = torch.minimum(begin + CHUNK, graph.row_ptr[heavy + 1][owner])
        schedule = _schedules[graph.neighbours] = Schedule(
            order.to(torch.int32), graph.neighbours.to(torch.int32), light_end, medium_end,
            torch.stack((begin, end), dim=1).contiguous(), chunk_begin,
        )  # fmt: skip
    return schedule


@on_its_gpu
def propagate(
    graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the mean over the layers [V, D], in the dtype of ``x``, for checked arguments.

    ``table_dtype`` is the dtype of the gathered tables: float32 by default, or bfloat16, which halves the
    bytes read. Error bound for bfloat16: rounding changes a table by at most u = 2^-9, relatively. The rows
    that the j-th layer from the end gathers are off by u |y|, so the sum is off by u A_hat^j |y|, where |y|
    is at most the sum of A_hat^i |x| over i <= L - j. Over all j this is u times the sum of k A_hat^k |x|, so
    the mean is off by at most u L * (the mean of A_hat^k |x|), to first order in u.
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
    schedule = schedule_of(graph)
    table = (x.float() * graph.inv_sqrt_degree[:, None]).to(table_dtype)
    partial = torch.empty(len(schedule.chunks), dim, device=x.device)
    for layer in range(layers):
        final = layer == layers - 1
        out = torch.empty_like(x) if final else torch.empty_like(table)
        _layer(graph, schedule, table, partial, x, out, float(layers + 1), final)
        table = out
    return table


def _layer(
    graph: BipartiteGraph, schedule: Schedule, table: Tensor, partial: Tensor, x: Tensor, out: Tensor,
    divisor: float, final: bool,
) -> None:  # fmt: skip
    vertices, dim = x.shape
    scale = graph.inv_sqrt_degree
    ends = (0, schedule.light_end, schedule.medium_end, vertices)
    if len(schedule.chunks):
        chunk_kernel[(len(schedule.chunks),)](
            schedule.chunks, schedule.neighbours, table, partial,
            D=dim, **chunk_blocks(dim), num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    for kind in range(3):
        first, last = ends[kind], ends[kind + 1]
        if first == last:
            continue
        blocks, warps = layer_blocks(dim, kind)
        grid = (triton.cdiv(last - first, blocks["BLOCK_V"]),)
        begin, source = (schedule.chunk_begin, partial) if kind == 2 else (graph.row_ptr, table)
        layer_kernel[grid](
            schedule.order, begin, schedule.neighbours, source, x, scale, out, first, last, divisor,
            D=dim, **blocks, GATHER=kind < 2, FINAL=final, num_warps=warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def layer_blocks(dim: int, kind: int) -> tuple[dict[str, int], int]:
    """Returns tile sizes and warps for light (0), medium (1) and heavy (2) vertices.

    The tiles are the smallest that keep a warp busy, so that few vertices wait for the longest row of a tile.
    """
    block = triton.next_power_of_2(dim)
    edges = 4 if kind == 0 else max(4, PER_WARP // block)
    vertices = min(16, max(1, PER_WARP // (edges * block))) if kind == 0 else 1
    warps = max(1, vertices * edges * block // PER_WARP)
    return {"BLOCK_V": vertices, "BLOCK_E": edges, "BLOCK_D": block}, warps


def chunk_blocks(dim: int) -> dict[str, int]:
    """Returns the tile sizes of ``chunk_kernel``."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK_E": max(4, 4 * PER_WARP // block), "BLOCK_D": block}


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns cases for each kind of vertex, in a middle and in the last layer, with full and partial tiles.

    By default any two choices of dimension, dtype, table dtype, kind and layer occur together in one case.
    """
    axes = tuple(DTYPES.values()), TABLES, range(3), (False, True)
    if every:
        dims = sorted({d for block in powers_of_two(MAX_DIM) for d in (block, block // 2 + 1)})
        cases, chunked = [_layer_case(*choice) for choice in product(dims, *axes)], dims
    else:
        chosen = pairwise([1, 64, 100, 256, MAX_DIM], *axes)
        cases, chunked = [_layer_case(*choice) for choice in chosen], [MAX_DIM]
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
    read = "sums" if kind == 2 else table  # the last layer writes the dtype of x in any case
    name = f"lightgcn_propagate D={dim} {dtype} table {read} kind {kind}"
    name += " final" if final else f" to {table}"
    pointers = [argument for argument in types if argument.endswith("_ptr")]
    types |= dict.fromkeys(constants, "constexpr")
    return AotCase(
        name, layer_kernel, types, constants, {"num_warps": warps, "maxnreg": MAX_REGISTERS}, pointers
    )


def _chunk_case(dim: int, table: str) -> AotCase:
    constants = {"D": dim, **chunk_blocks(dim)}
    types = {"chunk_ptr": "*i64", "neighbours_ptr": "*i32", "table_ptr": f"*{table}", "partial_ptr": "*fp32"}
    pointers = list(types)
    types |= dict.fromkeys(constants, "constexpr")
    name = f"lightgcn_propagate chunks D={dim} table {table}"
    return AotCase(name, chunk_kernel, types, constants, {"num_warps": 4, "maxnreg": MAX_REGISTERS}, pointers)
