"""The reference of all trie operations, in plain PyTorch. It also runs where the C++ code cannot.

These are the functions of ``csrc/include/cemg/trie_view.h``, over batches. R rows, K codes per level.
A node is -1 (none) or a number. Leaves and invalid numbers have no children.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import TrieArrays

NONE = -1


def child_range(trie: TrieArrays, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns first child and one past the last of ``nodes`` (any shape): int64; equal if there are none."""
    inner = (nodes >= 0) & (nodes < trie.num_inner)
    safe = torch.where(inner, nodes, 0).long()
    begin, end = trie.first_children[safe], trie.first_children[safe + 1]
    return begin, torch.where(inner, end, begin)


def find_child(trie: TrieArrays, nodes: Tensor, codes: Tensor) -> Tensor:
    """Returns the child of each of ``nodes`` [R] for ``codes`` [R]: int32; -1 if there is none."""
    begin, end = child_range(trie, nodes)
    low, high = begin, end
    for _ in range(trie.codebook_size.bit_length()):  # binary search among up to K siblings
        middle = (low + high) // 2
        below = (low < high) & (_edge_code(trie, middle) < codes)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    exists = (low < end) & (_edge_code(trie, low) == codes)
    return torch.where(exists, low, NONE).to(torch.int32)


def child_grid(trie: TrieArrays, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and nodes of the children of ``nodes`` [R]: two int32 [R, K], ascending, then -1."""
    begin, end = child_range(trie, nodes)
    child = begin[:, None] + torch.arange(trie.codebook_size, device=nodes.device)  # [R, K]
    live = child < end[:, None]
    codes = torch.where(live, _edge_code(trie, child), NONE)
    return codes.to(torch.int32), torch.where(live, child, NONE).to(torch.int32)


def parents(trie: TrieArrays, nodes: Tensor) -> Tensor:
    """Returns the parent of each of ``nodes`` (any shape, not the root): int64."""
    last = torch.searchsorted(trie.first_children, nodes.long(), right=True) - 1
    return last.clamp(max=trie.num_inner - 1)


def node_interval(trie: TrieArrays, nodes: Tensor) -> Tensor:
    """Returns the ranks below ``nodes`` (any shape): int32 [..., 2], half open; (0, 0) for none."""
    is_node = (nodes >= 0) & (nodes < trie.num_nodes)
    begin = torch.where(is_node, nodes, 0).long()
    end = begin + 1
    for _ in range(trie.levels):  # moves both ends down one level until they are leaves
        inner = begin < trie.num_inner
        down = trie.first_children[torch.where(inner, torch.stack((begin, end)), 0)]
        begin, end = torch.where(inner, down[0], begin), torch.where(inner, down[1], end)
    ranks = torch.stack((begin, end), -1) - trie.num_inner
    return torch.where(is_node[..., None], ranks, 0).to(torch.int32)


def _edge_code(trie: TrieArrays, child: Tensor) -> Tensor:
    return trie.code[(child - 1).clamp(0, trie.code.numel() - 1)].long()
