"""The trie of all valid semantic IDs, and its batched operations.

R or B rows, m codes of a prefix, K codes a level, N items. A node is one int32: the root 0, none -1.
About 6 bytes an item (``nbytes``; random codes, K = 256, 4 levels, 1e6 items), and the ids apart
(``id_nbytes``). On CPU tensors the C++ of ``csrc/`` runs, elsewhere the walk of ``trie_walk.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import trie_walk
from .dispatch import native, pick
from .item_filter import ItemFilter
from .trie_arrays import DuplicateCodes, TrieArrays, build, check_codes, verify

FORMAT = "cemg-trie-1"


class Trie:
    """All valid semantic IDs; made by ``from_codes`` or ``load``, never changed.

    >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
    >>> trie.items(trie.lookup(torch.tensor([[0, 2], [3, 3]]))).tolist()
    [1, -1]
    """

    def __init__(self, arrays: TrieArrays, ids: Tensor | None) -> None:
        """Internal: ``ids`` [N] int64 by rank, None where an item's id is its row."""
        self.arrays, self._ids = arrays, ids

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        codebook_size: int,
        item_ids: Tensor | Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> Trie:
        """The trie of ``codes`` [N, levels] (any integer dtype), each in 0 ... codebook_size - 1.

        ``item_ids`` [N] are distinct integers from 0 on; without them an item's id is its row.
        Raises ValueError on codes out of range, a dtype or shape that is no code, equal codes (naming the
        items), or more nodes than int32 counts.
        """
        codes = torch.as_tensor(codes)
        check_codes(codes, codebook_size)
        ids = None if item_ids is None else _checked_ids(item_ids, codes.shape[0])
        try:
            arrays = build(codes, codebook_size)
        except DuplicateCodes as error:
            raise ValueError(_duplicate_message(error.pairs, codes, ids)) from None
        by_rank = None if ids is None else ids.to(arrays.rows.device)[arrays.rows.long()]
        return cls(arrays, by_rank).to(device)

    @property
    def num_items(self) -> int:
        return self.arrays.rows.numel()

    @property
    def num_nodes(self) -> int:
        return self.arrays.num_nodes

    @property
    def levels(self) -> int:
        return self.arrays.levels

    @property
    def codebook_size(self) -> int:
        return self.arrays.codebook_size

    @property
    def device(self) -> torch.device:
        return self.arrays.code.device

    @property
    def nbytes(self) -> int:
        """Bytes of the trie itself, codes and first children; the ids are in ``id_nbytes``."""
        return self.arrays.code.nbytes + self.arrays.first_child.nbytes

    @property
    def id_nbytes(self) -> int:
        """Bytes of what leads from a leaf to its row and id."""
        return self.arrays.rows.nbytes + (0 if self._ids is None else self._ids.nbytes)

    @property
    def rows(self) -> Tensor:
        """The row, in ``from_codes``' order, of each rank: [N] int32."""
        return self.arrays.rows

    @property
    def ids_by_rank(self) -> Tensor:
        """The item id of each rank: [N] int64."""
        return self.arrays.rows.long() if self._ids is None else self._ids

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the codes and the order of the items: what a filter must share with its trie."""
        digest = hashlib.sha256(f"{self.levels} {self.codebook_size}".encode())
        for tensor in (self.arrays.code, self.arrays.first_child, self.arrays.rows):
            digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Trie:
        """The same trie on another device; itself where it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return Trie(self.arrays.to(device), None if self._ids is None else self._ids.to(device))

    def lookup(self, prefixes: Tensor, *, filter: ItemFilter | None = None) -> Tensor:
        """The node each prefix leads to from the root: [B, m] integers, 0 <= m <= levels -> [B] int32.

        -1 where no item (that the filter allows) starts with the prefix.
        """
        if prefixes.dim() != 2 or prefixes.shape[1] > self.levels:
            raise ValueError(f"prefixes must be [B, m] with m <= {self.levels}, got {list(prefixes.shape)}")
        prefixes = self._here("prefixes", prefixes).long().contiguous()
        rows, length = prefixes.shape
        if self._native():
            out = torch.empty(rows, dtype=torch.int32, device=self.device)
            self._run("lookup", filter, (prefixes, length, out), rows)
            return out
        nodes = torch.zeros(rows, dtype=torch.int32, device=self.device)
        for code in prefixes.unbind(1):
            nodes = trie_walk.find_child(self.arrays, nodes, code)
        return self._allowed(nodes, filter)

    def advance(self, nodes: Tensor, codes: Tensor, *, filter: ItemFilter | None = None) -> Tensor:
        """The child of each node along each code: any equal shapes -> the same shape, int32.

        -1 where there is no such child, or where the filter allows nothing below it.
        """
        if nodes.shape != codes.shape:
            raise ValueError(f"nodes {list(nodes.shape)} and codes {list(codes.shape)} must have one shape")
        nodes, codes = self._nodes(nodes), self._here("codes", codes).long().contiguous()
        if self._native():
            out = torch.empty_like(nodes)
            self._run("advance", filter, (nodes, codes, out), nodes.numel())
            return out
        found = trie_walk.find_child(self.arrays, nodes.flatten(), codes.flatten())
        return self._allowed(found.view(nodes.shape), filter)

    def children(self, nodes: Tensor, *, filter: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """Codes and nodes of the children of ``nodes`` [B]: two int32 [B, K].

        A row holds its children first, by ascending code, and then -1.
        """
        nodes = self._nodes(nodes, 1)
        shape = (nodes.numel(), self.codebook_size)
        if self._native():
            codes, found = torch.empty(2, *shape, dtype=torch.int32, device=self.device)
            self._run("children", filter, (nodes, codes, found), shape[0])
            return codes, found
        codes, found = trie_walk.child_grid(self.arrays, nodes)
        if filter is None:
            return codes, found
        found = self._allowed(found, filter)
        front = (found < 0).to(torch.int8).argsort(dim=1, stable=True)  # what is allowed moves to the front
        codes = torch.where(found < 0, trie_walk.NONE, codes)
        return codes.gather(1, front), found.gather(1, front)

    def mask(self, nodes: Tensor, *, filter: ItemFilter | None = None) -> Tensor:
        """Which codes continue each of ``nodes`` [B]: bool [B, K]; a row of -1 is all False."""
        nodes = self._nodes(nodes, 1)
        if self._native():
            out = torch.empty(nodes.numel(), self.codebook_size, dtype=torch.bool, device=self.device)
            self._run("mask", filter, (nodes, out), nodes.numel())
            return out
        codes, found = trie_walk.child_grid(self.arrays, nodes)
        allowed = self._allowed(found, filter) >= 0
        padded = torch.zeros(nodes.numel(), self.codebook_size + 1, dtype=torch.bool, device=self.device)
        place = torch.where(codes < 0, self.codebook_size, codes).long()  # no child: the column cut off
        return padded.scatter_(1, place, allowed)[:, :-1].contiguous()

    def items(self, leaves: Tensor, *, filter: ItemFilter | None = None) -> Tensor:
        """The item id at each leaf (any shape), int64; -1 for -1 and for whatever is no leaf."""
        leaves = self._allowed(self._nodes(leaves), filter)
        rank = leaves.long() - self.arrays.num_inner
        is_leaf = (rank >= 0) & (rank < self.num_items)
        return torch.where(is_leaf, self.ids_by_rank[torch.where(is_leaf, rank, 0)], -1)

    def interval(self, nodes: Tensor) -> Tensor:
        """The ranks of the items below each of ``nodes`` [B]: [B, 2] int32, half open; (0, 0) for -1."""
        nodes = self._nodes(nodes, 1)
        if not self._native():
            return trie_walk.node_interval(self.arrays, nodes)
        out = torch.empty(nodes.numel(), 2, dtype=torch.int32, device=self.device)
        self._run("interval", None, (nodes, out), nodes.numel())
        return out

    def save(self, path: str | Path) -> None:
        """Write the trie as safetensors."""
        tensors = {n: getattr(self.arrays, n).cpu() for n in ("code", "first_child", "rows")}
        if self._ids is not None:
            tensors["ids"] = self._ids.cpu()
        about = {"levels": str(self.levels), "codebook_size": str(self.codebook_size), "format": FORMAT}
        save_file(tensors, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trie:
        """Read what ``save`` wrote. Raises ValueError where the file is missing, foreign or damaged."""
        arrays, ids = _read(Path(path))
        problem = verify(arrays) or _ids_problem(ids, arrays.rows.numel())
        if problem:
            raise ValueError(f"{path} holds no valid trie: {problem}; write it again with Trie.save")
        return cls(arrays, ids).to(device)

    @cached_property
    def view(self) -> Any:
        """The C++ view of the arrays; internal to this package."""
        a = self.arrays
        return native().TrieView(
            code=a.code.data_ptr(),
            code_bytes=a.code.element_size(),
            first_child=a.first_child.data_ptr(),
            num_inner=a.num_inner,
            num_nodes=a.num_nodes,
            codebook_size=a.codebook_size,
        )

    def _run(
        self, name: str, filter: ItemFilter | None, arguments: tuple[Tensor | int, ...], rows: int
    ) -> None:
        """The C++ or CUDA operation of this name, over ``rows`` nodes or prefixes; the last is the output."""
        if self.device.type == "cuda":
            from . import trie_cuda

            cells = rows * self.codebook_size if name == "mask" else rows
            trie_cuda.launch(name, self.arrays, self.filter_addresses(filter), arguments, cells)
            return
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        getattr(self.view, name)(*self.filter_addresses(filter), *addresses, rows)

    def _native(self) -> bool:
        return pick("trie", self.device) == "native"

    def filter_addresses(self, filter: ItemFilter | None) -> tuple[int, int]:
        """Addresses of a checked filter's words and counts; (0, 0), "all allowed", for None."""
        if filter is None:
            return 0, 0
        self._check_filter(filter)
        return filter.words.data_ptr(), filter.before.data_ptr()

    def _check_filter(self, filter: ItemFilter) -> None:
        if filter.fingerprint != self.fingerprint:
            raise ValueError("the filter belongs to another trie; make it anew with ItemFilter.from_mask")
        if filter.words.device != self.device:
            raise ValueError(f"the filter is on {filter.words.device}, the trie on {self.device}; use .to()")

    def _allowed(self, nodes: Tensor, filter: ItemFilter | None) -> Tensor:
        if filter is None:
            return nodes
        self._check_filter(filter)
        return torch.where(filter.allows(trie_walk.node_interval(self.arrays, nodes)), nodes, trie_walk.NONE)

    def _here(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} are on {tensor.device}, the trie on {self.device}; use .to()")
        return tensor

    def _nodes(self, nodes: Tensor, dim: int | None = None) -> Tensor:
        if dim is not None and nodes.dim() != dim:
            raise ValueError(f"nodes must be one-dimensional, got {list(nodes.shape)}; use .flatten()")
        return self._here("nodes", nodes).to(torch.int32).contiguous()


def _checked_ids(item_ids: Tensor | Sequence[int], num_items: int) -> Tensor:
    ids = torch.as_tensor(item_ids)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"item_ids must be integers, got {ids.dtype}")
    ids = ids.to("cpu", torch.int64).contiguous()
    problem = _ids_problem(ids, num_items)
    if problem:
        raise ValueError(f"{problem}; pass one distinct integer from 0 on for each item")
    return ids


def _ids_problem(ids: Tensor | None, num_items: int) -> str:
    if ids is None:
        return ""
    if ids.dtype != torch.int64 or ids.shape != (num_items,):
        return f"item_ids are {ids.dtype} {list(ids.shape)}, not int64 [{num_items}]"
    if int(ids.min()) < 0:
        return f"item_ids hold {int(ids.min())}"
    ordered = ids.sort().values
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    return f"item_ids hold {int(again[0])} twice" if again.numel() else ""


def _duplicate_message(pairs: list[tuple[int, int]], codes: Tensor, ids: Tensor | None) -> str:
    named = [(a, b) if ids is None else (int(ids[a]), int(ids[b])) for a, b in pairs[:5]]
    shown = ", ".join(
        f"items {a} and {b} ({codes[row].tolist()})" for (a, b), (row, _) in zip(named, pairs, strict=False)
    )
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    return f"items must have distinct codes, but {shown}{more} share theirs; resolve the collisions first"


def _read(path: Path) -> tuple[TrieArrays, Tensor | None]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; write it with Trie.save")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')}, this version reads {FORMAT}")
        sizes = int(about["levels"]), int(about["codebook_size"])
        arrays = TrieArrays(tensors["code"], tensors["first_child"], tensors["rows"], *sizes)
    except (SafetensorError, KeyError, ValueError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} holds no trie: {error}; write it again with Trie.save") from error
    return arrays, tensors.get("ids")
