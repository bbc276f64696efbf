"""Semantic IDs that several items share: one leaf of the trie stands for several items.

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

    Attributes:
        codes: [U, levels], ascending.
        leaf_of: [N], the number of each item's semantic ID.
        members: [N], rows of items grouped by ID; within a group, most training interactions first.
        begins: [U + 1], offset of each group in ``members``.
    """

    codes: Tensor
    leaf_of: Tensor
    members: Tensor
    begins: Tensor

    @classmethod
    def of(cls, codes: Tensor, counts: Tensor | None) -> SharedIds:
        """From codes [N, levels] and training interactions [N], or None if these are unknown."""
        unique, leaf_of, sizes = codes.unique(dim=0, return_inverse=True, return_counts=True)
        order = torch.arange(len(codes)) if counts is None else (-counts).argsort(stable=True)
        members = order[leaf_of[order].argsort(stable=True)]
        begins = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls(unique, leaf_of, members, begins)

    def leaves_with(self, allowed: Tensor) -> Tensor:
        """Which IDs have at least one allowed item: [R, U] bool, from ``allowed`` [R, N] bool."""
        counts = torch.zeros(len(allowed), len(self.codes), dtype=torch.int32)
        return counts.index_add_(1, self.leaf_of, allowed.to(torch.int32)) > 0


class SharedFilter:
    """Which items of a catalog with shared IDs may be returned. Combine filters with ``&``, ``|`` and ``~``.

    `Catalog.only` and `Catalog.excluding` build it. A semantic ID stays in the search while one of its items
    is allowed; its other items are dropped from the result.

    Attributes:
        allowed: bool, [N] for all requests or [B, N] for one row per request.
    """

    def __init__(self, ids: SharedIds, allowed: Tensor) -> None:
        self.ids, self.allowed = ids, allowed.cpu()

    @property
    def num_requests(self) -> int | None:
        """B; None if all requests have the same filter."""
        return len(self.allowed) if self.allowed.ndim == 2 else None

    def leaves(self, trie: Trie) -> ItemFilter | RequestFilter:
        """The same filter over semantic IDs, for their trie on any device."""
        open_ids = self.ids.leaves_with(self.allowed.view(-1, self.allowed.shape[-1]))
        filters = [ItemFilter.from_mask(trie, row) for row in open_ids]
        return filters[0] if self.num_requests is None else RequestFilter.stack(filters)

    def select(self, requests: Tensor) -> SharedFilter:
        """The filter of only these requests."""
        return self if self.num_requests is None else SharedFilter(self.ids, self.allowed[requests])

    def __and__(self, other: SharedFilter) -> SharedFilter:
        return SharedFilter(self.ids, self.allowed & other.allowed)

    def __or__(self, other: SharedFilter) -> SharedFilter:
        return SharedFilter(self.ids, self.allowed | other.allowed)

    def __invert__(self) -> SharedFilter:
        return SharedFilter(self.ids, ~self.allowed)
