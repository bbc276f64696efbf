"""LightGCN propagation over a bipartite graph: the mean of L rounds of normalised neighbour sums.

V = U + N vertices (users, then items), E distinct edges, D dimensions, L layers.

    A_hat = D^-1/2 A D^-1/2,    out = 1 / (L + 1) * sum of A_hat^k x for k = 0 ... L
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..runtime.dispatch import fast_kernels_enabled, native, pick
from ..runtime.operands import device_of, integers_of, tensor_of
from ..runtime.ranges import named_range, ranged

if TYPE_CHECKING:
    from ..runtime.operands import Numbers


MAX_VERTICES = 2**31 - 1
MAX_LAYERS = 10_000
FIELDS = ("num_users", "num_items", "row_ptr", "neighbours", "inv_sqrt_degree")  # of a graph


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class BipartiteGraph:
    """Who interacted with what, both directions, as one symmetric CSR over users and then items.

    ``row_ptr`` [V + 1] and ``neighbours`` [2 E] are int64, neighbours ascending; ``inv_sqrt_degree`` [V]
    float32, 0 where the degree is 0. Made by ``from_edges``. The constructor raises ValueError for arrays
    of another shape or dtype, and where ``row_ptr`` or ``neighbours`` leave their range.
    """

    num_users: int
    num_items: int
    row_ptr: Tensor
    neighbours: Tensor
    inv_sqrt_degree: Tensor

    def __post_init__(self) -> None:
        _check_sizes(self.num_users, self.num_items)
        _check_csr(self)

    @classmethod
    def _of(cls, sizes: tuple[int, int], arrays: tuple[Tensor, Tensor, Tensor]) -> BipartiteGraph:
        """The graph of arrays that are right: none is looked at, so that no GPU is waited for."""
        graph = object.__new__(cls)
        for name, value in zip(FIELDS, (*sizes, *arrays), strict=True):
            object.__setattr__(graph, name, value)
        return graph

    @classmethod
    def from_edges(cls, users: Numbers, items: Numbers, num_users: int, num_items: int) -> BipartiteGraph:
        """The graph of edges (users[e], items[e]), integers [E]; a repeated edge counts once.

        Raises ValueError where the shapes differ or an index is outside its range.
        """
        _check_sizes(num_users, num_items)
        users, items = integers_of("users", users), integers_of("items", items)
        if users.device != items.device:
            raise ValueError(f"users are on {users.device}, items on {items.device}; move one with .to()")
        if users.shape != items.shape or users.dim() != 1:
            raise ValueError(f"users and items must be [E], got {list(users.shape)} and {list(items.shape)}")
        _check_indices("users", users, num_users)
        _check_indices("items", items, num_items)
        return cls._from_checked(users.long(), items.long(), num_users, num_items)

    @classmethod
    def _from_checked(cls, users: Tensor, items: Tensor, num_users: int, num_items: int) -> BipartiteGraph:
        keys = torch.unique(users * max(num_items, 1) + items)
        users, items = keys // max(num_items, 1), keys % max(num_items, 1) + num_users
        vertices = num_users + num_items
        source, target = torch.cat((users, items)), torch.cat((items, users))
        degree = torch.bincount(source, minlength=vertices)  # [V]
        row_ptr = torch.cat((degree.new_zeros(1), degree.cumsum(0)))
        neighbours = target[source.argsort(stable=True)]
        inverse = degree.double().rsqrt().masked_fill(degree == 0, 0).float()
        return cls._of((num_users, num_items), (row_ptr, neighbours, inverse))

    @property
    def num_edges(self) -> int:
        """Distinct edges, each counted once."""
        return self.neighbours.numel() // 2

    @property
    def device(self) -> torch.device:
        return self.row_ptr.device

    def to(self, device: str | torch.device) -> BipartiteGraph:
        """The same graph on another device."""
        device = device_of(device)
        arrays = self.row_ptr.to(device), self.neighbours.to(device), self.inv_sqrt_degree.to(device)
        return self._of((self.num_users, self.num_items), arrays)


@ranged
def lightgcn_propagate(
    graph: BipartiteGraph,
    x: Tensor,
    layers: int,
    *,
    table_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of A_hat^k x for k = 0 ... ``layers``: ``x`` [V, D] -> [V, D] of x's dtype.

    Rows of x are users, then items. Repeated edges count once; a vertex of degree 0 passes nothing and
    keeps x / (layers + 1). Differentiable in x: A_hat is symmetric, so backward is the same operator.
    float32 and float64 as they are; sums of narrower types in float32.
    ``table_dtype=torch.bfloat16`` lets "triton" gather rows rounded to bfloat16, half the bytes: out is then
    off by at most 1.01 * layers * 2^-9 * (the mean of A_hat^k |x|), and the gradient alike. The other
    backends have no use for it.
    ``backend``: "triton", "native" (C++ on the CPU; sums in float32), "sparse" (torch's CSR product:
    cuSPARSE on a GPU), "torch", "reference", or None for the dispatcher's, by which float64, and on a GPU
    more than 1,024 dimensions, go to "sparse" on a GPU and to "torch" elsewhere.
    Raises ValueError where shape, dtype or device do not fit, or layers < 0.
    """
    x = tensor_of("x", x)
    _check(graph, x, layers, table_dtype)
    if torch.compiler.is_compiling():
        arrays = graph.row_ptr, graph.neighbours, graph.inv_sqrt_degree
        return torch.ops.cemg.lightgcn_propagate(*arrays, x, layers, table_dtype, backend)
    return _propagate(graph, x, layers, table_dtype, backend)


def _propagate(
    graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None, backend: str | None
) -> Tensor:
    """Checked input, on the backend of this name or the dispatcher's."""
    takes_all = "sparse" if x.is_cuda else "torch"
    if backend is None and x.dtype == torch.float64 and fast_kernels_enabled():
        backend = takes_all
    chosen = pick("lightgcn_propagate", x.device, backend)
    if backend is None and chosen == "triton" and not _fits_triton(x):
        chosen = takes_all
    if chosen == "reference":
        return lightgcn_propagate_reference(graph, x, layers)
    return _Propagate.apply(graph, x, layers, table_dtype, chosen)


def _fits_triton(x: Tensor) -> bool:
    from .propagate_triton import MAX_DIM

    return x.shape[1] <= MAX_DIM


def lightgcn_propagate_reference(graph: BipartiteGraph, x: Tensor, layers: int) -> Tensor:
    """The definition, edge by edge, differentiated by autograd."""
    layer = total = _wide(x)
    degree = graph.row_ptr.diff()
    target = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), degree)  # [2 E]
    scale = graph.inv_sqrt_degree.to(layer.dtype)
    weight = (scale[target] * scale[graph.neighbours])[:, None]  # [2 E, 1]
    for _ in range(layers):
        layer = torch.zeros_like(layer).index_add(0, target, weight * layer[graph.neighbours])
        total = total + layer
    return (total / (layers + 1)).to(x.dtype)


class _Propagate(torch.autograd.Function):
    """A tuned operator; nothing is kept for backward but the graph."""

    @staticmethod
    def forward(
        ctx: Any, graph: BipartiteGraph, x: Tensor, layers: int, table_dtype: torch.dtype | None, backend: str
    ) -> Tensor:
        ctx.graph, ctx.rest = graph, (layers, table_dtype, backend)
        if backend == "native":
            return _native(graph, x, layers)
        if backend != "triton":
            return _horner(graph, x, layers, _bag_sums if backend == "torch" else _sparse_sums)
        from .propagate_triton import propagate

        return propagate(graph, x, layers, table_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        with named_range("lightgcn_propagate, backward"):
            return None, _Propagate.apply(ctx.graph, grads[0], *ctx.rest), None, None, None


def _horner(
    graph: BipartiteGraph, x: Tensor, layers: int, sums_of: Callable[[BipartiteGraph, Tensor], Tensor]
) -> Tensor:
    """y <- x + A_hat y, L times: the addition is the sum over the layers.

    A_hat y = s * (A (s * y)) with s = D^-1/2 by row, so the edges need no weights: ``sums_of`` adds plain
    neighbour rows.
    """
    start = y = _wide(x)
    scale = graph.inv_sqrt_degree.to(y.dtype)[:, None]
    for _ in range(layers if graph.neighbours.numel() else 0):
        y = torch.addcmul(start, scale, sums_of(graph, scale * y))
    return (y / (layers + 1)).to(x.dtype)


def _bag_sums(graph: BipartiteGraph, table: Tensor) -> Tensor:
    return F.embedding_bag(graph.neighbours, table, graph.row_ptr, mode="sum", include_last_offset=True)


def _sparse_sums(graph: BipartiteGraph, table: Tensor) -> Tensor:
    return _adjacency(graph, table.dtype) @ table


_adjacencies = WeakTensorKeyDictionary()  # by neighbours, which compiled calls pass on as they are


def _adjacency(graph: BipartiteGraph, dtype: torch.dtype) -> Tensor:
    """A as torch's CSR, its values ones; kept with the graph, in the dtype that was asked for last."""
    kept: Tensor | None = _adjacencies.get(graph.neighbours)
    if kept is None or kept.dtype != dtype:
        index = torch.int32 if graph.neighbours.numel() < 2**31 else torch.int64
        arrays = graph.row_ptr.to(index), graph.neighbours.to(index, copy=True)  # not the key itself
        ones = torch.ones(graph.neighbours.numel(), dtype=dtype, device=graph.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta
            kept = torch.sparse_csr_tensor(*arrays, ones, (graph.inv_sqrt_degree.numel(),) * 2)
        _adjacencies[graph.neighbours] = kept
    return kept


def _native(graph: BipartiteGraph, x: Tensor, layers: int) -> Tensor:
    wide = x.detach().float().contiguous()
    out, room = torch.empty_like(wide), torch.empty_like(wide)
    arrays = graph.row_ptr.data_ptr(), graph.neighbours.data_ptr(), graph.inv_sqrt_degree.data_ptr()
    native().lightgcn_propagate(
        wide.shape[0], arrays, wide.data_ptr(), wide.shape[1], layers, out.data_ptr(), room.data_ptr()
    )
    return out.to(x.dtype)


def _custom_op(
    row_ptr: Tensor, neighbours: Tensor, inv_sqrt_degree: Tensor, x: Tensor, layers: int,
    table_dtype: torch.dtype | None, backend: str | None,
) -> Tensor:  # fmt: skip
    arrays = row_ptr, neighbours, inv_sqrt_degree
    graph = BipartiteGraph._of((x.shape[0], 0), arrays)  # the split plays no part
    with torch.no_grad():
        out = _propagate(graph, x.contiguous(), layers, table_dtype, backend)
    return out.clone() if layers == 0 else out  # never its own input


_op = torch.library.custom_op(
    "cemg::lightgcn_propagate", _custom_op, mutates_args=(),
    schema="(Tensor row_ptr, Tensor neighbours, Tensor inv_sqrt_degree, Tensor x, int layers, "
    "ScalarType? table_dtype, str? backend) -> Tensor",
)  # fmt: skip
_op.register_fake(lambda row_ptr, neighbours, inv_sqrt_degree, x, *_: x.new_empty(x.shape))


def _keep_graph(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor, None, None, None]:
    return None, None, None, _op(*ctx.saved_tensors, grad, *ctx.rest), None, None, None


_op.register_autograd(_backward, setup_context=_keep_graph)


def _wide(x: Tensor) -> Tensor:
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


def _check_sizes(num_users: int, num_items: int) -> None:
    if num_users < 0 or num_items < 0 or num_users + num_items > MAX_VERTICES:
        raise ValueError(
            f"num_users and num_items must be 0 or more, together {MAX_VERTICES} at most, "
            f"got {num_users} and {num_items}"
        )


def _check_csr(graph: BipartiteGraph) -> None:
    """ValueError where the arrays are not those of a CSR over the graph's vertices, on one device."""
    vertices, row_ptr, neighbours = graph.num_users + graph.num_items, graph.row_ptr, graph.neighbours
    _check_array("row_ptr", row_ptr, torch.int64, vertices + 1)
    _check_array("neighbours", neighbours, torch.int64, None)
    _check_array("inv_sqrt_degree", graph.inv_sqrt_degree, torch.float32, vertices)
    if not row_ptr.device == neighbours.device == graph.inv_sqrt_degree.device:
        raise ValueError("a graph's arrays lie on one device; these do not: move them with .to()")
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != neighbours.numel() or bool((row_ptr.diff() < 0).any()):
        raise ValueError(f"row_ptr must rise from 0 to {neighbours.numel()}, the number of neighbours")
    if not bool(graph.inv_sqrt_degree.isfinite().all()):
        raise ValueError(
            "inv_sqrt_degree holds what is not finite; make graphs with BipartiteGraph.from_edges"
        )
    _check_indices("neighbours", neighbours, vertices)


def _check_array(name: str, array: Tensor, dtype: torch.dtype, count: int | None) -> None:
    if not isinstance(array, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(array).__name__}")
    tensor_of(name, array)
    length = array.numel() if count is None else count
    if array.dtype != dtype or array.shape != (length,) or not array.is_contiguous() or array.is_neg():
        raise ValueError(
            f"{name} must be contiguous {dtype} [{length}], got {array.dtype} {list(array.shape)}; "
            "make graphs with BipartiteGraph.from_edges"
        )


def _check_indices(name: str, index: Tensor, size: int) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
        raise ValueError(f"{name} must lie in 0 to {size - 1}, got {int(index.min())} to {int(index.max())}")
