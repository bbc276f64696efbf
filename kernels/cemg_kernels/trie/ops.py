"""The trie's operations on flat tensors: C++ or CUDA where they serve, the plain walk elsewhere.

Arguments are checked (``trie.py``): nodes int32, codes int64, contiguous, on the trie's device; a filter is
its ``FilterTensors``, whose requests divide the rows. Each is a custom op too (``torch.ops.cemg.trie_mask``
and so on), so that ``torch.compile`` sees one call; outside a compiled graph ``run`` saves its overhead.
R rows, m codes of a prefix, K codes a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch import pick
from ..runtime.ranges import named_range, ranges_enabled
from . import cuda_launch as trie_cuda
from . import reference as trie_walk
from .arrays import TrieArrays
from .filter_tensors import FilterTensors

Filter = FilterTensors | None


def run(name: str, trie: TrieArrays, filter: Filter, *operands: Tensor) -> Any:
    """The operation of this name; inside ``torch.compile`` through its custom op."""
    if ranges_enabled():
        with named_range(f"trie_{name}"):
            return _run(name, trie, filter, *operands)
    return _run(name, trie, filter, *operands)


def _run(name: str, trie: TrieArrays, filter: Filter, *operands: Tensor) -> Any:
    if torch.compiler.is_compiling():
        flat = (trie.code, trie.first_child, trie.rows, trie.levels, trie.codebook_size, list(filter or ()))
        return getattr(torch.ops.cemg, f"trie_{name}")(*flat, *operands)
    return OPERATIONS[name](trie, filter, *operands)


def lookup(trie: TrieArrays, filter: Filter, prefixes: Tensor) -> Tensor:
    """Nodes [R] int32 that ``prefixes`` [R, m] int64 lead to from the root; -1 for none."""
    rows = prefixes.shape[0]
    if _native(trie):
        out = torch.empty(rows, dtype=torch.int32, device=prefixes.device)
        _launch("lookup", trie, filter, (prefixes, prefixes.shape[1], out), rows)
        return out
    nodes = torch.zeros(rows, dtype=torch.int32, device=prefixes.device)
    for code in prefixes.unbind(1):
        nodes = trie_walk.find_child(trie, nodes, code)
    return _kept(trie, filter, nodes)


def advance(trie: TrieArrays, filter: Filter, nodes: Tensor, codes: Tensor) -> Tensor:
    """The child of each of ``nodes`` [R] along ``codes`` [R], int32 [R]; -1 for none."""
    if _native(trie):
        out = torch.empty_like(nodes)
        _launch("advance", trie, filter, (nodes, codes, out), nodes.numel())
        return out
    return _kept(trie, filter, trie_walk.find_child(trie, nodes, codes))


def children(trie: TrieArrays, filter: Filter, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and nodes of the children of ``nodes`` [R], two int32 [R, K], ascending, then -1."""
    shape = (nodes.numel(), trie.codebook_size)
    if _native(trie):
        codes, found = (torch.empty(shape, dtype=torch.int32, device=nodes.device) for _ in range(2))
        _launch("children", trie, filter, (nodes, codes, found), shape[0])
        return codes, found
    codes, found = trie_walk.child_grid(trie, nodes)
    if filter is None:
        return codes, found
    found = _kept(trie, filter, found)
    front = (found < 0).to(torch.int8).argsort(dim=1, stable=True)  # what is allowed moves to the front
    codes = torch.where(found < 0, trie_walk.NONE, codes)
    return codes.gather(1, front), found.gather(1, front)


def mask(trie: TrieArrays, filter: Filter, nodes: Tensor) -> Tensor:
    """Which codes continue ``nodes`` [R], bool [R, K]."""
    rows, size = nodes.numel(), trie.codebook_size
    if _native(trie):
        out = torch.empty(rows, size, dtype=torch.bool, device=nodes.device)
        _launch("mask", trie, filter, (nodes, out), rows)
        return out
    codes, found = trie_walk.child_grid(trie, nodes)
    allowed = _kept(trie, filter, found) >= 0
    padded = torch.zeros(rows, size + 1, dtype=torch.bool, device=nodes.device)
    place = torch.where(codes < 0, size, codes).long()  # no child: the column cut off
    return padded.scatter_(1, place, allowed)[:, :-1].contiguous()


def interval(trie: TrieArrays, filter: Filter, nodes: Tensor) -> Tensor:
    """The ranks below ``nodes`` [R], [R, 2] int32, half open; (0, 0) for none. The filter plays no part."""
    if not _native(trie):
        return trie_walk.node_interval(trie, nodes)
    out = torch.empty(nodes.numel(), 2, dtype=torch.int32, device=nodes.device)
    _launch("interval", trie, None, (nodes, out), nodes.numel())
    return out


def keep(trie: TrieArrays, filter: Filter, nodes: Tensor) -> Tensor:
    """``nodes`` [R] themselves, -1 where the filter allows nothing below."""
    if not _native(trie):
        return _kept(trie, filter, nodes).clone()
    out = torch.empty_like(nodes)
    _launch("keep", trie, filter, (nodes, out), nodes.numel())
    return out


OPERATIONS: dict[str, Any] = {
    "lookup": lookup, "advance": advance, "children": children, "mask": mask, "interval": interval,
    "keep": keep,
}  # fmt: skip


def _kept(trie: TrieArrays, filter: Filter, nodes: Tensor) -> Tensor:
    """``nodes`` [R, ...], -1 where the filter allows nothing below for the row."""
    if filter is None:
        return nodes
    is_node = (nodes >= 0) & (nodes < trie.num_nodes)
    allowed = is_node & filter.allows(torch.where(is_node, nodes, 0))
    return torch.where(allowed, nodes, trie_walk.NONE)


def _native(trie: TrieArrays) -> bool:
    return pick("trie", trie.code.device) == "native"


def _launch(
    name: str, trie: TrieArrays, filter: Filter, arguments: tuple[Tensor | int, ...], rows: int
) -> None:
    """The C++ or CUDA operation of this name over ``rows`` rows; its outputs come last in ``arguments``."""
    fields = None if filter is None else filter.fields(rows)
    if trie.code.device.type == "cuda":
        cells = rows * trie.codebook_size if name == "mask" else rows
        trie_cuda.launch(name, trie, fields or trie_cuda.NO_FILTER, arguments, cells)
        return
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(trie.view, name)(fields, *addresses, rows)


FLAT = "Tensor code, Tensor first_child, Tensor rows, int levels, int codebook_size, Tensor[] filter"


def _register(name: str, operands: str, results: str, fake: Callable[..., Any]) -> None:
    """Make ``torch.ops.cemg.trie_<name>``; ``filter`` holds the tensors of a FilterTensors, or none."""
    operation = OPERATIONS[name]

    def call(
        code: Tensor, first_child: Tensor, rows: Tensor, levels: int, codebook_size: int,
        filter: Sequence[Tensor], *tensors: Tensor,
    ) -> Any:  # fmt: skip
        arrays = TrieArrays(code, first_child, rows, levels, codebook_size)
        return operation(arrays, FilterTensors(*filter) if filter else None, *tensors)

    schema = f"({FLAT}, {operands}) -> {results}"
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
