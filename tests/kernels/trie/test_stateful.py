"""Long random sequences of catalog operations (build, filter, add, remove, save, load) against a dict.

The dict maps item ids to codes. After each operation, queries are compared.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

import cemg_kernels
from cemg_kernels import ItemFilter, LiveTrie, RequestFilter, Trie
from cemg_kernels.trie.live import Snapshot

pytestmark = pytest.mark.medium

Codes = tuple[int, ...]


class History:
    """One catalog, its dict, and the operations that change or query them."""

    def __init__(self, seed: int, folder: Path, gate: threading.Event) -> None:
        self.draw, self.path, self.gate = random.Random(seed), folder / f"trie{seed}", gate
        self.counts: Counter[str] = Counter()
        self.next_id = 0
        self.build()

    def run(self, count: int) -> None:
        """Runs ``count`` operations, each followed by a query."""
        weights = {"add": 5, "remove": 5, "publish": 4, "hold": 3, "filter": 5, "stack": 3, "snapshot": 2,
                   "query": 8, "invalid": 2, "save_load": 1, "build": 1, "backend": 1}  # fmt: skip
        for name in self.draw.choices(list(weights), list(weights.values()), k=count):
            getattr(self, name)()
            self.counts[name] += 1
            self.query()

    def build(self) -> None:
        """Starts a new catalog with other levels, codebook size and items."""
        self.gate.set()
        self.levels, self.size = self.draw.choice([(1, 300), (2, 6), (3, 4), (4, 3), (3, 40)])
        self.items: dict[int, Codes] = {}
        for _ in range(self.draw.choice([1, 2, 10, 60])):
            self.new_item()
        ids, codes = torch.tensor(list(self.items)), torch.tensor(list(self.items.values()))
        self.live = LiveTrie(Trie.from_codes(codes, self.size, ids))
        self.published = dict(self.items)  # the current snapshot must contain these
        self.publish()

    def new_item(self) -> int | None:
        """Adds an item to the dict if its codes are free; returns its id, which may be one used before."""
        codes = tuple(self.draw.randrange(self.size) for _ in range(self.levels))
        if codes in self.items.values():
            return None
        item = self.draw.randrange(self.next_id + 1)
        while item in self.items:
            item += 1
        self.next_id = max(self.next_id, item + 2)
        self.items[item] = codes
        return item

    def add(self) -> None:
        new = [
            item for item in (self.new_item() for _ in range(self.draw.choice([1, 2, 5]))) if item is not None
        ]
        if new:
            self.live.add([self.items[item] for item in new], new)

    def remove(self) -> None:
        some = self.draw.sample(sorted(self.items), min(len(self.items), self.draw.choice([1, 2, 4])))
        self.live.remove(some)
        for item in some:
            del self.items[item]
            self.published.pop(item, None)

    def publish(self) -> None:
        """Unblocks rebuilds and waits until all items are published."""
        self.gate.set()
        self.live.wait(30)
        self.published = dict(self.items)
        self.snapshot()

    def hold(self) -> None:
        """Blocks rebuilds half-way, so that operations happen between their start and their end."""
        self.gate.clear()

    def snapshot(self) -> None:
        """Starts a request, which must see this catalog until it ends."""
        now = self.live.snapshot()
        self.request: tuple[Snapshot, dict[int, Codes]] = now, self.shown(now)
        self.chosen: tuple[ItemFilter, set[int]] | None = None

    def shown(self, now: Snapshot) -> dict[int, Codes]:
        """Returns the items and codes of a snapshot; they must equal the dict except for pending items."""
        leaves = torch.arange(now.trie.num_nodes - now.trie.num_items, now.trie.num_nodes)
        ids = now.trie.items(leaves, filter=now.allowed).tolist()
        rows = map(tuple, now.trie.codes_by_rank().tolist())
        held = {item: row for item, row in zip(ids, rows, strict=True) if item >= 0}
        assert held.items() <= self.items.items() and self.published.items() <= held.items()
        return held

    def filter(self) -> None:
        """Combines the request's filter with another one, or starts a new one."""
        now, _ = self.request
        known = sorted(set(now.trie.ids_by_rank.tolist()))
        some = set(self.draw.sample(known, self.draw.randrange(len(known) + 1)))
        if self.draw.random() < 0.5:
            new = ItemFilter.from_items(now.trie, sorted(some))
        else:
            mask = torch.zeros(now.trie.num_items, dtype=torch.bool)
            by_row = torch.empty(now.trie.num_items, dtype=torch.int64)
            by_row[now.trie.rows.long()] = now.trie.ids_by_rank
            for row, item in enumerate(by_row.tolist()):
                mask[row] = item in some
            new = ItemFilter.from_mask(now.trie, mask)
        how = self.draw.choice(["new", "and", "or", "not"])
        if self.chosen is None or how == "new":
            self.chosen = new, some
        elif how == "and":
            self.chosen = self.chosen[0] & new, self.chosen[1] & some
        elif how == "or":
            self.chosen = self.chosen[0] | new, self.chosen[1] | some
        else:
            self.chosen = ~self.chosen[0], set(known) - self.chosen[1]
        assert len(self.chosen[0]) == len(self.chosen[1])

    def stack(self) -> None:
        """Runs three requests at once: one with the filter, one with exclusions, one with neither."""
        now, held = self.request
        known = sorted(set(now.trie.ids_by_rank.tolist()))
        seen = self.draw.sample(known, min(len(known), 4))
        each = RequestFilter.excluding(now.trie, [[], seen, [-1, 10**9]])
        allowed = [set(held), set(held) - set(seen), set(held)]
        if self.chosen is not None:
            each = each & ItemFilter.stack([self.chosen[0], None, None])
            allowed[0] &= self.chosen[1]
        self.compare(now, now.restrict(each), [{i: held[i] for i in ids} for ids in allowed])

    def query(self) -> None:
        """Checks the current request with its filter, then the current catalog."""
        now, held = self.request
        if self.chosen is None:
            self.compare(now, now.restrict(), [held])
        else:
            remaining = {i: c for i, c in held.items() if i in self.chosen[1]}
            self.compare(now, now.restrict(self.chosen[0]), [remaining])
        self.shown(self.live.snapshot())

    def compare(self, now: Snapshot, filter: object, each: list[dict[int, Codes]]) -> None:
        """Compares lookup, mask, children, advance and items with the dict, at one prefix per request."""
        length = self.draw.randrange(self.levels + 1)
        pool = [*each[0].values(), tuple(self.draw.randrange(self.size) for _ in range(self.levels))]
        prefixes = [self.draw.choice(pool)[:length] for _ in each]
        trie = now.trie
        nodes = trie.lookup(torch.tensor(prefixes).view(len(each), length).long(), filter=filter)
        below = [
            {i: c for i, c in held.items() if c[:length] == p} for held, p in zip(each, prefixes, strict=True)
        ]
        assert (nodes >= 0).tolist() == [bool(b) for b in below]
        mask, (codes, child_nodes) = trie.mask(nodes, filter=filter), trie.children(nodes, filter=filter)
        for row, inside in enumerate(below):
            following = sorted({c[length] for c in inside.values()}) if length < self.levels else []
            assert mask[row].nonzero()[:, 0].tolist() == following
            assert codes[row][: len(following)].tolist() == following
            assert (child_nodes[row][len(following) :] == -1).all()
        if length == self.levels:
            ids = trie.items(nodes, filter=filter).tolist()
            assert ids == [next(iter(inside), -1) for inside in below]
        code = torch.tensor([self.draw.randrange(-1, self.size + 1) for _ in each])
        walked = trie.advance(nodes, code, filter=filter)
        assert (walked >= 0).tolist() == [
            length < self.levels and any(c[length] == k for c in inside.values())
            for k, inside in zip(code.tolist(), below, strict=True)
        ]

    def invalid(self) -> None:
        """Makes calls that must raise and must not change anything."""
        if self.items:
            item, codes = self.draw.choice(sorted(self.items.items()))
            with pytest.raises(ValueError):
                self.live.add([codes], [10**9])
            with pytest.raises(ValueError):
                self.live.add([[0] * self.levels], [item])
        with pytest.raises(ValueError, match=str(10**9)):
            self.live.remove([10**9])
        now = self.live.snapshot()
        if self.chosen is not None and now.version != self.request[0].version:
            with pytest.raises(ValueError, match="another version"):
                now.restrict(self.chosen[0])

    def save_load(self) -> None:
        if not self.items:
            return
        self.gate.set()
        self.live.save(self.path)
        self.live = LiveTrie.load(self.path)
        self.publish()

    def backend(self) -> None:
        """Switches to the other backend."""
        cemg_kernels.use_fast_kernels(not cemg_kernels.fast_kernels_enabled())


def histories(folder: Path, gate: threading.Event, count: int, length: int) -> Counter[str]:
    total: Counter[str] = Counter()
    try:
        for seed in range(count):
            history = History(seed, folder, gate)
            history.run(length)
            history.publish()
            total += history.counts
    finally:
        cemg_kernels.use_fast_kernels(None)
    return total


def test_random_operations_equal_a_dict(tmp_path: Path, gate: threading.Event):
    counts = histories(tmp_path, gate, 8, 375)
    assert counts.total() == 3000
    assert len(counts) == 12 and min(counts.values()) > 30


@pytest.mark.slow
def test_a_hundred_thousand_operations_equal_a_dict(tmp_path: Path, gate: threading.Event):
    counts = histories(tmp_path, gate, 100, 1000)
    print(dict(counts))
    assert counts.total() == 100_000
