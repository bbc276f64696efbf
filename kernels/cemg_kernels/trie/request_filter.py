"""A filter for each request of a batch: its own subset of the catalog, and items of its own left out.

B requests, F distinct filters among them, H excluded items a request, R rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.operands import device_of, integers_on
from .arrays import TrieArrays
from .filter_tensors import NO_NODE, FilterTensors, closed_nodes, distinct
from .item_filter import ItemFilter

if TYPE_CHECKING:
    from ..runtime.operands import Numbers
    from .trie import Trie


class RequestFilter:
    """Filters of ``num_requests`` requests; ``&`` combines with another or with an ItemFilter; pass as
    ``filter=``.

    In a call of R rows, row r belongs to request r // (R // B): the beams of a request stand together. R
    must be a multiple of B. A filter given to several requests is kept once.
    """

    __slots__ = ("excluded", "filters", "fingerprint", "num_requests", "tensors", "trie")

    def __init__(
        self, trie: TrieArrays, fingerprint: str, filters: Sequence[ItemFilter | None], excluded: Tensor,
        tensors: FilterTensors | None = None,
    ) -> None:  # fmt: skip
        """Internal: ``filters`` [B], each request's or None; ``excluded`` [B, H] int32 ranks, ascending and
        distinct, then NO_NODE; ``tensors`` of all this.
        """
        self.trie, self.fingerprint, self.filters, self.excluded = trie, fingerprint, filters, excluded
        self.num_requests = len(filters)
        self.tensors: FilterTensors = tensors or _tensors_of(trie, filters, excluded)

    @classmethod
    def stack(cls, filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """One filter a request, None where all items are allowed; at least one must be a filter.

        Raises ValueError where they belong to different tries or devices, TypeError for what is not a filter.
        """
        given = [one for one in filters if one is not None]
        if not given:
            raise ValueError("a stack needs at least one ItemFilter; pass filter=None where all is allowed")
        first = given[0]
        _check_filters(given, first)
        none = torch.empty(len(filters), 0, dtype=torch.int32, device=first.device)
        return cls(first.trie, first.fingerprint, filters, none)

    @classmethod
    def excluding(cls, trie: Trie, ids: Numbers) -> RequestFilter:
        """Everything but, for each request, the items of its row of ``ids`` [B, H], padded with -1.

        "Not what this user had already". Ids the trie does not have, and repeats, change nothing. H ranks
        are kept a request, so that short lists cost little. Rows of different lengths may be given as lists.
        """
        rows = _padded(ids) if isinstance(ids, Sequence) else ids
        given = integers_on("excluded ids", rows, trie.device)
        if given.dim() != 2 or given.shape[0] < 1:
            raise ValueError(f"excluded ids must be [B, H], a row a request, got {list(given.shape)}")
        rank = trie.ranks_of(given)
        excluded = distinct(torch.where(rank < 0, NO_NODE, rank))
        return cls(trie.arrays, trie.fingerprint, [None] * given.shape[0], excluded)

    @property
    def device(self) -> torch.device:
        return self.excluded.device

    def __and__(self, other: RequestFilter | ItemFilter) -> RequestFilter:
        """What both allow, request by request; an ItemFilter counts for every request."""
        if not isinstance(other, RequestFilter | ItemFilter):
            return NotImplemented
        requests = self.num_requests if isinstance(other, ItemFilter) else other.num_requests
        if other.device != self.device:
            raise ValueError(f"these filters are on {self.device} and {other.device}; move one with .to()")
        if other.fingerprint != self.fingerprint or requests != self.num_requests:
            raise ValueError(
                f"filters of {self.num_requests} and {requests} requests do not combine, nor those "
                "of different tries; make both from the same trie, a row a request"
            )
        theirs = [other] * requests if isinstance(other, ItemFilter) else other.filters
        excluded = self.excluded
        if isinstance(other, RequestFilter):
            excluded = distinct(torch.cat((excluded, other.excluded), 1))
        return RequestFilter(self.trie, self.fingerprint, _both(self.filters, theirs), excluded)

    __rand__ = __and__

    def with_filters(self, filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """The same exclusions under other filters, one a request; ValueError for another number of them."""
        if len(filters) != self.num_requests:
            raise ValueError(f"{self.num_requests} requests need as many filters, got {len(filters)}")
        _check_filters([one for one in filters if one is not None], self)
        return RequestFilter(self.trie, self.fingerprint, filters, self.excluded)

    def select(self, requests: Numbers) -> RequestFilter:
        """The filter of another batch: its request i is request ``requests[i]`` of this one.

        Raises ValueError for a request that there is not, and where none is chosen.
        """
        chosen, old = integers_on("requests", requests, self.device), self.tensors
        numbers = chosen.flatten().tolist()
        if chosen.dim() != 1 or not numbers or min(numbers) < 0 or max(numbers) >= self.num_requests:
            raise ValueError(
                f"requests must be one or more numbers from 0 to {self.num_requests - 1}, "
                f"got {numbers[:5]} in the shape {list(chosen.shape)}"
            )
        filters = [self.filters[request] for request in numbers]
        places = old.filter_of[chosen] if old.filter_of.numel() else old.filter_of
        tensors = FilterTensors(old.open, places, old.closed[chosen])
        return RequestFilter(self.trie, self.fingerprint, filters, self.excluded[chosen], tensors)

    def to(self, device: str | torch.device) -> RequestFilter:
        """The same filter on another device."""
        device = device_of(device)
        moved = {id(one): one.to(device) for one in self.filters if one is not None}
        filters = [moved.get(id(one)) for one in self.filters]
        excluded, tensors = self.excluded.to(device), self.tensors.to(device)
        return RequestFilter(self.trie.to(device), self.fingerprint, filters, excluded, tensors)


def _tensors_of(trie: TrieArrays, filters: Sequence[ItemFilter | None], excluded: Tensor) -> FilterTensors:
    """A filter given to several requests is kept once."""
    bitmaps: dict[int, Tensor] = {id(one): one.tensors.open for one in filters if one is not None}
    place = {key: index for index, key in enumerate(bitmaps)}
    filter_of = [place.get(id(one), -1) for one in filters] if bitmaps else []
    of_requests = torch.tensor(filter_of, dtype=torch.int32, device=excluded.device)
    if not bitmaps:
        open_ = torch.empty(0, 0, dtype=torch.int64, device=excluded.device)
    else:
        open_ = torch.cat(list(bitmaps.values())) if len(bitmaps) > 1 else next(iter(bitmaps.values()))
    return FilterTensors(open_, of_requests, closed_nodes(trie, open_, of_requests, excluded))


def _check_filters(filters: Sequence[ItemFilter], like: ItemFilter | RequestFilter) -> None:
    """TypeError for what is not an ItemFilter, ValueError for another trie's, or another device's, than
    ``like``."""
    for one in filters:
        if not isinstance(one, ItemFilter):
            raise TypeError(f"a request has one ItemFilter, or None, got {type(one).__name__}")
        if one.fingerprint != like.fingerprint or one.device != like.device:
            raise ValueError("the filters of a stack belong to one trie on one device; these do not")


def _padded(rows: Sequence[Any]) -> list[list[Any]]:
    """Rows of one length, the shorter ones filled up with -1."""
    try:
        most = max((len(row) for row in rows), default=0)
        return [[*row, *[-1] * (most - len(row))] for row in rows]
    except TypeError:
        raise ValueError("excluded ids must be a list of ids for each request; one of these is not") from None


def _both(left: Sequence[ItemFilter | None], right: Sequence[ItemFilter | None]) -> list[ItemFilter | None]:
    """What both allow, each pair combined once."""
    found: dict[tuple[int, int], ItemFilter | None] = {}
    for a, b in zip(left, right, strict=True):
        if (id(a), id(b)) not in found:
            found[id(a), id(b)] = a & b if a is not None and b is not None else a if b is None else b
    return [found[id(a), id(b)] for a, b in zip(left, right, strict=True)]
