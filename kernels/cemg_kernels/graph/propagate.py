"""LightGCN propagation over a bipartite graph: the mean over L layers of normalised neighbour sums.

V = U + N vertices (users, then items), E distinct edges, D dimensions, L layers.

    A_hat = D^-1/2 A D^-1/2,    out = 1 / (L + 1) * sum of A_hat^k x for k = 0 ... L

Source: LightGCN, He et al. 2020, equations 3 and 4 with equal weights (https://arxiv.org/abs/2002.02126).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import fast_kernels_enabled, native, pick
from ..runtime.operands import tensor_of
from ..runtime.ranges import named_range, ranged
from ..runtime.registry import register
from .bipartite import BipartiteGraph

MAX_LAYERS = 10_000


@ranged
def lightgcn_propagate(
    graph: BipartiteGraph,
    x: Tensor,
    layers: int,
    *,
    table_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes the mean of A_hat^k x for k = 0 ... ``layers``.

    Repeated edges count once. A vertex of degree 0 gets x / (layers + 1). The operation is differentiable in
    ``x``: A_hat is symmetric, so the backward pass is the same operation. float64 is computed in float64, all
    other dtypes in float32.

    Args:
        graph: The graph, with V vertices.
        x: Floating point [V, D]; the rows are users, then items.
        layers: L, from 0 to 10,000.
        table_dtype: torch.bfloat16 lets the Triton backend gather rows rounded to bfloat16, half the bytes.
            The error of the result and of the gradient is then at most 1.01 * layers * 2^-9 * (the mean of
            A_hat^k |x|). The other backends ignore it.
        backend: "triton", "native" (C++ on the CPU; sums in float32), "sparse" (torch's CSR product: cuSPARSE
            on a GPU), "torch", "reference", or None for the dispatcher's choice. That is "sparse" (on a GPU)
            or "torch" (on a CPU) for float64, and "sparse" for more than 1,024 dimensions on a GPU.

    Returns:
        [V, D] in the dtype of ``x``.

    Raises:
        ValueError: The shape, dtype or device of ``x`` does not fit, or ``layers`` is out of range.

    Example:
        >>> graph = BipartiteGraph.from_edges([0], [0], num_users=1, num_items=1)
        >>> lightgcn_propagate(graph, torch.tensor([[1.0], [3.0]]), layers=1).tolist()
        [[2.0], [2.0]]
    """
    x = tensor_of("x", x)
    _check(graph, x, layers, table_dtype)
    if torch.compiler.is_compiling():
        arrays = graph.row_ptr, graph.neighbours, graph.inv_sqrt_degree
        out: Tensor = torch.ops.cemg.lightgcn_propagate(*arrays, x, layers, table_dtype, backend)
        return out
    return _propagate(graph, x, layers, table_dtype, backend)


def _propagate(
    graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None, backend: str | None
) -> Tensor:
    """Runs checked arguments on ``backend`` or the dispatcher's choice."""
    fallback = "sparse" if x.is_cuda else "torch"  # takes any dtype and dimension
    if backend is None and x.dtype == torch.float64 and fast_kernels_enabled():
        backend = fallback
    chosen = pick("lightgcn_propagate", x.device, backend)
    if backend is None and chosen == "triton" and not _fits_triton(x):
        chosen = fallback
    if chosen == "reference":
        return lightgcn_propagate_reference(graph, x, layers)
    out: Tensor = _Propagate.apply(graph, x, layers, table_dtype, chosen)
    return out


def _fits_triton(x: Tensor) -> bool:
    from .propagate_triton import MAX_DIM

    return x.shape[1] <= MAX_DIM


def lightgcn_propagate_reference(graph: BipartiteGraph, x: Tensor, layers: int) -> Tensor:
    """The definition: sums edge by edge; autograd differentiates it."""
    layer = total = _float32_or_64(x)
    degree = graph.row_ptr.diff()
    target = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), degree)  # [2 E]
    scale = graph.inv_sqrt_degree.to(layer.dtype)
    weight = (scale[target] * scale[graph.neighbours])[:, None]  # [2 E, 1]
    for _ in range(layers):
        layer = torch.zeros_like(layer).index_add(0, target, weight * layer[graph.neighbours])
        total = total + layer
    return (total / (layers + 1)).to(x.dtype)


class _Propagate(torch.autograd.Function):
    """Runs a fast backend; saves only the graph for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None, backend: str
    ) -> Tensor:
        ctx.graph, ctx.options = graph, (layers, table_dtype, backend)
        if backend == "native":
            return _native(graph, x, layers)
        if backend != "triton":
            return _horner(graph, x, layers, _bag_sums if backend == "torch" else _sparse_sums)
        from .propagate_triton import propagate

        return propagate(graph, x, layers, table_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        with named_range("lightgcn_propagate, backward"):
            return None, _Propagate.apply(ctx.graph, grads[0], *ctx.options), None, None, None


def _horner(
    graph: BipartiteGraph, x: Tensor, layers: int, sums_of: Callable[[BipartiteGraph, Tensor], Tensor]
) -> Tensor:
    """Computes y <- x + A_hat y, L times (Horner's scheme), which includes the sum over the layers.

    A_hat y = s * (A (s * y)) with s = D^-1/2 per row, so the edges need no weights and ``sums_of`` adds plain
    neighbour rows.
    """
    start = y = _float32_or_64(x)
    scale = graph.inv_sqrt_degree.to(y.dtype)[:, None]
    for _ in range(layers if graph.neighbours.numel() else 0):
        y = torch.addcmul(start, scale, sums_of(graph, scale * y))
    return (y / (layers + 1)).to(x.dtype)


def _bag_sums(graph: BipartiteGraph, table: Tensor) -> Tensor:
    return F.embedding_bag(graph.neighbours, table, graph.row_ptr, mode="sum", include_last_offset=True)


def _sparse_sums(graph: BipartiteGraph, table: Tensor) -> Tensor:
    return _adjacency(graph, table.dtype) @ table


# keyed by ``neighbours``, the same tensor in eager and compiled calls
_adjacencies = WeakTensorKeyDictionary()


def _adjacency(graph: BipartiteGraph, dtype: torch.dtype) -> Tensor:
    """Returns A as a CSR tensor of ones; caches one per graph, in the last dtype used."""
    cached: Tensor | None = _adjacencies.get(graph.neighbours)
    if cached is None or cached.dtype != dtype:
        index = torch.int32 if graph.neighbours.numel() < 2**31 else torch.int64
        # a copy, because a value must not reference its key
        arrays = (graph.row_ptr.to(index), graph.neighbours.to(index, copy=True))
        ones = torch.ones(graph.neighbours.numel(), dtype=dtype, device=graph.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that CSR is in beta
            cached = torch.sparse_csr_tensor(*arrays, ones, (graph.inv_sqrt_degree.numel(),) * 2)
        _adjacencies[graph.neighbours] = cached
    return cached


def _native(graph: BipartiteGraph, x: Tensor, layers: int) -> Tensor:
    x_32 = x.detach().float().contiguous()
    out, scratch = torch.empty_like(x_32), torch.empty_like(x_32)
    native().lightgcn_propagate(
        row_ptr=graph.row_ptr.data_ptr(), neighbours=graph.neighbours.data_ptr(),
        inv_sqrt_degree=graph.inv_sqrt_degree.data_ptr(), vertices=x_32.shape[0], x=x_32.data_ptr(),
        dim=x_32.shape[1], layers=layers, out=out.data_ptr(), scratch=scratch.data_ptr(),
    )  # fmt: skip
    return out.to(x.dtype)


def _custom_op(
    row_ptr: Tensor, neighbours: Tensor, inv_sqrt_degree: Tensor, x: Tensor, layers: int,
    table_dtype: torch.dtype | None, backend: str | None,
) -> Tensor:  # fmt: skip
    arrays = row_ptr, neighbours, inv_sqrt_degree
    graph = BipartiteGraph._of((x.shape[0], 0), arrays)  # the split into users and items does not matter here
    with torch.no_grad():
        out = _propagate(graph, x.contiguous(), layers, table_dtype, backend)
    return out.clone() if layers == 0 else out  # a custom op must not return its input


_op = torch.library.custom_op(
    "cemg::lightgcn_propagate", _custom_op, mutates_args=(),
    schema="(Tensor row_ptr, Tensor neighbours, Tensor inv_sqrt_degree, Tensor x, int layers, "
    "ScalarType? table_dtype, str? backend) -> Tensor",
)  # fmt: skip
_op.register_fake(lambda row_ptr, neighbours, inv_sqrt_degree, x, *_: x.new_empty(x.shape))


def _keep_graph(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor, None, None, None]:
    return None, None, None, _op(*ctx.saved_tensors, grad, *ctx.options), None, None, None


_op.register_autograd(_backward, setup_context=_keep_graph)


def _float32_or_64(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None) -> None:
    vertices = graph.num_users + graph.num_items
    if x.dim() != 2 or x.shape[0] != vertices or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [{vertices}, D] (users, then items), got {x.dtype} {list(x.shape)}"
        )
    if x.device != graph.device:
        raise ValueError(f"x is on {x.device}, the graph on {graph.device}; move one with .to()")
    if not 0 <= layers <= MAX_LAYERS:
        raise ValueError(f"layers must be 0 to {MAX_LAYERS}, got {layers}")
    if table_dtype not in (None, torch.bfloat16):
        raise ValueError(f"table_dtype must be torch.bfloat16, or None for exact tables, got {table_dtype}")


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .propagate_triton import aot_cases

    return aot_cases(every)


register("lightgcn_propagate", ("triton", "native", "sparse", "torch", "reference"), aot_cases=_aot_cases)
