"""The decoder against ``transformers`` and brute force, and the guarantees of its interface."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from cemg.decoding import Decoder, TransformersDecoder
from cemg.decoding.protocol import LogitsRequest
from cemg.errors import UserError
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter

from .conftest import FAMILIES, SIZE, START, Bench, step_by_step

pytestmark = pytest.mark.medium

NORMALIZE = ("vocab", "level", "valid")
quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("beams", [1, 5, 20])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lists_equal_those_of_transformers(bench, same_lists, family, normalize, beams):
    made = bench(family)
    prompts = made.prompts([9, 4, 1, 9])
    mine = Decoder(made.model, made.catalog, START, normalize).decode(*prompts, beams)
    theirs = TransformersDecoder(made.model, made.catalog, START, normalize).decode(*prompts, beams)
    same_lists(mine, theirs)
    live = mine.items >= 0
    assert torch.equal(mine.codes[live], made.catalog.codes[mine.items[live]])
    assert torch.equal(theirs.codes[live], made.catalog.codes[theirs.items[live]])


def test_a_decoder_with_another_catalog_equals_a_new_one_and_leaves_the_first_as_it_was(bench):
    made = bench(FAMILIES[0], 30)
    decoder, prompts = Decoder(made.model, made.catalog, START), made.prompts([5, 2])
    before, less = decoder.decode(*prompts, 5), made.catalog.take(range(20))
    mine, new = decoder.with_catalog(less).decode(*prompts, 20), Decoder(made.model, less, START)
    expected = new.decode(*prompts, 20)
    assert torch.equal(mine.items, expected.items) and torch.equal(mine.scores, expected.scores)
    again = decoder.decode(*prompts, 5)
    assert torch.equal(again.items, before.items) and bool((before.items >= 20).any())
    larger = Catalog.from_codes(less.codes, SIZE + 1)
    with pytest.raises(UserError):
        decoder.with_catalog(larger)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_beam_per_item_the_list_is_the_exact_ranking(bench, family, normalize):
    made = bench(family, 30)
    ids, mask = made.prompts([5])
    found = Decoder(made.model, made.catalog, START, normalize).decode(ids, mask, 30)
    expected = made.all_scores(ids[0], normalize)
    torch.testing.assert_close(found.scores[0], expected[found.items[0]], rtol=0, atol=1e-4)
    assert sorted(found.items[0].tolist()) == list(range(30))
    assert bool((found.scores[0].diff() <= 0).all())
    assert found.certified.tolist() == [30]  # nothing was pruned


@quick
@given(
    family=st.sampled_from(FAMILIES),
    normalize=st.sampled_from(NORMALIZE),
    items=st.integers(1, 80),
    beams=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_results_are_distinct_items_and_certified_ones_equal_brute_force(
    bench, family, normalize, items, beams, lengths, seed
):
    made = bench(family, items, seed)
    ids, mask = made.prompts(lengths, seed)
    found = Decoder(made.model, made.catalog, START, normalize).decode(ids, mask, beams)
    for row, length in enumerate(lengths):
        live = found.items[row][found.items[row] >= 0].tolist()
        assert len(set(live)) == len(live) and set(live) <= set(range(items))
        assert found.codes[row, : len(live)].tolist() == made.catalog.codes[live].tolist()
        expected = made.all_scores(ids[row, mask[row].bool()], normalize)
        assert mask[row].sum() == length
        torch.testing.assert_close(found.scores[row, : len(live)], expected[live], rtol=0, atol=1e-4)
        proven = int(found.certified[row])
        best = expected.topk(min(proven, items)).values  # no other item scores more
        torch.testing.assert_close(found.scores[row, :proven], best, rtol=0, atol=1e-4)


@quick
@given(
    family=st.sampled_from(FAMILIES),
    normalize=st.sampled_from(NORMALIZE),
    items=st.integers(1, 120),
    top=st.integers(1, 12),
    budget=st.sampled_from([12, 1000]),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_an_exact_search_equals_brute_force_or_reports_what_is_unproven(
    bench, family, normalize, items, top, budget, lengths, seed
):
    made = bench(family, items, seed)
    ids, mask = made.prompts(lengths, seed)
    decoder = Decoder(made.model, made.catalog, START, normalize)
    found = decoder.decode_exact(ids, mask, top, top, budget=budget)
    for row in range(len(lengths)):
        expected = made.all_scores(ids[row, mask[row].bool()], normalize)
        proven = int(found.certified[row])
        ties = expected.sort(descending=True).values.diff().abs().min() < 1e-3 if items > 1 else False
        assert budget == 12 or proven == min(top, items) or ties
        torch.testing.assert_close(
            found.scores[row, :proven], expected.topk(proven).values, rtol=0, atol=1e-4
        )
        live = found.items[row][found.items[row] >= 0]
        torch.testing.assert_close(found.scores[row, : len(live)], expected[live], rtol=0, atol=1e-4)


def test_an_exact_search_proves_more_than_a_narrow_beam(bench):
    made = bench("gpt2", 100)
    prompts = made.prompts([3, 5, 7, 2])
    decoder = Decoder(made.model, made.catalog, START)
    narrow = decoder.decode(*prompts, 4)
    assert bool((narrow.certified < 4).any())
    found = decoder.decode_exact(*prompts, 4, 4)
    assert found.certified.tolist() == [4] * 4
    assert bool((found.scores >= narrow.scores - 1e-5).all())
    spent = decoder.decode_exact(*prompts, 4, 4, budget=4)
    assert torch.equal(spent.certified, narrow.certified)


@pytest.mark.parametrize("normalize", ["vocab", "level"])
def test_256_beams_and_the_exact_search_over_5000_items_equal_brute_force(normalize):
    size, levels = 20, 3
    chosen = torch.randperm(size**levels, generator=torch.Generator().manual_seed(7))[:5000]
    codes = torch.stack([chosen // size**2, chosen // size % size, chosen % size], dim=1)
    torch.manual_seed(7)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=START + levels * size, n_positions=16, n_embd=32, n_layer=2, n_head=4,
                   initializer_range=0.2, bos_token_id=1, eos_token_id=1)
    ).eval()  # fmt: skip
    decoder = Decoder(model, Catalog.from_codes(codes, size), START, normalize)
    ids, mask = torch.randint(START, START + levels * size, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    wide, exact = decoder.decode(ids, mask, 256), decoder.decode_exact(ids, mask, 10, 20)
    tokens = codes + START + size * torch.arange(levels)
    for row in range(3):
        with torch.no_grad():
            prompts = torch.cat((ids[row].expand(5000, -1), tokens[:, :-1]), dim=1)
            logits = model(prompts).logits[:, -levels:]  # [5000, 3, V]
        if normalize == "level":
            logits = logits[:, :, START:].unflatten(2, (levels, size)).diagonal(dim1=1, dim2=2).mT
        places = codes if normalize == "level" else tokens
        expected = logits.log_softmax(2).gather(2, places[:, :, None]).sum((1, 2))  # [5000]
        assert wide.items[row].unique().numel() == 256
        torch.testing.assert_close(wide.scores[row], expected[wide.items[row]], rtol=0, atol=1e-4)
        proven = int(wide.certified[row])
        torch.testing.assert_close(wide.scores[row, :proven], expected.topk(proven).values, rtol=0, atol=1e-4)
        assert exact.certified[row] == 10
        torch.testing.assert_close(exact.scores[row], expected.topk(10).values, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("top", "beams", "budget"), [(0, 4, 9), (5, 4, 9), (4, 10, 9)])
def test_an_exact_search_requires_top_beams_and_budget_in_ascending_order(bench, top, beams, budget):
    made = bench("gpt2")
    with pytest.raises(UserError, match="1 <= top <= beams <= budget"):
        Decoder(made.model, made.catalog, START).decode_exact(*made.prompts([3]), top, beams, budget=budget)


def test_some_results_are_certified_and_some_are_not(bench):
    made = bench("gpt2")
    ids, mask = made.prompts([5] * 16)
    certified = Decoder(made.model, made.catalog, START).decode(ids, mask, 8).certified
    assert 0 < int(certified.sum()) < 8 * 16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_list_is_the_same_alone_and_in_a_padded_batch(bench, same_lists, family):
    made = bench(family)
    ids, mask = made.prompts([9, 3])
    decoder = Decoder(made.model, made.catalog, START)
    batched = decoder.decode(ids, mask, 6)
    alone = decoder.decode(ids[1:, mask[1].bool()], mask[1:, mask[1].bool()], 6)
    assert alone.items[0].tolist() == batched.items[1].tolist()
    torch.testing.assert_close(alone.scores[0], batched.scores[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_in_the_padding_have_no_effect(bench, family):
    made = bench(family)
    ids, mask = made.prompts([9, 3])
    decoder = Decoder(made.model, made.catalog, START)
    plain, filled = decoder.decode(ids, mask, 6), decoder.decode(ids.masked_fill(mask == 0, 7), mask, 6)
    assert torch.equal(plain.items, filled.items)
    torch.testing.assert_close(plain.scores, filled.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_filtered_list_is_brute_force_over_the_allowed_items(bench, family, normalize):
    made = bench(family, 40)
    allowed = torch.arange(40) % 3 == 0
    decoder = Decoder(made.model, made.catalog, START, normalize)
    ids, mask = made.prompts([6])
    found = decoder.decode(ids, mask, 40, filter=ItemFilter.from_mask(decoder.trie, allowed))
    live = found.items[0][found.items[0] >= 0]
    assert sorted(live.tolist()) == torch.nonzero(allowed).flatten().tolist()
    if normalize != "valid":  # "valid" normalizes over the codes that pass the filter
        expected = made.all_scores(ids[0], normalize)
        torch.testing.assert_close(found.scores[0, : len(live)], expected[live], rtol=0, atol=1e-4)


def test_valid_normalization_under_a_filter_equals_that_of_the_smaller_catalog(bench):
    made = bench("llama", 40)
    kept = torch.nonzero(torch.arange(40) % 3 == 0).flatten()
    ids, mask = made.prompts([6])
    decoder = Decoder(made.model, made.catalog, START, "valid")
    chosen = ItemFilter.from_items(decoder.trie, kept)
    filtered = decoder.decode(ids, mask, len(kept), filter=chosen)
    smaller = Decoder(made.model, Catalog.from_codes(made.catalog.codes[kept], SIZE), START, "valid")
    alone = smaller.decode(ids, mask, len(kept))
    assert filtered.items[0].tolist() == kept[alone.items[0]].tolist()
    torch.testing.assert_close(filtered.scores, alone.scores, rtol=0, atol=1e-5)


def test_a_filter_that_allows_nothing_returns_an_empty_list(bench):
    made = bench("gpt2", 20)
    decoder = Decoder(made.model, made.catalog, START)
    nothing = ItemFilter.from_mask(decoder.trie, torch.zeros(20, dtype=torch.bool))
    found = decoder.decode(*made.prompts([4, 2]), 3, filter=nothing)
    assert found.items.tolist() == [[-1] * 3] * 2
    assert bool((found.scores == float("-inf")).all()) and found.certified.tolist() == [0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_more_beams_than_items_the_rest_of_the_list_is_empty(bench, family):
    made = bench(family, 7)
    found = Decoder(made.model, made.catalog, START).decode(*made.prompts([4, 2]), 12)
    assert found.items.shape == (2, 12) and (found.items[:, 7:] == -1).all()
    assert sorted(found.items[0, :7].tolist()) == list(range(7))
    assert bool((found.scores[:, 7:] == float("-inf")).all()) and bool((found.codes[:, 7:] == -1).all())
    assert found.certified.tolist() == [7, 7]


def test_integer_item_ids_of_the_catalog_are_returned(bench):
    made = bench("gpt2", 10)
    named = Catalog.from_codes(made.catalog.codes, SIZE, [100 + i for i in range(10)])
    prompts = made.prompts([4])
    found = Decoder(made.model, named, START).decode(*prompts, 10)
    plain = Decoder(made.model, made.catalog, START).decode(*prompts, 10)
    assert torch.equal(found.items, plain.items + 100)


def test_a_catalog_that_needs_more_tokens_is_refused_with_both_numbers(bench):
    made = bench("gpt2")
    larger = Catalog.from_codes(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), SIZE)
    for engine in (Decoder, TransformersDecoder):
        with pytest.raises(UserError) as error:
            engine(made.model, larger, START)
        assert error.value.lines() == [
            "this catalog does not belong to the generator",
            "  cause: 4 levels of 6 codes from token 3 on need 27 tokens, the model has 24",
            "  fix:   use the catalog that the model was trained on",
        ]


def test_invalid_arguments_are_refused(bench):
    made = bench("gpt2")
    ids, mask = made.prompts([4, 2])
    decoder = Decoder(made.model, made.catalog, START)
    with pytest.raises(UserError, match="beams must be within 1 … 100,000, got 0"):
        decoder.decode(ids, mask, 0)
    with pytest.raises(UserError, match=r"got \[2, 4\] and \[2, 3\]"):
        decoder.decode(ids, mask[:, 1:], 2)
    with pytest.raises(UserError, match="vocab, level or valid, got 'all'"):
        Decoder(made.model, made.catalog, START, "all")
    with pytest.raises(UserError, match="61 beams for 60 items"):
        TransformersDecoder(made.model, made.catalog, START).decode(ids, mask, 61)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_ends_early_with_the_same_lists_if_each_beam_has_one_item_below(
    family, bench, monkeypatch, same_lists
):
    """The first two codes determine the item: under "valid" the model does not compute the third."""
    model = bench(family).model
    codes = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
    catalog = Catalog.from_codes(torch.cat((codes, codes.flip(1)[:, :1]), dim=1), SIZE)
    prompts = Bench(model, catalog).prompts([4, 2])
    decoder = Decoder(model, catalog, START, "valid", backend="native")
    allowed = ItemFilter.from_mask(catalog.trie, torch.arange(36) % 2 > 0)
    state = type(decoder.plan.new_state())
    step, asked = state.decode_step, []
    monkeypatch.setattr(state, "decode_step", lambda *given: asked.append(1) or step(*given))
    for beams, filter in ((1, None), (7, None), (60, None), (60, allowed)):
        asked.clear()
        found = decoder.decode(*prompts, beams, filter=filter)
        with step_by_step():
            stepped = decoder.decode(*prompts, beams, filter=filter)
            assert len(asked) == 1
            with monkeypatch.context() as patch:
                patch.setattr(Decoder, "_open_beams", lambda self, nodes: None)
                whole = decoder.decode(*prompts, beams, filter=filter)
        for one in (found, stepped):
            same_lists(one, whole)
            assert torch.equal(one.certified, whole.certified) and torch.equal(one.codes, whole.codes)


@pytest.mark.parametrize("items", [20, 40, 90])
@pytest.mark.parametrize("family", FAMILIES)
def test_valid_beams_with_one_item_below_are_not_computed_and_the_lists_are_the_same(
    family, items, bench, monkeypatch, same_lists
):
    """The beams of these users have one item below at different steps."""
    made = bench(family, items)
    prompts = made.prompts([4, 7, 2])
    decoder = Decoder(made.model, made.catalog, START, "valid", backend="native")
    state = type(decoder.plan.new_state())
    step, fed = state.decode_step, []

    def spy(self, tokens, parents, request):
        fed.append(tokens.numel() if request.rows is None else int(request.rows.sum()))
        return step(self, tokens, parents, request)

    monkeypatch.setattr(state, "decode_step", spy)
    some = ItemFilter.from_mask(made.catalog.trie, torch.arange(items) % 3 > 0)
    for beams, filter in ((6, None), (20, None), (20, some)):
        found = decoder.decode(*prompts, beams, filter=filter)
        with step_by_step():
            stepped, mine = decoder.decode(*prompts, beams, filter=filter), sum(fed)
            fed.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Decoder, "_open_beams", lambda self, nodes: None)
                whole = decoder.decode(*prompts, beams, filter=filter)
        for one in (found, stepped):
            same_lists(one, whole)
            assert torch.equal(one.certified, whole.certified)
        assert mine < sum(fed) or beams == 6
        fed.clear()


def test_a_step_that_extends_a_beam_without_logits_is_refused(bench):
    made = bench("llama")
    state = Decoder(made.model, made.catalog, START, backend="native").plan.new_state()
    state.prefill(*made.prompts([4]), LogitsRequest(START, SIZE, logsumexp=False))
    codes = torch.tensor([[1, 2, 3]])
    some = LogitsRequest(START + SIZE, SIZE, logsumexp=False, rows=torch.tensor([[True, False, True]]))
    logits = state.decode_step(codes + START, torch.zeros_like(codes), some)
    assert logits.values[0].any(1).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="beam 2 of user 0: its parent was not an active beam"):
        state.decode_step(codes + START + SIZE, torch.tensor([[0, 2, 1]]), some)
