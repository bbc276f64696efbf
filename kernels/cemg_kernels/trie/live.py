"""A catalog that changes while it serves: removals at once, additions by a rebuild in the background.

N items, A of them new, L levels.
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
from .arrays import check_codes
from .item_filter import ItemFilter
from .request_filter import RequestFilter
from .trie import Filter, Trie

if TYPE_CHECKING:
    from ..runtime.operands import Numbers


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The catalog as one request sees it, from its first step to its last.

    ``version`` counts the tries; filters made from ``trie`` serve this version and no other. ``allowed``
    leaves out what has been removed since the trie was built; None where nothing has.
    """

    version: int
    trie: Trie
    allowed: ItemFilter | None
    restricted: WeakKeyDictionary[ItemFilter, ItemFilter] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )  # what filters of the caller's leave of ``allowed``: a few serve many requests

    def restrict(self, filter: Filter | None = None) -> Filter | None:
        """What ``filter`` and the removals both leave: pass it as ``filter=``.

        Raises ValueError where the filter was made from another version.
        """
        if filter is None:
            return self.allowed
        if not isinstance(filter, ItemFilter | RequestFilter):
            raise TypeError(f"filter must be an ItemFilter or a RequestFilter, got {type(filter).__name__}")
        if filter.fingerprint != self.trie.fingerprint:
            raise ValueError(f"the filter belongs to another version than {self.version}; make it anew")
        if self.allowed is None:
            return filter
        if isinstance(filter, RequestFilter):
            return filter.with_filters([self._restricted(one) for one in filter.filters])
        return self._restricted(filter)

    def _restricted(self, filter: ItemFilter | None) -> ItemFilter:
        assert self.allowed is not None
        if filter is None:
            return self.allowed
        found = self.restricted.get(filter)
        if found is None:
            found = self.restricted[filter] = filter & self.allowed
        return found


class LiveTrie:
    """A trie whose items come and go. Calls from any thread are safe.

    A request takes one ``snapshot()`` and keeps it. ``remove`` holds from the next snapshot on. ``add``
    returns at once; the items appear together when a thread in the background has rebuilt the trie and
    swapped it in, as the next version (``wait`` until then). What was removed leaves memory then too, once
    the caller has dropped the filters of the version before.
    """

    def __init__(self, trie: Trie) -> None:
        self._lock = threading.Condition()
        self._now = Snapshot(1, _prepared(trie), None)
        self._pending: dict[int, tuple[int, ...]] = {}  # id -> codes, of what no trie holds yet
        self._owner: dict[tuple[int, ...], int] = {}  # the same, turned round
        self._removed: set[int] = set()  # since the rebuild under way began
        self._worker: threading.Thread | None = None
        self._failure: BaseException | None = None

    def snapshot(self) -> Snapshot:
        """The catalog as it is now: never blocks, never changes."""
        return self._now

    @property
    def version(self) -> int:
        """Of the trie that serves now."""
        return self._now.version

    def __len__(self) -> int:
        """Items that serve now or wait for the rebuild."""
        with self._lock:
            now = self._now
            return (now.trie.num_items if now.allowed is None else len(now.allowed)) + len(self._pending)

    def remove(self, item_ids: Numbers) -> None:
        """Take items out, from the next snapshot on; all of them or, where one is unknown, none.

        Raises ValueError naming an id that the catalog does not have.
        """
        ids = integers_on("item_ids", item_ids, torch.device("cpu")).flatten().unique()
        with self._lock:
            serving = self._serving(ids)
            waiting = [int(i) in self._pending for i in ids]
            for known, queued, item in zip((serving >= 0).tolist(), waiting, ids.tolist(), strict=True):
                if not known and not queued:
                    raise ValueError(f"the catalog has no item {item} to remove; pass ids of its items")
            for item in ids[torch.tensor(waiting, dtype=torch.bool)].tolist():
                del self._owner[self._pending.pop(item)]
            if self._worker is not None:
                self._removed.update(ids.tolist())
            self._now = _without(self._now, serving[serving >= 0])

    def add(self, codes: Numbers, item_ids: Numbers) -> None:
        """Put in items of ``codes`` [A, L] and ``item_ids`` [A]; all of them or, where one is wrong, none.

        An id may come back after its removal. Raises ValueError on codes out of range, and naming items
        whose id or codes another item has; RuntimeError where an earlier rebuild failed.
        """
        trie = self._now.trie
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
                self._pending[item], self._owner[row] = row, item
            if self._worker is None:
                self._worker = threading.Thread(target=self._rebuild, name="cemg-live-trie", daemon=True)
                self._worker.start()

    def wait(self, timeout: float | None = None) -> int:
        """Block until all additions serve; the version that serves then.

        Raises TimeoutError after ``timeout`` seconds, RuntimeError where the rebuild failed.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: self._worker is None, timeout):
                raise TimeoutError(f"{len(self._pending)} items still wait after {timeout} s; call again")
            self._raise_failure()
            return self._now.version

    def save(self, path: str | Path) -> None:
        """Wait for the additions, then write a trie of the items that serve; ValueError where none does."""
        self.wait()
        now = self._now
        (now.trie if now.allowed is None else _merged(now, {})).save(path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> LiveTrie:
        """A catalog of what ``save`` (or ``Trie.save``) wrote; its versions count from 1 again."""
        return cls(Trie.load(path, device))

    def _serving(self, ids: Tensor) -> Tensor:
        """The rank of each id that serves now, -1 for others; on the CPU."""
        trie, allowed = self._now.trie, self._now.allowed
        rank = trie.ranks_of(ids.to(trie.device))
        if allowed is not None:
            rank = torch.where((rank >= 0) & allowed.allows_ranks(rank.clamp(min=0)), rank, -1)
        return rank.cpu()

    def _check_new(self, codes: Tensor, ids: Tensor) -> None:
        """ValueError where an id or a row of codes is taken, by what serves, waits, or comes with it."""
        trie = self._now.trie
        taken = (self._serving(ids) >= 0).tolist()
        leaves = trie.lookup(codes.to(trie.device), filter=self._now.allowed)
        owners = trie.items(leaves).tolist()
        seen: dict[tuple[int, ...], int] = {}
        ids_seen: set[int] = set()
        for item, row, has_id, owner in zip(
            ids.tolist(), map(tuple, codes.tolist()), taken, owners, strict=True
        ):
            if item < 0 or has_id or item in self._pending or item in ids_seen:
                raise ValueError(
                    f"the id {item} is negative or taken; pass one distinct id for each new item"
                )
            twin = owner if owner >= 0 else self._owner.get(row, seen.get(row))
            if twin is not None:
                raise ValueError(
                    f"items {twin} and {item} would share the codes {list(row)}; resolve it first"
                )
            seen[row] = item
            ids_seen.add(item)

    def _rebuild(self) -> None:
        """The worker: build and swap until nothing waits."""
        while True:
            with self._lock:
                if not self._pending or self._failure is not None:
                    self._worker = None
                    self._lock.notify_all()
                    return
                base, new, self._removed = self._now, dict(self._pending), set()
            try:
                trie = _prepared(_merged(base, new))
                with self._lock:
                    self._swap(base.version + 1, trie, new)
            except BaseException as error:  # whatever it was, who waits must hear of it
                self._failure = error

    def _swap(self, version: int, trie: Trie, new: dict[int, tuple[int, ...]]) -> None:
        """Let the rebuilt trie serve, less what was removed while it was built."""
        for item, row in new.items():
            if item not in self._removed:
                del self._pending[item], self._owner[row]
        rank = trie.ranks_of(torch.tensor(sorted(self._removed), dtype=torch.int64, device=trie.device))
        self._now = _without(Snapshot(version, trie, None), rank[rank >= 0].cpu())

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the rebuild in the background failed; make a new LiveTrie") from self._failure


def _prepared(trie: Trie) -> Trie:
    """The trie, with what filters and removals ask of it computed."""
    trie.ranks_of(torch.empty(0, dtype=torch.int64, device=trie.device))
    assert trie.fingerprint
    return trie


def _without(now: Snapshot, ranks: Tensor) -> Snapshot:
    """The snapshot less the items of these distinct ranks."""
    if ranks.numel() == 0:
        return now
    allowed = now.allowed if now.allowed is not None else ItemFilter.everything(now.trie)
    return Snapshot(now.version, now.trie, allowed.without_ranks(ranks.to(now.trie.device)))


def _merged(now: Snapshot, new: dict[int, tuple[int, ...]]) -> Trie:
    """A trie of the items that serve and of ``new``."""
    trie = now.trie
    codes, ids = trie.codes_by_rank(), trie.ids_by_rank
    if now.allowed is not None:
        kept = now.allowed.by_rank()
        codes, ids = codes[kept], ids[kept]
    if new:
        more = torch.tensor(list(new.values()), dtype=codes.dtype, device=trie.device)
        codes = torch.cat((codes, more))
        ids = torch.cat((ids, torch.tensor(list(new), dtype=torch.int64, device=trie.device)))
    return Trie.from_codes(codes, trie.codebook_size, ids, trie.device)
