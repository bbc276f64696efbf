"""Filters on the catalog: one subset for all rows of a call, or one subset per request of a batch.

N items, B requests, H excluded items per request, R rows per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.operands import device_of, integers_on, tensor_of
from .arrays import TrieArrays
from .filter_tensors import (
    NO_NODE,
    WORD_BITS,
    Filter,
    FilterTensors,
    closed_nodes,
    distinct,
    fill_inner,
    is_set,
    open_nodes,
    unpack_bits,
)
from .packed import popcount
from .trie import Trie

if TYPE_CHECKING:
    from ..runtime.operands import Numbers


class ItemFilter(Filter):
    """The allowed items of one trie, as one bit per node.

    Combine filters with ``&``, ``|`` and ``~``, and pass the result as ``filter=``. The filter applies to all
    rows of a call; ``ItemFilter.stack`` combines several into one filter per request. A filter belongs to the
    trie that it was made from and to that trie's copies on other devices. Other tries raise ValueError.

    Example:
        >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
        >>> allowed = ItemFilter.from_items(trie, [0, 2])
        >>> trie.mask(torch.tensor([0]), filter=allowed).tolist()
        [[True, False, False, True]]
    """

    __slots__ = ()

    def __init__(self, trie: TrieArrays, open: Tensor, fingerprint: str) -> None:
        """Internal. ``open`` is int64 [words] from ``open_nodes``; a wrong shape raises ValueError."""
        if open.dtype != torch.int64 or open.shape != (trie.num_nodes // WORD_BITS + 1,):
            raise ValueError(
                f"a filter of {trie.num_nodes} nodes has int64 [{trie.num_nodes // WORD_BITS + 1}] words, "
                f"got {open.dtype} {list(open.shape)}; make it with ItemFilter.from_mask"
            )
        empty = torch.empty(0, 0, dtype=torch.int32, device=open.device)
        super().__init__(trie, fingerprint, FilterTensors(open[None], empty.flatten(), empty))

    @classmethod
    def from_mask(cls, trie: Trie, allowed: Numbers) -> ItemFilter:
        """Allows the items whose entry in a mask is True.

        Args:
            trie: The trie of the items.
            allowed: bool [N], in the row order of ``Trie.from_codes``: a tensor, a numpy array or a list.

        Raises:
            ValueError: ``allowed`` has another shape or dtype.
        """
        allowed = tensor_of("allowed", allowed)
        if allowed.shape != (trie.num_items,) or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed must be bool [{trie.num_items}], got {allowed.dtype} {list(allowed.shape)}; "
                "one entry for each item of the trie"
            )
        by_rank = allowed.to(trie.device).index_select(0, trie.rows)  # [N]
        return cls(trie.arrays, open_nodes(trie.arrays, by_rank), trie.fingerprint)

    @classmethod
    def everything(cls, trie: Trie) -> ItemFilter:
        """Allows all items of ``trie``."""
        by_rank = torch.ones(trie.num_items, dtype=torch.bool, device=trie.device)
        return cls(trie.arrays, open_nodes(trie.arrays, by_rank), trie.fingerprint)

    @classmethod
    def from_items(cls, trie: Trie, allowed_ids: Numbers) -> ItemFilter:
        """Allows the items with the given ids and no others.

        Args:
            trie: The trie of the items.
            allowed_ids: Integers of any shape.

        Raises:
            ValueError: The trie has no item with one of these ids; the message names it.
        """
        ids = integers_on("allowed_ids", allowed_ids, trie.device).flatten()
        rank = trie.ranks_of(ids)
        unknown = ids[rank < 0]
        if unknown.numel():
            raise ValueError(f"no item of this trie has the id {int(unknown[0])}; pass ids of its items")
        by_rank = torch.zeros(trie.num_items, dtype=torch.bool, device=trie.device)
        by_rank[rank] = True
        return cls(trie.arrays, open_nodes(trie.arrays, by_rank), trie.fingerprint)

    @staticmethod
    def stack(filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """Returns one filter per request, as ``RequestFilter.stack`` does; None allows all items."""
        return RequestFilter.stack(filters)

    @property
    def open(self) -> Tensor:
        """One bit per node, set if an allowed item is below it: int64 [words]."""
        return self.tensors.open[0]

    def __and__(self, other: ItemFilter) -> ItemFilter:
        """Returns a filter of the items that both allow."""
        if not isinstance(other, ItemFilter):
            return NotImplemented
        return self._with(fill_inner(self.trie, self.open & self._matching(other).open))

    def __or__(self, other: ItemFilter) -> ItemFilter:
        """Returns a filter of the items that at least one of the two allows."""
        if not isinstance(other, ItemFilter):
            return NotImplemented
        return self._with(self.open | self._matching(other).open)

    def __invert__(self) -> ItemFilter:
        """Returns a filter of the items that this one does not allow."""
        flipped = ~self.open
        flipped[-1] &= (1 << self.trie.num_nodes % WORD_BITS) - 1  # clear the bits after the last node
        return self._with(fill_inner(self.trie, flipped))

    def __len__(self) -> int:
        """Returns the number of allowed items."""
        first_word, bit = divmod(self.trie.num_inner, WORD_BITS)  # of the leaves
        leaves_and_before = int(popcount(self.open[first_word:]).sum())
        return leaves_and_before - int(popcount(self.open[first_word] & ((1 << bit) - 1)))

    def __bool__(self) -> bool:
        """Returns True: a filter that allows no item is still a filter."""
        return True

    def to(self, device: str | torch.device) -> ItemFilter:
        """Returns the same filter on another device."""
        device = device_of(device)
        return ItemFilter(self.trie.to(device), self.open.to(device), self.fingerprint)

    def without_ranks(self, ranks: Numbers) -> ItemFilter:
        """Returns this filter without the items at ``ranks``; walks from each of them to the root.

        Args:
            ranks: Integers of any shape.

        Raises:
            ValueError: The trie does not have one of these ranks.
        """
        excluded = distinct(self._checked_ranks(ranks).flatten()[None])
        filter_of = torch.zeros(1, dtype=torch.int32, device=self.device)
        closed = closed_nodes(self.trie, self.tensors.open, filter_of, excluded).flatten().long()
        closed = closed[closed != NO_NODE]
        bits = torch.zeros_like(self.open)
        bits.index_add_(0, closed // WORD_BITS, torch.ones_like(closed) << (closed % WORD_BITS))
        return self._with(self.open & ~bits)

    def by_rank(self) -> Tensor:
        """Returns whether the item at each rank is allowed: bool [N]."""
        return unpack_bits(self.open, self.trie.num_nodes)[self.trie.num_inner :]

    def allows_ranks(self, ranks: Numbers) -> Tensor:
        """Returns whether the item at each of ``ranks`` is allowed.

        Args:
            ranks: Integers of any shape.

        Returns:
            bool, of the same shape.

        Raises:
            ValueError: The trie does not have one of these ranks.
        """
        ranks = self._checked_ranks(ranks)
        return is_set(self.tensors.open, ranks + self.trie.num_inner, torch.zeros_like(ranks))

    def _checked_ranks(self, ranks: Numbers) -> Tensor:
        """Returns ``ranks`` as int64 on the filter's device."""
        checked, items = integers_on("ranks", ranks, self.device), self.trie.rows.numel()
        if checked.numel():
            lowest, highest = map(int, checked.aminmax())
            if lowest < 0 or highest >= items:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(
                    f"ranks are 0 to {items - 1}, got {wrong}; Trie.ranks_of converts ids to ranks"
                )
        return checked

    def _matching(self, other: ItemFilter) -> ItemFilter:
        if other.fingerprint != self.fingerprint:
            raise ValueError("these filters belong to different tries; make both from the same trie")
        if other.device != self.device:
            raise ValueError(f"these filters are on {self.device} and {other.device}; move one with .to()")
        return other

    def _with(self, open: Tensor) -> ItemFilter:
        return ItemFilter(self.trie, open, self.fingerprint)


class RequestFilter(Filter):
    """One filter per request of a batch: a subset of the catalog and a list of excluded items.

    Combine it with another ``RequestFilter`` or an ``ItemFilter`` by ``&``, and pass it as ``filter=``. In a
    call with R rows, row r belongs to request r // (R // B), so the beams of a request are consecutive. R
    must be a multiple of B = ``num_requests``. A filter that several requests share is stored once.

    Example:
        >>> trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
        >>> seen = RequestFilter.excluding(trie, [[2], [0, 1]])  # two users and the items that they have seen
        >>> trie.mask(torch.tensor([0, 0]), filter=seen).tolist()
        [[True, False, False, False], [False, False, False, True]]
    """

    __slots__ = ("excluded", "filters", "num_requests")

    def __init__(
        self, trie: TrieArrays, fingerprint: str, filters: Sequence[ItemFilter | None], excluded: Tensor,
        tensors: FilterTensors | None = None,
    ) -> None:  # fmt: skip
        """Internal. ``filters`` [B] has one entry per request. ``excluded`` int32 [B, H] holds ranks,
        ascending and distinct, then NO_NODE. ``tensors`` are computed if they are not given.
        """
        super().__init__(trie, fingerprint, tensors or _tensors_of(trie, filters, excluded))
        self.filters, self.excluded, self.num_requests = filters, excluded, len(filters)

    @classmethod
    def stack(cls, filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """Combines one filter per request.

        Args:
            filters: One entry per request. None allows all items; at least one entry must be a filter.

        Raises:
            ValueError: The filters belong to different tries or devices, or all entries are None.
            TypeError: An entry is neither an ``ItemFilter`` nor None.
        """
        given = [one for one in filters if one is not None]
        if not given:
            raise ValueError("a stack needs at least one ItemFilter; pass filter=None to allow all items")
        first = given[0]
        _check_filters(given, first)
        nothing = torch.empty(len(filters), 0, dtype=torch.int32, device=first.device)
        return cls(first.trie, first.fingerprint, filters, nothing)

    @classmethod
    def excluding(cls, trie: Trie, ids: Numbers) -> RequestFilter:
        """Allows all items except a list per request, such as the items that the user has already seen.

        Args:
            trie: The trie of the items.
            ids: Integers [B, H], padded with -1; or lists of different lengths. Ids that the trie does not
                have and repeated ids have no effect. Each request stores H ranks.

        Raises:
            ValueError: ``ids`` has another shape or holds no integers.
        """
        rows = _padded(ids) if isinstance(ids, Sequence) else ids
        given = integers_on("excluded ids", rows, trie.device)
        if given.dim() != 2 or given.shape[0] < 1:
            raise ValueError(f"excluded ids must be [B, H], one row per request, got {list(given.shape)}")
        rank = trie.ranks_of(given)
        excluded = distinct(torch.where(rank < 0, NO_NODE, rank))
        return cls(trie.arrays, trie.fingerprint, [None] * given.shape[0], excluded)

    def __and__(self, other: RequestFilter | ItemFilter) -> RequestFilter:
        """Returns what both allow, request by request; an ``ItemFilter`` applies to every request."""
        if not isinstance(other, RequestFilter | ItemFilter):
            return NotImplemented
        requests = self.num_requests if isinstance(other, ItemFilter) else other.num_requests
        if other.device != self.device:
            raise ValueError(f"these filters are on {self.device} and {other.device}; move one with .to()")
        if other.fingerprint != self.fingerprint or requests != self.num_requests:
            raise ValueError(
                f"cannot combine filters of {self.num_requests} and {requests} requests, or of different "
                "tries; make both from the same trie with one row per request"
            )
        others = [other] * requests if isinstance(other, ItemFilter) else other.filters
        excluded = self.excluded
        if isinstance(other, RequestFilter):
            excluded = distinct(torch.cat((excluded, other.excluded), 1))
        return RequestFilter(self.trie, self.fingerprint, _intersections(self.filters, others), excluded)

    __rand__ = __and__

    def with_filters(self, filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """Returns the same exclusions with other filters, one per request.

        Raises:
            ValueError: The number of filters is not ``num_requests``, or they belong to another trie or
                device.
            TypeError: An entry is neither an ``ItemFilter`` nor None.
        """
        if len(filters) != self.num_requests:
            raise ValueError(f"{self.num_requests} requests need as many filters, got {len(filters)}")
        _check_filters([one for one in filters if one is not None], self)
        return RequestFilter(self.trie, self.fingerprint, filters, self.excluded)

    def select(self, requests: Numbers) -> RequestFilter:
        """Returns the filter of another batch, whose request i is request ``requests[i]`` of this one.

        Raises:
            ValueError: A request does not exist, or ``requests`` is empty or not one-dimensional.
        """
        chosen, old = integers_on("requests", requests, self.device), self.tensors
        numbers = chosen.flatten().tolist()
        if chosen.dim() != 1 or not numbers or min(numbers) < 0 or max(numbers) >= self.num_requests:
            raise ValueError(
                f"requests must be one or more numbers from 0 to {self.num_requests - 1}, "
                f"got {numbers[:5]} in the shape {list(chosen.shape)}"
            )
        filters = [self.filters[request] for request in numbers]
        filter_of = old.filter_of[chosen] if old.filter_of.numel() else old.filter_of
        tensors = FilterTensors(old.open, filter_of, old.closed[chosen])
        return RequestFilter(self.trie, self.fingerprint, filters, self.excluded[chosen], tensors)

    def to(self, device: str | torch.device) -> RequestFilter:
        """Returns the same filter on another device."""
        device = device_of(device)
        moved = {id(one): one.to(device) for one in self.filters if one is not None}
        filters = [moved.get(id(one)) for one in self.filters]
        excluded, tensors = self.excluded.to(device), self.tensors.to(device)
        return RequestFilter(self.trie.to(device), self.fingerprint, filters, excluded, tensors)


AnyFilter = ItemFilter | RequestFilter


def _tensors_of(trie: TrieArrays, filters: Sequence[ItemFilter | None], excluded: Tensor) -> FilterTensors:
    """Returns the tensors of the requests; stores a filter that several requests share once."""
    bitmaps: dict[int, Tensor] = {id(one): one.tensors.open for one in filters if one is not None}
    index_of = {key: index for index, key in enumerate(bitmaps)}
    indices = [index_of.get(id(one), -1) for one in filters] if bitmaps else []
    filter_of = torch.tensor(indices, dtype=torch.int32, device=excluded.device)
    if not bitmaps:
        open_ = torch.empty(0, 0, dtype=torch.int64, device=excluded.device)
    else:
        open_ = torch.cat(list(bitmaps.values())) if len(bitmaps) > 1 else next(iter(bitmaps.values()))
    return FilterTensors(open_, filter_of, closed_nodes(trie, open_, filter_of, excluded))


def _check_filters(filters: Sequence[ItemFilter], like: Filter) -> None:
    """Checks that all entries are ItemFilters of the trie and device of ``like``."""
    for one in filters:
        if not isinstance(one, ItemFilter):
            raise TypeError(f"a request has one ItemFilter, or None, got {type(one).__name__}")
        if one.fingerprint != like.fingerprint or one.device != like.device:
            raise ValueError(
                "the filters of a stack must belong to one trie on one device, but these do not; "
                "make all from the same trie"
            )


def _padded(rows: Sequence[Any]) -> list[list[Any]]:
    """Pads rows with -1 to the length of the longest."""
    try:
        longest = max((len(row) for row in rows), default=0)
        return [[*row, *[-1] * (longest - len(row))] for row in rows]
    except TypeError:
        raise ValueError("excluded ids must be one list of ids per request; one of these is not") from None


def _intersections(
    left: Sequence[ItemFilter | None], right: Sequence[ItemFilter | None]
) -> list[ItemFilter | None]:
    """Returns what both sides allow per request; combines each distinct pair once."""
    combined: dict[tuple[int, int], ItemFilter | None] = {}
    for a, b in zip(left, right, strict=True):
        if (id(a), id(b)) not in combined:
            combined[id(a), id(b)] = a & b if a is not None and b is not None else a if b is None else b
    return [combined[id(a), id(b)] for a, b in zip(left, right, strict=True)]
