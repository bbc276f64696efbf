"""The bipartite graph of users and items as a symmetric CSR matrix.

V = U + N vertices (users, then items), E distinct edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.operands import device_of, integers_of, tensor_of

if TYPE_CHECKING:
    from ..runtime.operands import Numbers

MAX_VERTICES = 2**31 - 1
FIELDS = ("num_users", "num_items", "row_ptr", "neighbours", "inv_sqrt_degree")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class BipartiteGraph:
    """The interactions of users and items as one symmetric CSR matrix; create it with ``from_edges``.

    Args:
        num_users: U.
        num_items: N.
        row_ptr: int64 [V + 1].
        neighbours: int64 [2 E], ascending within each row.
        inv_sqrt_degree: float32 [V], 0 for vertices of degree 0.

    Raises:
        ValueError: An array has another shape or dtype, or ``row_ptr`` or ``neighbours`` are out of range.

    Example:
        >>> graph = BipartiteGraph.from_edges([0, 0, 1], [0, 1, 1], num_users=2, num_items=2)
        >>> graph.num_edges
        3
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
        """Returns the graph of valid arrays without checks, which would synchronize with the GPU."""
        graph = object.__new__(cls)
        for name, value in zip(FIELDS, (*sizes, *arrays), strict=True):
            object.__setattr__(graph, name, value)
        return graph

    @classmethod
    def from_edges(cls, users: Numbers, items: Numbers, num_users: int, num_items: int) -> BipartiteGraph:
        """Builds the graph of the edges (users[e], items[e]); a repeated edge counts once.

        Args:
            users: Integers [E], from 0 to ``num_users - 1``.
            items: Integers [E], from 0 to ``num_items - 1``.
            num_users: U.
            num_items: N.

        Raises:
            ValueError: The shapes or devices differ, or an index is out of range.
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
        """The device of the arrays."""
        return self.row_ptr.device

    def to(self, device: str | torch.device) -> BipartiteGraph:
        """Returns the graph on another device."""
        device = device_of(device)
        arrays = self.row_ptr.to(device), self.neighbours.to(device), self.inv_sqrt_degree.to(device)
        return self._of((self.num_users, self.num_items), arrays)


def _check_sizes(num_users: int, num_items: int) -> None:
    if num_users < 0 or num_items < 0 or num_users + num_items > MAX_VERTICES:
        raise ValueError(
            f"num_users and num_items must be 0 or more and at most {MAX_VERTICES} together, "
            f"got {num_users} and {num_items}"
        )


def _check_csr(graph: BipartiteGraph) -> None:
    """Checks that the arrays are a CSR matrix over the graph's vertices, on one device."""
    vertices, row_ptr, neighbours = graph.num_users + graph.num_items, graph.row_ptr, graph.neighbours
    _check_array("row_ptr", row_ptr, torch.int64, vertices + 1)
    _check_array("neighbours", neighbours, torch.int64, None)
    _check_array("inv_sqrt_degree", graph.inv_sqrt_degree, torch.float32, vertices)
    if not row_ptr.device == neighbours.device == graph.inv_sqrt_degree.device:
        raise ValueError(
            "the arrays of a graph must be on one device, but these are not; move them with .to()"
        )
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != neighbours.numel() or bool((row_ptr.diff() < 0).any()):
        raise ValueError(f"row_ptr must ascend from 0 to {neighbours.numel()}, the number of neighbours")
    if not bool(graph.inv_sqrt_degree.isfinite().all()):
        raise ValueError("inv_sqrt_degree must be finite; make graphs with BipartiteGraph.from_edges")
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
        raise ValueError(f"{name} must be 0 to {size - 1}, got {int(index.min())} to {int(index.max())}")
