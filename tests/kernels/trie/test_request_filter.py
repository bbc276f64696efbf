"""A filter for each request against sets of item ids, on both backends.

B requests, W beams a request, H excluded items a request, N items.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cemg_kernels
from cemg_kernels import ItemFilter, RequestFilter, Trie, trie_beam_step, trie_softmax

from ...helpers import two_level_trie


def make_trie(num_items: int = 1300) -> Trie:
    return two_level_trie(num_items, id_step=3)


def assert_rows_reach(trie: Trie, filter: RequestFilter, allowed: list[set[int]]) -> None:
    """Checks that every operation finds exactly the items of ``allowed[r]`` in row r; one row per request."""
    rows = len(allowed)
    leaves = torch.arange(trie.num_nodes - trie.num_items, trie.num_nodes).expand(rows, -1)
    assert [set(row) - {-1} for row in trie.items(leaves, filter=filter).tolist()] == allowed
    roots = torch.zeros(rows, dtype=torch.int32)
    mask = trie.mask(roots, filter=filter)
    child_codes, child = trie.children(roots, filter=filter)
    of = {int(i): c for i, c in zip(trie.ids_by_rank, _codes(trie), strict=True)}
    for row, ids in enumerate(allowed):
        expected = sorted({of[i][0] for i in ids})
        assert mask[row].nonzero()[:, 0].tolist() == expected
        assert child_codes[row][child_codes[row] >= 0].tolist() == expected
        assert (child[row] >= 0).sum() == len(expected)
    every = torch.arange(trie.codebook_size).expand(rows, -1)
    walked = trie.advance(roots[:, None].expand_as(every), every, filter=filter)
    assert torch.equal(walked >= 0, mask)
    looked = trie.lookup(every.reshape(-1, 1), filter=filter).view(rows, -1)
    assert torch.equal(looked, walked)


def _codes(trie: Trie) -> list[tuple[int, int]]:
    """Returns the two codes of each rank."""
    first, child = trie.children(torch.zeros(1, dtype=torch.int32))
    pairs = []
    for code, node in zip(first[0].tolist(), child[0].tolist(), strict=True):
        if node >= 0:
            below = trie.children(torch.tensor([node]))[0][0]
            pairs += [(code, k) for k in below.tolist() if k >= 0]
    return pairs


def ids_of(trie: Trie) -> set[int]:
    return set(trie.ids_by_rank.tolist())


def test_each_request_uses_its_own_filter(backend):
    trie = make_trie()
    sets = [{0, 3, 600}, {30}, set()]
    filters = [ItemFilter.from_items(trie, sorted(s)) for s in sets]
    stacked = ItemFilter.stack([filters[0], None, filters[1], filters[2], filters[0]])
    assert stacked.num_requests == 5
    assert stacked.tensors.open.shape[0] == 3  # a filter given twice is stored once
    assert_rows_reach(trie, stacked, [sets[0], ids_of(trie), sets[1], sets[2], sets[0]])


def test_each_request_excludes_its_own_items(backend):
    trie = make_trie()
    excluded = [[0, 3, 3, 0], [-1, -1, -1, -1], [9, 7, 10**9, 12]]  # repeats, padding, unknown ids
    chosen = RequestFilter.excluding(trie, torch.tensor(excluded))
    assert_rows_reach(trie, chosen, [ids_of(trie) - set(row) for row in excluded])


def test_lists_of_different_lengths_exclude_as_a_padded_tensor(backend):
    trie = make_trie(70)
    chosen = RequestFilter.excluding(trie, [[0, 3], [], [6]])
    assert_rows_reach(trie, chosen, [ids_of(trie) - {0, 3}, ids_of(trie), ids_of(trie) - {6}])
    assert_rows_reach(trie, RequestFilter.excluding(trie, [[], []]), [ids_of(trie)] * 2)


def test_an_exclusion_counts_only_items_that_the_filter_allows(backend):
    """The first request excludes more items than its filter allows; an item in both lists stays excluded."""
    trie = make_trie()
    stacked = ItemFilter.stack([ItemFilter.from_items(trie, [0, 3]), ItemFilter.from_items(trie, [6]), None])
    both = stacked & RequestFilter.excluding(trie, [[3, 6, 9, 12, 15], [6], [0, 6]])
    assert_rows_reach(trie, both, [{0}, set(), ids_of(trie) - {0, 6}])


def test_one_filter_for_all_combines_with_exclusions(backend):
    trie = make_trie()
    one = ItemFilter.from_items(trie, [0, 3, 6, 9])
    excluding = RequestFilter.excluding(trie, [[0], [3, 9]])
    for both in (one & excluding, excluding & one):
        assert_rows_reach(trie, both, [{3, 6, 9}, {0, 6}])


def test_the_rows_of_a_request_are_consecutive(backend):
    trie = make_trie()
    stacked = ItemFilter.stack([ItemFilter.from_items(trie, [0]), None])
    roots = torch.zeros(2, 3, dtype=torch.int32)  # B = 2, W = 3
    mask = trie.mask(roots.flatten(), filter=stacked).view(2, 3, -1)
    assert (mask[0].sum(1) == 1).all() and (mask[1].sum(1) == 21).all()
    assert torch.equal(mask[:, 0], mask[:, 2])
    with pytest.raises(ValueError, match="2 requests cannot serve 5 rows"):
        trie.mask(roots.flatten()[:5], filter=stacked)
    assert trie.mask(roots.flatten()[:0], filter=stacked).shape == (0, 64)


def test_select_returns_the_filter_of_another_batch(backend):
    trie = make_trie()
    stacked = ItemFilter.stack([ItemFilter.from_items(trie, [0]), ItemFilter.from_items(trie, [3, 6])])
    chosen = (stacked & RequestFilter.excluding(trie, [[], [6]])).select(torch.tensor([1, 0, 1]))
    assert_rows_reach(trie, chosen, [{3}, {0}, {3}])


def test_softmax_and_beam_step_use_the_filter_of_the_request(backend):
    trie = make_trie()
    sets = [{0, 3, 600}, {30}]
    chosen = ItemFilter.stack([ItemFilter.from_items(trie, sorted(s)) for s in sets])
    logits = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    nodes = torch.zeros(2, 3, dtype=torch.int32)
    mask = trie.mask(nodes.flatten(), filter=chosen)
    log_prob = trie_softmax(logits.flatten(0, 1), nodes.flatten(), trie, "valid", filter=chosen)
    assert torch.equal(log_prob > -torch.inf, mask)
    step = trie_beam_step(logits, torch.zeros(2, 3), nodes, trie, 9, "valid", filter=chosen)
    alive = [{int(c) for c, n in zip(*row, strict=True) if n >= 0}
             for row in zip(step.codes.tolist(), step.nodes.tolist(), strict=True)]  # fmt: skip
    assert alive == [set(row.nonzero()[:, 0].tolist()) for row in mask.view(2, 3, -1)[:, 0]]


def test_filters_of_different_tries_or_batches_do_not_combine():
    trie, other = make_trie(), make_trie(70)
    stacked = ItemFilter.stack([ItemFilter.from_items(trie, [0])])
    with pytest.raises(ValueError, match="another trie"):
        other.mask(torch.zeros(1, dtype=torch.int32), filter=stacked)
    with pytest.raises(ValueError, match="one trie"):
        ItemFilter.stack([ItemFilter.from_items(trie, [0]), ItemFilter.from_items(other, [0])])
    with pytest.raises(ValueError, match="at least one ItemFilter"):
        ItemFilter.stack([None, None])
    with pytest.raises(ValueError, match="1 and 2 requests"):
        stacked & RequestFilter.excluding(trie, [[0], [3]])
    with pytest.raises(ValueError, match=r"\[B, H\]"):
        RequestFilter.excluding(trie, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="float"):
        RequestFilter.excluding(trie, torch.zeros(1, 1))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_requests_equal_set_operations(data):
    num_items = data.draw(st.sampled_from([1, 5, 63, 64, 65, 200]))
    trie = make_trie(num_items)
    everything, requests = ids_of(trie), data.draw(st.integers(1, 4))
    some = st.sets(st.sampled_from(sorted(everything)), max_size=12)
    pool = [data.draw(some) for _ in range(2)]
    filters = [ItemFilter.from_items(trie, sorted(s)) for s in pool]

    def draw_stack() -> tuple[list[set[int]], RequestFilter | None]:
        which = data.draw(st.lists(st.sampled_from([None, 0, 1]), min_size=requests, max_size=requests))
        expected = [everything if w is None else pool[w] for w in which]
        if all(w is None for w in which):
            return expected, None
        return expected, ItemFilter.stack([None if w is None else filters[w] for w in which])

    def draw_exclusion() -> tuple[list[set[int]], RequestFilter | None]:
        rows = [data.draw(some) for _ in range(requests)]
        return [everything - row for row in rows], RequestFilter.excluding(trie, [sorted(r) for r in rows])

    allowed: list[set[int]] = [everything] * requests
    combined: RequestFilter | None = None
    for draw in data.draw(st.permutations([draw_stack, draw_stack, draw_exclusion, draw_exclusion])):
        sets, one = draw()
        if one is not None:
            allowed = [a & b for a, b in zip(allowed, sets, strict=True)]
            combined = one if combined is None else combined & one
    assert combined is not None
    for fast in (False, True):
        cemg_kernels.use_fast_kernels(fast)
        assert_rows_reach(trie, combined, allowed)
    cemg_kernels.use_fast_kernels(None)


def test_moving_a_filter_to_a_device_keeps_its_items():
    trie = make_trie(70)
    stacked = ItemFilter.stack([ItemFilter.from_items(trie, [0])]) & RequestFilter.excluding(trie, [[3]])
    assert_rows_reach(trie, stacked.to("cpu"), [{0}])
    elsewhere: Tensor = stacked.to("meta").tensors.open
    assert elsewhere.device.type == "meta"
