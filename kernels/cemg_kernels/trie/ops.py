"""The trie's operations on checked tensors: C++ or CUDA if available, otherwise the reference.

``trie.py`` checks the arguments: int32 nodes and int64 codes, contiguous, on the trie's device. A filter is
passed as ``FilterTensors``, and the number of rows is a multiple of its requests. Each operation is also a
custom op (``torch.ops.cemg.trie_mask`` and so on), so ``torch.compile`` does not trace into it. Outside a
compiled graph, ``run`` bypasses the custom op to save its overhead.
R rows, m codes per prefix, K codes per level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch import pick
from ..runtime.ranges import named_range, ranges_enabled
from ..runtime.registry import register
from . import cuda_launch as trie_cuda
from . import reference as trie_walk
from .arrays import TrieArrays
from .filter_tensors import FilterTensors

MaybeFilter = FilterTensors | None

register("trie", ("native", "reference"), cuda_problem=trie_cuda.problem)


def run(name: str, trie: TrieArrays, filter: MaybeFilter, *operands: Tensor) -> Any:
    """Runs the operation ``name``; inside ``torch.compile`` through its custom op."""
    if ranges_enabled():
        with named_range(f"trie_{name}"):
            return _run(name, trie, filter, *operands)
    return _run(name, trie, filter, *operands)


def _run(name: str, trie: TrieArrays, filter: MaybeFilter, *operands: Tensor) -> Any:
    if torch.compiler.is_compiling():
        flat = (trie.code, trie.first_child, trie.rows, trie.levels, trie.codebook_size, list(filter or ()))
        return getattr(torch.ops.cemg, f"trie_{name}")(*flat, *operands)
    return OPERATIONS[name](trie, filter, *operands)


def lookup(trie: TrieArrays, filter: MaybeFilter, prefixes: Tensor) -> Tensor:
    """Returns the node of each of ``prefixes`` int64 [R, m]: int32 [R]; -1 for none."""
    rows = prefixes.shape[0]
    if _native(trie):
        out = torch.empty(rows, dtype=torch.int32, device=prefixes.device)
        _launch("lookup", trie, filter, (prefixes, prefixes.shape[1], out), rows)
        return out
    nodes = torch.zeros(rows, dtype=torch.int32, device=prefixes.device)
    for code in prefixes.unbind(1):
        nodes = trie_walk.find_child(trie, nodes, code)
    return _kept(trie, filter, nodes)


def advance(trie: TrieArrays, filter: MaybeFilter, nodes: Tensor, codes: Tensor) -> Tensor:
    """Returns the child of each of ``nodes`` [R] for ``codes`` [R]: int32 [R]; -1 for none."""
    if _native(trie):
        out = torch.empty_like(nodes)
        _launch("advance", trie, filter, (nodes, codes, out), nodes.numel())
        return out
    return _kept(trie, filter, trie_walk.find_child(trie, nodes, codes))


def children(trie: TrieArrays, filter: MaybeFilter, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and nodes of the children of ``nodes`` [R]: two int32 [R, K], ascending, then -1."""
    shape = (nodes.numel(), trie.codebook_size)
    if _native(trie):
        codes, children = (torch.empty(shape, dtype=torch.int32, device=nodes.device) for _ in range(2))
        _launch("children", trie, filter, (nodes, codes, children), shape[0])
        return codes, children
    codes, children = trie_walk.child_grid(trie, nodes)
    if filter is None:
        return codes, children
    children = _kept(trie, filter, children)
    allowed_first = (children < 0).to(torch.int8).argsort(dim=1, stable=True)
    codes = torch.where(children < 0, trie_walk.NONE, codes)
    return codes.gather(1, allowed_first), children.gather(1, allowed_first)


def mask(trie: TrieArrays, filter: MaybeFilter, nodes: Tensor) -> Tensor:
    """Returns which codes continue ``nodes`` [R]: bool [R, K]."""
    rows, size = nodes.numel(), trie.codebook_size
    if _native(trie):
        out = torch.empty(rows, size, dtype=torch.bool, device=nodes.device)
        _launch("mask", trie, filter, (nodes, out), rows)
        return out
    codes, children = trie_walk.child_grid(trie, nodes)
    allowed = _kept(trie, filter, children) >= 0
    padded = torch.zeros(rows, size + 1, dtype=torch.bool, device=nodes.device)
    column = torch.where(
        codes < 0, size, codes
    ).long()  # missing children go to the last column, cut off below
    return padded.scatter_(1, column, allowed)[:, :-1].contiguous()


def interval(trie: TrieArrays, filter: MaybeFilter, nodes: Tensor) -> Tensor:
    """Returns the ranks below ``nodes`` [R]: int32 [R, 2], half open; (0, 0) for none. Ignores the filter."""
    if not _native(trie):
        return trie_walk.node_interval(trie, nodes)
    out = torch.empty(nodes.numel(), 2, dtype=torch.int32, device=nodes.device)
    _launch("interval", trie, None, (nodes, out), nodes.numel())
    return out


def keep(trie: TrieArrays, filter: MaybeFilter, nodes: Tensor) -> Tensor:
    """Returns ``nodes`` [R], with -1 where the filter allows no item below."""
    if not _native(trie):
        return _kept(trie, filter, nodes).clone()
    out = torch.empty_like(nodes)
    _launch("keep", trie, filter, (nodes, out), nodes.numel())
    return out


OPERATIONS: dict[str, Any] = {
    "lookup": lookup, "advance": advance, "children": children, "mask": mask, "interval": interval,
    "keep": keep,
}  # fmt: skip


def _kept(trie: TrieArrays, filter: MaybeFilter, nodes: Tensor) -> Tensor:
    """Returns ``nodes`` [R, ...], with -1 where the filter of the row allows no item below."""
    if filter is None:
        return nodes
    is_node = (nodes >= 0) & (nodes < trie.num_nodes)
    allowed = is_node & filter.allows(torch.where(is_node, nodes, 0))
    return torch.where(allowed, nodes, trie_walk.NONE)


def _native(trie: TrieArrays) -> bool:
    return pick("trie", trie.code.device) == "native"


def _launch(
    name: str, trie: TrieArrays, filter: MaybeFilter, arguments: tuple[Tensor | int, ...], rows: int
) -> None:
    """Runs the C++ or CUDA operation ``name`` over ``rows`` rows; its outputs come last in ``arguments``."""
    if trie.code.device.type == "cuda":
        cells = rows * trie.codebook_size if name == "mask" else rows
        fields = trie_cuda.NO_FILTER if filter is None else filter.fields(rows)
        trie_cuda.launch(name, trie, fields, arguments, cells)
        return
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    view = None if filter is None else filter.view(rows)
    getattr(trie.view, name)(view, *addresses, rows)


ARRAYS_AND_FILTER = (
    "Tensor code, Tensor first_child, Tensor rows, int levels, int codebook_size, Tensor[] filter"
)


def _register(name: str, operands: str, results: str, fake: Callable[..., Any]) -> None:
    """Registers ``torch.ops.cemg.trie_<name>``; ``filter`` is the tensors of a FilterTensors, or empty."""
    operation = OPERATIONS[name]

    def call(
        code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
        filter: Sequence[Tensor], *tensors: Tensor,
    ) -> Any:  # fmt: skip
        arrays = TrieArrays(code, first_child, rows, levels, codebook_size)
        return operation(arrays, FilterTensors(*filter) if filter else None, *tensors)

    schema = f"({ARRAYS_AND_FILTER}, {operands}) -> {results}"
    op = torch.library.custom_op(f"cemg::trie_{name}", call, mutates_args=(), schema=schema)
    op.register_fake(lambda code, first, rows, levels, size, filter, *tensors: fake(size, *tensors))


def _same(size: int, nodes: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(nodes)


_register("lookup", "Tensor prefixes", "Tensor", lambda size, prefixes: prefixes.new_empty(
    prefixes.shape[0], dtype=torch.int32))  # fmt: skip
_register("advance", "Tensor nodes, Tensor codes", "Tensor", _same)
_register("children", "Tensor nodes", "(Tensor, Tensor)", lambda size, nodes: (
    nodes.new_empty(nodes.shape[0], size), nodes.new_empty(nodes.shape[0], size)))  # fmt: skip
_register("mask", "Tensor nodes", "Tensor", lambda size, nodes: nodes.new_empty(
    nodes.shape[0], size, dtype=torch.bool))  # fmt: skip
_register("interval", "Tensor nodes", "Tensor", lambda size, nodes: nodes.new_empty(nodes.shape[0], 2))
_register("keep", "Tensor nodes", "Tensor", _same)
