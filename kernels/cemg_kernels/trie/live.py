"""A catalog that changes while it serves requests: removals are immediate, additions need a rebuild.

N items, A added items, L levels.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..runtime.operands import integers_on
from .build import check_codes
from .filters import AnyFilter, ItemFilter, RequestFilter
from .trie import Trie

if TYPE_CHECKING:
    from ..runtime.operands import Numbers


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The catalog as one request sees it from its first decode step to its last.

    Args:
        version: The number of the trie, counted from 1. Filters made from ``trie`` fit only this version.
        trie: The trie.
        allowed: A filter without the items removed since the trie was built; None if none were removed.
    """

    version: int
    trie: Trie
    allowed: ItemFilter | None
    restricted: WeakKeyDictionary[ItemFilter, ItemFilter] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )  # the caller's filters combined with ``allowed``, cached because many requests share a few filters

    def restrict(self, filter: AnyFilter | None = None) -> AnyFilter | None:
        """Combines ``filter`` with the removals; pass the result as ``filter=``.

        Raises:
            ValueError: The filter was made from another version.
            TypeError: ``filter`` is neither an ``ItemFilter`` nor a ``RequestFilter``.
        """
        if filter is None:
            return self.allowed
        if not isinstance(filter, ItemFilter | RequestFilter):
            raise TypeError(f"filter must be an ItemFilter or a RequestFilter, got {type(filter).__name__}")
        if filter.fingerprint != self.trie.fingerprint:
            raise ValueError(
                f"the filter belongs to another version than {self.version}; "
                "make it from the trie of this snapshot"
            )
        if self.allowed is None:
            return filter
        if isinstance(filter, RequestFilter):
            return filter.with_filters([self._restricted(one) for one in filter.filters])
        return self._restricted(filter)

    def _restricted(self, filter: ItemFilter | None) -> ItemFilter:
        assert self.allowed is not None
        if filter is None:
            return self.allowed
        combined = self.restricted.get(filter)
        if combined is None:
            combined = self.restricted[filter] = filter & self.allowed
        return combined


class LiveTrie:
    """A trie whose items can be added and removed. All methods are thread-safe.

    A request takes one ``snapshot()`` and uses it to the end. ``remove`` takes effect with the next snapshot.
    ``add`` returns immediately; a background thread rebuilds the trie and publishes all added items together
    as the next version. ``wait`` blocks until then. The rebuild also frees the memory of removed items, once
    the caller has dropped the filters of the previous version.

    Example:
        >>> live = LiveTrie(Trie.from_codes(torch.tensor([[0, 1], [0, 2]]), 4))
        >>> live.add([[3, 0]], [7])
        >>> live.wait(), len(live)
        (2, 3)
    """

    def __init__(self, trie: Trie) -> None:
        self._lock = threading.Condition()
        self._current = Snapshot(1, _prepared(trie), None)
        self._pending: dict[
            int, tuple[int, ...]
        ] = {}  # id -> codes of added items that are not yet in a trie
        self._id_of: dict[tuple[int, ...], int] = {}  # the inverse of _pending
        self._removed: set[int] = set()  # ids removed since the current rebuild started
        self._worker: threading.Thread | None = None
        self._failure: BaseException | None = None

    def snapshot(self) -> Snapshot:
        """Returns the current catalog as an immutable snapshot; does not block."""
        return self._current

    @property
    def version(self) -> int:
        """The version of the current trie."""
        return self._current.version

    def __len__(self) -> int:
        """Returns the number of current and pending items."""
        with self._lock:
            now = self._current
            return (now.trie.num_items if now.allowed is None else len(now.allowed)) + len(self._pending)

    def remove(self, item_ids: Numbers) -> None:
        """Removes items, from the next snapshot on. Removes none of them if one is unknown.

        Args:
            item_ids: Integers of any shape.

        Raises:
            ValueError: The catalog does not have one of the ids; the message names it.
        """
        ids = integers_on("item_ids", item_ids, torch.device("cpu")).flatten().unique()
        with self._lock:
            ranks = self._current_ranks(ids)
            pending = [int(i) in self._pending for i in ids]
            for current, queued, item in zip((ranks >= 0).tolist(), pending, ids.tolist(), strict=True):
                if not current and not queued:
                    raise ValueError(f"the catalog has no item {item} to remove; pass ids of its items")
            for item in ids[torch.tensor(pending, dtype=torch.bool)].tolist():
                del self._id_of[self._pending.pop(item)]
            if self._worker is not None:
                self._removed.update(ids.tolist())
            self._current = _without(self._current, ranks[ranks >= 0])

    def add(self, codes: Numbers, item_ids: Numbers) -> None:
        """Adds items in the background. Adds none of them if one is invalid. A removed id may be added again.

        Args:
            codes: Integers [A, L].
            item_ids: Integers [A].

        Raises:
            ValueError: Codes are out of range, or another item has the same id or codes; the message names
                both.
            RuntimeError: An earlier rebuild failed.
        """
        trie = self._current.trie
        ids = integers_on("item_ids", item_ids, torch.device("cpu")).flatten()
        codes = integers_on("codes", codes, torch.device("cpu"))
        if codes.dim() != 2 or codes.shape != (ids.numel(), trie.levels):
            raise ValueError(f"codes must be [{ids.numel()}, {trie.levels}], got {list(codes.shape)}")
        if ids.numel() == 0:
            return
        check_codes(codes, trie.codebook_size)
        with self._lock:
            self._raise_failure()
            self._check_new(codes, ids)
            for item, row in zip(ids.tolist(), map(tuple, codes.tolist()), strict=True):
                self._pending[item], self._id_of[row] = row, item
            if self._worker is None:
                self._worker = threading.Thread(target=self._rebuild, name="cemg-live-trie", daemon=True)
                self._worker.start()

    def wait(self, timeout: float | None = None) -> int:
        """Blocks until all added items are in the trie; returns its version.

        Raises:
            TimeoutError: ``timeout`` seconds have passed.
            RuntimeError: The rebuild failed.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: self._worker is None, timeout):
                raise TimeoutError(
                    f"{len(self._pending)} items are still pending after {timeout} s; call again"
                )
            self._raise_failure()
            return self._current.version

    def save(self, path: str | Path) -> None:
        """Waits for pending items, then writes a trie of all items; raises ValueError if there are none."""
        self.wait()
        snapshot = self._current
        (snapshot.trie if snapshot.allowed is None else _merged(snapshot, {})).save(path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> LiveTrie:
        """Loads a file of ``save`` or ``Trie.save``; the version starts at 1."""
        return cls(Trie.load(path, device))

    def _current_ranks(self, ids: Tensor) -> Tensor:
        """Returns the rank of each id in the current catalog, -1 for others; on the CPU."""
        trie, allowed = self._current.trie, self._current.allowed
        rank = trie.ranks_of(ids.to(trie.device))
        if allowed is not None:
            rank = torch.where((rank >= 0) & allowed.allows_ranks(rank.clamp(min=0)), rank, -1)
        return rank.cpu()

    def _check_new(self, codes: Tensor, ids: Tensor) -> None:
        """Raises ValueError if a current, pending or added item already has one of the ids or codes."""
        trie = self._current.trie
        id_exists = (self._current_ranks(ids) >= 0).tolist()
        leaves = trie.lookup(codes.to(trie.device), filter=self._current.allowed)
        current_items = trie.items(leaves).tolist()
        added: dict[tuple[int, ...], int] = {}
        added_ids: set[int] = set()
        for item, row, exists, current in zip(
            ids.tolist(), map(tuple, codes.tolist()), id_exists, current_items, strict=True
        ):
            if item < 0 or exists or item in self._pending or item in added_ids:
                raise ValueError(
                    f"the id {item} is negative or already in use; pass one distinct id per added item"
                )
            other = current if current >= 0 else self._id_of.get(row, added.get(row))
            if other is not None:
                raise ValueError(
                    f"items {other} and {item} would share the codes {list(row)}; resolve the collision first"
                )
            added[row] = item
            added_ids.add(item)

    def _rebuild(self) -> None:
        """Runs in the background thread: rebuilds and publishes the trie until no item is pending."""
        while True:
            with self._lock:
                if not self._pending or self._failure is not None:
                    self._worker = None
                    self._lock.notify_all()
                    return
                base, added, self._removed = self._current, dict(self._pending), set()
            try:
                trie = _prepared(_merged(base, added))
                with self._lock:
                    self._publish(base.version + 1, trie, added)
            except BaseException as error:  # ``wait`` and ``add`` report it
                self._failure = error

    def _publish(self, version: int, trie: Trie, added: dict[int, tuple[int, ...]]) -> None:
        """Makes the rebuilt trie current, without the items removed during the rebuild."""
        for item, row in added.items():
            if item not in self._removed:
                del self._pending[item], self._id_of[row]
        rank = trie.ranks_of(torch.tensor(sorted(self._removed), dtype=torch.int64, device=trie.device))
        self._current = _without(Snapshot(version, trie, None), rank[rank >= 0].cpu())

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the rebuild in the background failed; make a new LiveTrie") from self._failure


def _prepared(trie: Trie) -> Trie:
    """Computes the trie's id index and fingerprint in advance, so that requests do not wait for them."""
    trie.ranks_of(torch.empty(0, dtype=torch.int64, device=trie.device))
    assert trie.fingerprint
    return trie


def _without(snapshot: Snapshot, ranks: Tensor) -> Snapshot:
    """Returns the snapshot without the items at these distinct ranks."""
    if ranks.numel() == 0:
        return snapshot
    trie, allowed = snapshot.trie, snapshot.allowed
    remaining = ItemFilter.everything(trie) if allowed is None else allowed
    return Snapshot(snapshot.version, trie, remaining.without_ranks(ranks.to(trie.device)))


def _merged(snapshot: Snapshot, added: dict[int, tuple[int, ...]]) -> Trie:
    """Builds a trie of the items in the snapshot and the added items."""
    trie = snapshot.trie
    codes, ids = trie.codes_by_rank(), trie.ids_by_rank
    if snapshot.allowed is not None:
        remaining = snapshot.allowed.by_rank()
        codes, ids = codes[remaining], ids[remaining]
    if added:
        added_codes = torch.tensor(list(added.values()), dtype=codes.dtype, device=trie.device)
        codes = torch.cat((codes, added_codes))
        ids = torch.cat((ids, torch.tensor(list(added), dtype=torch.int64, device=trie.device)))
    return Trie.from_codes(codes, trie.codebook_size, ids, trie.device)
