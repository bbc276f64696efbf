"""Live catalogs: single behaviours; test_stateful.py runs long random sequences of operations."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from cemg_kernels import ItemFilter, LiveTrie, Trie
from cemg_kernels.trie import live as live_trie
from cemg_kernels.trie.live import Snapshot


def make_live(num_items: int = 10) -> LiveTrie:
    """Returns a catalog in which item 3 i has the codes (i // 8, i % 8)."""
    order = torch.arange(num_items)
    return LiveTrie(Trie.from_codes(torch.stack((order // 8, order % 8), 1), 8, order * 3))


def items_of(now: Snapshot) -> set[int]:
    leaves = torch.arange(now.trie.num_nodes)
    return set(now.trie.items(leaves, filter=now.allowed).tolist()) - {-1}


def test_a_removal_takes_effect_with_the_next_snapshot():
    live = make_live()
    before = live.snapshot()
    live.remove([3, 9])
    assert items_of(before) == set(range(0, 30, 3))
    assert items_of(live.snapshot()) == set(range(0, 30, 3)) - {3, 9}
    assert (live.version, len(live)) == (1, 8)
    live.remove(torch.tensor([0, 0]))
    assert len(live) == 7


def test_an_addition_appears_in_the_next_version_and_old_requests_keep_their_trie(gate):
    live = make_live()
    live.remove([3])
    old = live.snapshot()
    live.add([[7, 7], [0, 1]], [100, 101])  # the second reuses the codes of a removed item
    assert (live.version, len(live)) == (1, 11)
    assert items_of(live.snapshot()) == set(range(0, 30, 3)) - {3}
    with pytest.raises(TimeoutError, match="2 items are still pending"):
        live.wait(0.01)
    gate.set()
    assert live.wait(10) == 2
    now = live.snapshot()
    assert items_of(now) == (set(range(0, 30, 3)) - {3}) | {100, 101}
    assert now.allowed is None and now.trie.num_items == 11
    assert now.trie.items(now.trie.lookup(torch.tensor([[7, 7], [0, 1]]))).tolist() == [100, 101]
    assert items_of(old) == set(range(0, 30, 3)) - {3}


def test_an_item_removed_during_a_rebuild_stays_removed(gate):
    live = make_live()
    live.add([[7, 7], [7, 6]], [100, 101])
    live.remove([0, 100])
    live.remove([101])
    live.add([[6, 6]], [101])  # the same id with other codes
    gate.set()
    live.wait(10)
    now = live.snapshot()
    assert items_of(now) == (set(range(0, 30, 3)) - {0}) | {101}
    nodes = now.trie.lookup(torch.tensor([[7, 6], [6, 6]]), filter=now.allowed)
    assert now.trie.items(nodes, filter=now.allowed).tolist() == [-1, 101]


def test_additions_during_a_rebuild_are_built_next(gate):
    live = make_live()
    live.add([[7, 7]], [100])
    live.add([[7, 6]], [101])
    gate.set()
    assert live.wait(10) in (2, 3)
    assert items_of(live.snapshot()) == set(range(0, 30, 3)) | {100, 101}


def test_a_filter_of_another_version_is_rejected_even_if_the_codes_are_equal():
    live = make_live()
    old = live.snapshot()
    only = ItemFilter.from_items(old.trie, [27])
    live.remove([27])
    assert len(live.snapshot().restrict(only)) == 0  # the same version, so both filters apply
    live.add([[1, 1]], [99])  # the codes of item 27
    live.wait(10)
    now = live.snapshot()
    assert torch.equal(now.trie.arrays.code, old.trie.arrays.code)
    with pytest.raises(ValueError, match="another trie"):
        now.trie.mask(torch.zeros(1, dtype=torch.int32), filter=only)
    with pytest.raises(ValueError, match="another version than 2"):
        now.restrict(only)
    assert old.restrict(only) is only
    assert old.restrict() is None


def test_per_request_filters_combine_with_removals():
    live = make_live()
    live.remove([0])
    now = live.snapshot()
    stacked = ItemFilter.stack([ItemFilter.from_items(now.trie, [0, 3]), None])
    mask = now.trie.mask(torch.zeros(2, dtype=torch.int32), filter=now.restrict(stacked))
    leaves = torch.arange(now.trie.num_nodes).expand(2, -1)
    nodes = now.trie.items(leaves, filter=now.restrict(stacked))
    assert [set(row) - {-1} for row in nodes.tolist()] == [{3}, set(range(3, 30, 3))]
    assert mask[:, :2].tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("codes", "ids", "message"),
    [
        ([[7, 7]], [3], "id 3 is negative or already in use"),
        ([[7, 7]], [-1], "id -1 is negative"),
        ([[7, 7], [7, 6]], [50, 50], "id 50"),
        ([[0, 1]], [50], r"items 3 and 50 would share the codes \[0, 1\]"),
        ([[7, 7], [7, 7]], [50, 51], "items 50 and 51"),
        ([[5, 5]], [51], "items 60 and 51"),  # pending items count too
        ([[7, 6]], [60], "id 60"),
        ([[8, 0]], [50], "code 8"),
        ([[1, 2, 3]], [50], r"codes must be \[1, 2\], got \[1, 3\]"),
    ],
)
def test_an_invalid_addition_changes_nothing(gate, codes, ids, message):
    live = make_live()
    live.add([[5, 5]], [60])
    with pytest.raises(ValueError, match=message):
        live.add(codes, ids)
    assert len(live) == 11
    gate.set()
    live.wait(10)
    assert items_of(live.snapshot()) == set(range(0, 30, 3)) | {60}


def test_a_filter_is_combined_with_removals_once_per_snapshot():
    live = make_live()
    only = ItemFilter.from_items(live.snapshot().trie, [0, 6, 12])
    live.remove([6])
    now = live.snapshot()
    assert now.restrict(only) is now.restrict(only)
    stacked = now.restrict(ItemFilter.stack([only, None, only]))
    assert stacked.filters[0] is now.restrict(only) and stacked.filters[1] is now.allowed
    live.remove([12])
    assert len(live.snapshot().restrict(only)) == 1 and len(now.restrict(only)) == 2


def test_an_invalid_removal_changes_nothing():
    live = make_live()
    with pytest.raises(ValueError, match="no item 4 "):
        live.remove([3, 4])
    assert len(live) == 10
    live.remove([3])
    with pytest.raises(ValueError, match="no item 3 "):
        live.remove([3])


def test_wait_and_add_raise_if_the_rebuild_failed(monkeypatch: pytest.MonkeyPatch):
    live = make_live()

    def fail(*_: object) -> Trie:
        raise MemoryError("too large")

    monkeypatch.setattr(live_trie, "_merged", fail)
    live.add([[7, 7]], [100])
    with pytest.raises(RuntimeError, match="rebuild in the background failed") as error:
        live.wait(10)
    assert isinstance(error.value.__cause__, MemoryError)
    assert items_of(live.snapshot()) == set(range(0, 30, 3))
    with pytest.raises(RuntimeError, match="failed"):
        live.add([[7, 6]], [101])


def test_all_items_can_be_removed_and_added_again(tmp_path: Path):
    live = make_live()
    live.remove(torch.arange(10) * 3)
    assert len(live) == 0 and items_of(live.snapshot()) == set()
    with pytest.raises(ValueError):
        live.save(tmp_path / "none")
    live.add([[2, 2]], [3])
    live.wait(10)
    assert items_of(live.snapshot()) == {3}
    assert live.snapshot().trie.num_items == 1


def test_a_saved_catalog_contains_the_current_items(tmp_path: Path):
    live = make_live()
    live.add([[7, 7]], [100])
    live.remove([3])
    live.save(tmp_path / "trie")
    reloaded = LiveTrie.load(tmp_path / "trie")
    assert items_of(reloaded.snapshot()) == (set(range(0, 30, 3)) - {3}) | {100}
    assert reloaded.version == 1


def test_concurrent_requests_each_see_a_consistent_catalog():
    """Items are added and removed in pairs, so every request sees both items of a pair or none."""
    live, stop, torn = make_live(8), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            ids = items_of(live.snapshot())
            if any((i in ids) != (i + 1000 in ids) for i in range(100, 140)):
                torn.append(ids)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(100, 140):
        live.add([[2 + (i % 4), 0], [2 + (i % 4), 1]], [i, i + 1000])
        if i % 3 == 0:
            live.wait(10)
        live.remove([i, i + 1000])
    stop.set()
    for reader in readers:
        reader.join()
    live.wait(10)
    assert not torn
    assert items_of(live.snapshot()) == set(range(0, 24, 3))
