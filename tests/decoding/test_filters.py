"""Searches with one filter per request, against brute force over the items that each allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter

from .conftest import FAMILIES, SIZE, START, Bench

NORMALIZE = ("vocab", "level", "valid")


def allowed_scores(made: Bench, prompt: Tensor, normalize: str, allowed: Tensor) -> Tensor:
    """Scores [N] by brute force, −inf where not ``allowed`` [N]; "valid" as if nothing else were there."""
    scores = torch.full((len(allowed),), float("-inf"))
    if normalize != "valid":
        return torch.where(allowed, made.all_scores(prompt, normalize), scores)
    if bool(allowed.any()):
        smaller = Bench(made.model, Catalog.from_codes(made.catalog.codes[allowed], SIZE))
        scores[allowed] = smaller.all_scores(prompt, "valid")
    return scores


@settings(
    max_examples=100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    family=st.sampled_from(FAMILIES),
    normalize=st.sampled_from(NORMALIZE),
    items=st.integers(1, 100),
    top=st.integers(1, 10),
    shares=st.lists(st.sampled_from([None, 0.0, 0.1, 0.5]), min_size=1, max_size=3),
    exact=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_request_gets_the_best_of_the_items_that_it_allows(
    bench, family, normalize, items, top, shares, exact, seed
):
    """Each request has a bitmap of a random share of the catalog or none, and an excluded history."""
    made = bench(family, items, seed)
    generator = torch.Generator().manual_seed(seed)
    ids, mask = made.prompts([1 + (seed + row) % 8 for row in range(len(shares))], seed)
    decoder = Decoder(made.model, made.catalog, START, normalize)
    masks = [torch.rand(items, generator=generator) < (2 if s is None else s) for s in shares]
    histories = [torch.randint(items, (row * 3,), generator=generator).tolist() for row in range(len(shares))]
    filter = RequestFilter.excluding(decoder.trie, histories)
    if any(share is not None for share in shares):
        bitmaps = [
            None if share is None else ItemFilter.from_mask(decoder.trie, allowed)
            for share, allowed in zip(shares, masks, strict=True)
        ]
        filter = filter & RequestFilter.stack(bitmaps)
    if exact:
        found = decoder.decode_exact(ids, mask, top, top, filter=filter)
    else:
        found = decoder.decode(ids, mask, top, filter=filter)
    for row, allowed in enumerate(masks):
        allowed[histories[row]] = False
        expected = allowed_scores(made, ids[row, mask[row].bool()], normalize, allowed)
        count = min(top, int(allowed.sum()))
        assert (found.items[row] >= 0).sum() == count  # the list is full
        live, proven = found.items[row, :count], int(found.certified[row])
        assert bool(allowed[live].all()) and len(set(live.tolist())) == count
        torch.testing.assert_close(found.scores[row, :count], expected[live], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            found.scores[row, :proven], expected.topk(proven).values, rtol=0, atol=1e-4
        )
        close = count > 0 and bool((expected.topk(count).values.diff().abs() < 1e-3).any())
        edge = expected.topk(min(count + 1, items)).values[-2:]
        assert not exact or proven == count or close or bool((edge.diff().abs() < 1e-3).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_are_full_even_if_an_unfiltered_beam_would_hold_only_the_history(bench, family):
    made = bench(family)
    prompts = made.prompts([5, 3])
    decoder = Decoder(made.model, made.catalog, START)
    first = decoder.decode(*prompts, 8)
    left_out = RequestFilter.excluding(decoder.trie, first.items)
    found = decoder.decode_exact(*prompts, 8, 8, filter=left_out)
    whole = decoder.decode(*prompts, 60)
    for row in range(2):
        ranking = [item for item in whole.items[row].tolist() if item not in first.items[row].tolist()]
        assert found.items[row].tolist() == ranking[:8]
    assert found.certified.tolist() == [8, 8]


def test_a_second_search_of_a_row_uses_its_own_filter(bench):
    made = bench("gpt2", 100)
    prompts = made.prompts([3, 5, 7, 2])
    decoder = Decoder(made.model, made.catalog, START)
    thirds = [ItemFilter.from_mask(decoder.trie, torch.arange(100) % 3 == row % 3) for row in range(4)]
    filter = RequestFilter.stack(thirds)
    assert bool((decoder.decode(*prompts, 4, filter=filter).certified < 4).any())  # some are searched again
    found = decoder.decode_exact(*prompts, 4, 4, filter=filter)
    assert found.certified.tolist() == [4] * 4
    assert bool((found.items % 3 == (torch.arange(4) % 3)[:, None]).all())


def test_a_filter_raises_valid_scores_and_leaves_the_others_unchanged(bench):
    made = bench("llama", 40)
    ids, mask = made.prompts([6])
    for normalize in NORMALIZE:
        decoder = Decoder(made.model, made.catalog, START, normalize)
        half = ItemFilter.from_mask(decoder.trie, torch.arange(40) % 2 == 0)
        found = decoder.decode(ids, mask, 20, filter=half)
        plain = made.all_scores(ids[0], normalize)[found.items[0]]
        gain = found.scores[0] - plain
        assert bool((gain > 1e-3).any() if normalize == "valid" else (gain.abs() < 1e-4).all())
        assert bool((gain > -1e-4).all())


def test_a_filter_for_a_different_number_of_requests_is_refused(bench):
    made = bench("gpt2")
    decoder = Decoder(made.model, made.catalog, START)
    two = RequestFilter.excluding(decoder.trie, [[1], [2]])
    with pytest.raises(UserError, match="a filter of 2 requests for 4 prompts"):
        decoder.decode(*made.prompts([3, 3, 3, 3]), 5, filter=two)
