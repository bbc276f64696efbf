"""Filters against sets of item ids; test_trie.py tests the trie's operations under filters."""

from __future__ import annotations

import pytest
import torch

from cemg_kernels import ItemFilter, RequestFilter, Trie, use_fast_kernels
from cemg_kernels.trie.filter_tensors import NO_NODE, unpack_bits
from cemg_kernels.trie.packed import popcount

from ...helpers import two_level_trie


@pytest.mark.parametrize("num_items", [1, 42, 43, 62, 63, 64, 65, 511, 1500])
def test_a_node_is_open_if_an_allowed_item_is_below(backend, num_items):
    trie = two_level_trie(num_items)
    for share in (0.0, 0.03, 0.4, 1.0):
        allowed = torch.rand(num_items, generator=torch.Generator().manual_seed(1)) < share
        chosen = ItemFilter.from_mask(trie, allowed)
        by_rank = allowed[trie.rows.long()]
        below = torch.cat((torch.zeros(1, dtype=torch.int64), by_rank.long().cumsum(0)))
        low, high = trie.interval(torch.arange(trie.num_nodes)).long().unbind(1)
        assert torch.equal(unpack_bits(chosen.open, trie.num_nodes), below[high] > below[low])
        assert torch.equal(chosen.by_rank(), by_rank)
        assert torch.equal(chosen.allows_ranks(torch.arange(num_items)), by_rank)
        assert len(chosen) == int(allowed.sum())


def test_removing_ranks_equals_never_allowing_them(backend):
    trie = two_level_trie(700)
    allowed = torch.rand(700, generator=torch.Generator().manual_seed(1)) < 0.1
    chosen = ItemFilter.from_mask(trie, allowed)
    ranks = torch.randperm(700, generator=torch.Generator().manual_seed(2))[:500]
    less = allowed.clone()
    less[trie.rows.long()[ranks]] = False
    assert torch.equal(chosen.without_ranks(ranks).open, ItemFilter.from_mask(trie, less).open)
    assert chosen.without_ranks(torch.arange(700)).open.count_nonzero() == 0


def test_filters_of_large_tries_do_not_depend_on_the_number_of_threads():
    """Above 65,536 nodes per level and 256 excluded items, the C++ code uses several threads."""
    codes = torch.randint(128, (300_000, 4), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    trie = Trie.from_codes(codes, 128)
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(trie.num_items, generator=generator) < 0.1
    ids = torch.randint(trie.num_items, (30, 1), generator=generator) + torch.arange(40)  # consecutive ranks
    results = []
    try:
        for fast in (True, False):
            use_fast_kernels(fast)
            some = ItemFilter.from_mask(trie, allowed)
            both = some & RequestFilter.excluding(trie, ids)
            results.append((both.tensors.open, both.tensors.closed))
    finally:
        use_fast_kernels(None)
    (opened, closed), (expected, all_closed) = results
    assert torch.equal(opened, expected)
    assert torch.equal(closed, all_closed[:, : closed.shape[1]])
    assert bool((all_closed[:, closed.shape[1] :] == NO_NODE).all())


def test_and_or_and_not_equal_set_operations():
    trie = two_level_trie(700, id_step=5)
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


def test_a_filter_that_allows_nothing_has_no_open_node():
    trie = two_level_trie(100)
    nothing = ItemFilter.from_items(trie, [])
    assert bool(nothing) and len(nothing) == 0
    assert trie.lookup(torch.zeros(2, 0, dtype=torch.int64), filter=nothing).tolist() == [-1, -1]
    assert not trie.mask(torch.zeros(1, dtype=torch.int32), filter=nothing).any()


def test_a_filter_of_another_trie_is_rejected():
    trie, other = two_level_trie(100), two_level_trie(101)
    chosen = ItemFilter.from_items(trie, [1])
    with pytest.raises(ValueError, match="another trie"):
        other.mask(torch.zeros(1, dtype=torch.int32), filter=chosen)
    with pytest.raises(ValueError, match="different tries"):
        chosen & ItemFilter.from_items(other, [1])


def test_wrong_masks_and_unknown_ids_are_rejected():
    trie = two_level_trie(100)
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
