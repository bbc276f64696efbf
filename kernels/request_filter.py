"""A filter for each request of a batch: its own subset of the catalog, and items of its own left out.

B requests, F distinct filters among them, H excluded items a request, R rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .filter_tensors import NO_RANK, FilterTensors, is_set, no_requests, with_counts
from .item_filter import ItemFilter

if TYPE_CHECKING:
    from .trie import Trie


class RequestFilter:
    """Filters of ``num_requests`` requests; ``&`` combines with another or with an ItemFilter; pass as
    ``filter=``.

    In a call of R rows, row r belongs to request r // (R // B): the beams of a request stand together. R
    must be a multiple of B. A filter given to several requests is kept once.
    """

    __slots__ = ("fingerprint", "num_items", "num_requests", "tensors")

    def __init__(self, tensors: FilterTensors, num_requests: int, num_items: int, fingerprint: str) -> None:
        """Internal: use ``stack`` or ``excluding``."""
        self.tensors, self.num_requests = tensors, num_requests
        self.num_items, self.fingerprint = num_items, fingerprint

    @classmethod
    def stack(cls, filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """One filter a request, None where all items are allowed; at least one must be a filter.

        Raises ValueError where they belong to different tries or devices.
        """
        distinct = list({id(one): one for one in filters if one is not None}.values())
        if not distinct:
            raise ValueError("a stack needs at least one ItemFilter; pass filter=None where all is allowed")
        first = distinct[0]
        for one in distinct:
            if one.fingerprint != first.fingerprint or one.device != first.device:
                raise ValueError("the filters of a stack belong to one trie on one device; these do not")
        place = {id(one): index for index, one in enumerate(distinct)} | {id(None): -1}
        filter_of = torch.tensor([place[id(one)] for one in filters], dtype=torch.int32, device=first.device)
        words = torch.cat([one.tensors.words for one in distinct])
        tensors = with_counts(words, filter_of, _none(len(filters), first.device))
        return cls(tensors, len(filters), first.num_items, first.fingerprint)

    @classmethod
    def excluding(cls, trie: Trie, ids: Tensor | Sequence[Sequence[int]]) -> RequestFilter:
        """Everything but, for each request, the items of its row of ``ids`` [B, H], padded with -1.

        "Not what this user had already". Ids the trie does not have, and repeats, change nothing. H ranks
        are kept a request, so that short lists cost little. Rows of different lengths may be given as lists.
        """
        if not isinstance(ids, Tensor):
            most = max((len(row) for row in ids), default=0)
            ids = torch.tensor([[*row, *[-1] * (most - len(row))] for row in ids]).view(len(ids), most).long()
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"excluded ids must be integers [B, H], a row a request, got {ids.dtype} {list(ids.shape)}"
            )
        rank = trie.ranks_of(ids.to(trie.device, torch.int64))
        excluded = _distinct(torch.where(rank < 0, NO_RANK, rank))
        filter_of, _ = no_requests(trie.device)
        words = torch.empty(0, 0, dtype=torch.int64, device=trie.device)
        tensors = FilterTensors(words, words.to(torch.int32), filter_of, excluded)
        return cls(tensors, ids.shape[0], trie.num_items, trie.fingerprint)

    @property
    def device(self) -> torch.device:
        return self.tensors.excluded.device

    def __and__(self, other: RequestFilter | ItemFilter) -> RequestFilter:
        """What both allow, request by request; an ItemFilter counts for every request."""
        if isinstance(other, ItemFilter):
            other = RequestFilter.stack([other] * self.num_requests)
        if not isinstance(other, RequestFilter):
            return NotImplemented
        if other.fingerprint != self.fingerprint or other.num_requests != self.num_requests:
            raise ValueError(
                f"filters of {self.num_requests} and {other.num_requests} requests do not combine, nor those "
                "of different tries; make both from the same trie, a row a request"
            )
        words, filter_of = _both(self, other)
        excluded = _distinct(torch.cat((self.tensors.excluded, other.tensors.excluded), 1))
        if words.numel():  # only ranks that the bitmap allows are kept, so that they can be subtracted
            rank = excluded.long().clamp(max=self.num_items - 1)
            chosen = filter_of.long()[:, None]
            open_ = is_set(words, rank, chosen.clamp(min=0)) | (chosen < 0)
            excluded = _distinct(torch.where(open_, excluded, NO_RANK))
        tensors = with_counts(words, filter_of, excluded)
        return RequestFilter(tensors, self.num_requests, self.num_items, self.fingerprint)

    __rand__ = __and__

    def select(self, requests: Tensor) -> RequestFilter:
        """The filter of another batch: its request i is request ``requests[i]`` of this one."""
        old, chosen = self.tensors, requests.to(self.device, torch.int64)
        filter_of = old.filter_of[chosen] if old.filter_of.numel() else old.filter_of
        tensors = FilterTensors(old.words, old.before, filter_of, old.excluded[chosen])
        return RequestFilter(tensors, chosen.numel(), self.num_items, self.fingerprint)

    def to(self, device: str | torch.device) -> RequestFilter:
        """The same filter on another device."""
        tensors = self.tensors.to(device)
        return RequestFilter(tensors, self.num_requests, self.num_items, self.fingerprint)


def _none(requests: int, device: torch.device) -> Tensor:
    return torch.empty(requests, 0, dtype=torch.int32, device=device)


def _distinct(ranks: Tensor) -> Tensor:
    """Each row of [B, H] ascending, repeats replaced by ``NO_RANK`` at its end; int32."""
    ranks = ranks.to(torch.int32).sort(1).values
    again = torch.nn.functional.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0)) if ranks.shape[1] else ranks > 0
    return ranks.masked_fill(again, NO_RANK).sort(1).values


def _both(left: RequestFilter, right: RequestFilter) -> tuple[Tensor, Tensor]:
    """The bitmaps of what both allow, [F, W], and which of them each request obeys, [B] int32."""
    a, b = left.tensors, right.tensors
    if not a.words.numel() or not b.words.numel():
        kept = a if a.words.numel() else b
        return kept.words, kept.filter_of
    pairs, filter_of = torch.stack((a.filter_of, b.filter_of), 1).unique(dim=0, return_inverse=True)
    i, j = pairs.long().unbind(1)  # [F]
    words_i = torch.where(i[:, None] < 0, -1, a.words[i.clamp(min=0)])
    words_j = torch.where(j[:, None] < 0, -1, b.words[j.clamp(min=0)])
    neither = (i < 0) & (j < 0)  # sorted to the front, if at all
    kept_words = (words_i & words_j)[~neither]
    return kept_words, (filter_of - int(neither.any())).to(torch.int32)
