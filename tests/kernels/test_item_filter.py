"""Filters against sets of item ids; what they do to the trie's operations is in test_trie.py."""

from __future__ import annotations

import pytest
import torch

from cemg_kernels import ItemFilter, Trie
from cemg_kernels.filter_tensors import popcount


def make_trie(num_items: int, *, ids: bool = False) -> Trie:
    """Items in random order of their codes; ids, if any, are 5 apart."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(num_items))
    codes = torch.stack((order // 64, order % 64), 1)
    return Trie.from_codes(codes, 64, torch.arange(num_items) * 5 if ids else None)


@pytest.mark.parametrize("num_items", [1, 63, 64, 65, 511, 512, 513, 1500])
def test_counts_of_any_interval_equal_a_sum_of_bits(num_items):
    trie = make_trie(num_items)
    allowed = torch.rand(num_items, generator=torch.Generator().manual_seed(1)) < 0.4
    chosen = ItemFilter.from_mask(trie, allowed)
    by_rank = allowed[trie.rows.long()].long()
    below = torch.cat((torch.zeros(1, dtype=torch.int64), by_rank.cumsum(0)))
    rank = torch.arange(num_items + 1)
    low, high = torch.cartesian_prod(rank[:: max(1, num_items // 40)], rank).unbind(1)
    assert torch.equal(chosen.count(low, high), below[high] - below[low])
    assert len(chosen) == int(allowed.sum())


def test_and_or_not_are_those_of_sets():
    trie = make_trie(700, ids=True)
    a, b = set(range(0, 3500, 10)), set(range(0, 3500, 15))
    left, right = ItemFilter.from_items(trie, sorted(a)), ItemFilter.from_items(trie, sorted(b))
    leaves = torch.arange(trie.num_nodes - 700, trie.num_nodes)

    def ids(chosen: ItemFilter) -> set[int]:
        return set(trie.items(leaves, filter=chosen).tolist()) - {-1}

    everything = set(range(0, 3500, 5))
    assert ids(left & right) == a & b
    assert ids(left | right) == a | b
    assert ids(~left) == everything - a
    assert len(~left) == 700 - len(a)
    assert ids(~~left) == a


def test_a_filter_that_allows_nothing_leaves_no_path():
    trie = make_trie(100)
    nothing = ItemFilter.from_items(trie, [])
    assert bool(nothing) and len(nothing) == 0
    assert trie.lookup(torch.zeros(2, 0, dtype=torch.int64), filter=nothing).tolist() == [-1, -1]
    assert not trie.mask(torch.zeros(1, dtype=torch.int32), filter=nothing).any()


def test_a_filter_of_another_trie_is_refused():
    trie, other = make_trie(100), make_trie(101)
    chosen = ItemFilter.from_items(trie, [1])
    with pytest.raises(ValueError, match="another trie"):
        other.mask(torch.zeros(1, dtype=torch.int32), filter=chosen)
    with pytest.raises(ValueError, match="different tries"):
        chosen & ItemFilter.from_items(other, [1])


def test_wrong_masks_and_unknown_ids_are_refused():
    trie = make_trie(100)
    with pytest.raises(ValueError, match=r"bool \[100\]"):
        ItemFilter.from_mask(trie, torch.ones(99, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        ItemFilter.from_mask(trie, torch.ones(100))
    with pytest.raises(ValueError, match="id 100"):
        ItemFilter.from_items(trie, [5, 100])


def test_popcount_counts_the_bits_of_any_word():
    words = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat((words, torch.tensor([0, -1, 1, -(2**63), 2**63 - 1])))
    assert popcount(words).tolist() == [(w & (2**64 - 1)).bit_count() for w in words.tolist()]
