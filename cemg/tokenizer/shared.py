"""Semantic IDs that several items share: one leaf of the trie, several items.

N items, U different semantic IDs, B requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cemg_kernels import ItemFilter, RequestFilter, Trie


@dataclass(frozen=True, slots=True)
class SharedIds:
    """The items of each semantic ID.

    ``codes`` [U, levels], ascending; ``leaf_of`` [N] the semantic ID of each item, by number; ``members`` [N]
    rows of items, one ID after the other, those of most training interactions first; ``begins`` [U + 1] where
    each ID's members begin.
    """

    codes: Tensor
    leaf_of: Tensor
    members: Tensor
    begins: Tensor

    @classmethod
    def of(cls, codes: Tensor, counts: Tensor | None) -> SharedIds:
        """From codes [N, levels] and training interactions [N], None where they are not known."""
        unique, leaf_of, sizes = codes.unique(dim=0, return_inverse=True, return_counts=True)
        order = torch.arange(len(codes)) if counts is None else (-counts).argsort(stable=True)
        members = order[leaf_of[order].argsort(stable=True)]
        begins = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls(unique, leaf_of, members, begins)

    def leaves_with(self, allowed: Tensor) -> Tensor:
        """Which IDs have an item of ``allowed`` [R, N] bool: [R, U] bool."""
        found = torch.zeros(len(allowed), len(self.codes), dtype=torch.int32)
        return found.index_add_(1, self.leaf_of, allowed.to(torch.int32)) > 0


class SharedFilter:
    """Which items of a catalog with shared IDs may be returned; combine with ``&``, ``|`` and ``~``.

    Made by ``Catalog.only`` and ``Catalog.excluding``. ``allowed``: bool [N], the same for all requests, or
    [B, N], a byte per entry. A semantic ID stays open while one of its items is allowed; its other items are
    dropped.
    """

    def __init__(self, ids: SharedIds, allowed: Tensor) -> None:
        self.ids, self.allowed = ids, allowed.cpu()

    @property
    def num_requests(self) -> int | None:
        """B, None where all requests are alike."""
        return len(self.allowed) if self.allowed.ndim == 2 else None

    def leaves(self, trie: Trie) -> ItemFilter | RequestFilter:
        """The filter of semantic IDs, for the trie of them on any device."""
        open_ids = self.ids.leaves_with(self.allowed.view(-1, self.allowed.shape[-1]))
        filters = [ItemFilter.from_mask(trie, row) for row in open_ids]
        return filters[0] if self.num_requests is None else RequestFilter.stack(filters)

    def select(self, requests: Tensor) -> SharedFilter:
        """The filter of these requests alone."""
        return self if self.num_requests is None else SharedFilter(self.ids, self.allowed[requests])

    def __and__(self, other: SharedFilter) -> SharedFilter:
        return SharedFilter(self.ids, self.allowed & other.allowed)

    def __or__(self, other: SharedFilter) -> SharedFilter:
        return SharedFilter(self.ids, self.allowed | other.allowed)

    def __invert__(self) -> SharedFilter:
        return SharedFilter(self.ids, ~self.allowed)
