"""Searches under an item prior, by every backend, against brute force over the whole catalog."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg.decoding import Decoder, Recommendations, score_all
from cemg.errors import UserError
from cemg.tokenizer import Catalog, SharedFilter
from cemg_kernels import ItemPrior, RequestFilter

from . import mixture_searches
from .conftest import SIZE, START, Bench, step_by_step

pytestmark = pytest.mark.medium

NORMALIZE = ("vocab", "level", "valid")
BACKENDS = ("native", "torch", "reference")
INF = float("inf")


def draw_prior(made: Bench, users: int, seed: int, most: int = 30) -> ItemPrior:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most + 1, users)
    items = [rng.choice(len(made.catalog), n, replace=False) for n in counts]
    return ItemPrior(items, [10.0 ** -rng.integers(0, 7, n) * rng.random(n) for n in counts])


def mixture(
    scores: Tensor, prior: ItemPrior, weight: float, row: int, allowed: Tensor | None = None
) -> Tensor:
    """The scores [N] of all items by the definition, from those of the generator, in float64."""
    begin = int(prior.counts[:row].sum())
    own = slice(begin, begin + int(prior.counts[row]))
    mass = torch.zeros(len(scores), dtype=torch.float64)
    mass[torch.from_numpy(prior.items[own])] = torch.from_numpy(prior.mass[own])
    generator = scores.double().exp()
    if allowed is not None:
        mass, generator = mass * allowed, generator * allowed
    weight = weight if mass.sum() > 0 else 0.0
    return ((1 - weight) * generator + weight * mass / mass.sum().clamp_min(1e-300)).log()


def assert_is_brute_force(found: Recommendations, row: int, expected: Tensor) -> None:
    """Scores within 1e-4, and the true top if no two of the best scores are closer than that."""
    count = int((expected > -INF).sum().clamp_max(found.items.shape[1]))
    best = expected.topk(min(found.items.shape[1] + 1, len(expected)))
    items, scores = found.items[row], found.scores[row]
    assert (items >= 0).sum() == count and scores[count:].isneginf().all()
    torch.testing.assert_close(scores[:count].double(), expected[items[:count]], rtol=0, atol=1e-4)
    for place in range(count):
        gaps = (best.values - best.values[place]).abs()
        if bool((gaps > 2e-4).sum() == len(gaps) - 1):
            assert int(items[place]) == int(best.indices[place])
    assert int(found.certified[row]) <= count


@pytest.mark.parametrize("weights", [(0.0, 0.5, 1.0), (1e-3, 0.7, 1 - 1e-9)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_search_as_wide_as_the_catalog_equals_brute_force(bench, normalize, backend, weights):
    made = bench("t5")
    ids, mask = made.prompts([7, 2, 4])
    decoder = Decoder(made.model, made.catalog, START, normalize, backend=backend)
    prior = draw_prior(made, 3, 1)
    found = decoder.decode(ids, mask, 60, prior=prior, prior_weight=weights)
    for row in range(3):
        own = made.all_scores(ids[row, mask[row].bool()], normalize)
        assert_is_brute_force(found, row, mixture(own, prior, weights[row], row))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["vocab", "level"])
def test_a_filter_renormalises_the_prior(bench, normalize, backend):
    """Of the last request's prior, no item is allowed: the generator alone ranks."""
    made = bench("gpt2")
    ids, mask = made.prompts([3, 5])
    decoder = Decoder(made.model, made.catalog, START, normalize, backend=backend)
    prior = ItemPrior([range(20), [4, 5]], [np.arange(1.0, 21), [0.5, 0.5]])
    filter = RequestFilter.excluding(decoder.trie, [[0, 1, 19], [5, 4]])
    found = decoder.decode_exact(ids, mask, 10, 10, filter=filter, prior=prior, prior_weight=0.6)
    plain = decoder.decode_exact(ids, mask, 10, 10, filter=filter)
    allowed = torch.ones(2, 60, dtype=torch.bool)
    allowed[0, [0, 1, 19]], allowed[1, [4, 5]] = False, False
    for row in range(2):
        own = made.all_scores(ids[row, mask[row].bool()], normalize)
        assert_is_brute_force(found, row, mixture(own, prior, 0.6, row, allowed[row]))
    assert torch.equal(found.scores[1], plain.scores[1]) and torch.equal(found.items[1], plain.items[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prior_of_weight_0_changes_no_bit(bench, backend):
    made = bench("llama")
    prompts = made.prompts([3, 5])
    decoder = Decoder(made.model, made.catalog, START, backend=backend)
    plain, prior = decoder.decode(*prompts, 7), draw_prior(made, 2, 0)
    for weights in (0.0, [0.0, 0.5]):
        found = decoder.decode(*prompts, 7, prior=prior, prior_weight=weights)
        for part, expected in zip(found.tensors(), plain.tensors(), strict=True):
            assert torch.equal(part[0], expected[0])


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_search_in_one_call_returns_the_bits_of_a_search_step_by_step(bench, family, normalize):
    """One prompt's prior is empty, one has no weight, and one alone ranks."""
    made = bench(family)
    prompts = made.prompts([3, 5, 4, 6])
    decoder = Decoder(made.model, made.catalog, START, normalize)
    prior = draw_prior(made, 4, 7)
    filter = RequestFilter.excluding(decoder.trie, [[], prior.items[prior.counts[0] :].tolist(), [3], [4, 5]])
    arguments = {"filter": filter, "prior": prior, "prior_weight": [0.5, 0.6, 0.0, 1.0]}
    assert decoder._searches_in_one_call(prompts[0])
    together = decoder.decode(*prompts, 9, **arguments)
    with step_by_step():
        assert not decoder._searches_in_one_call(prompts[0])
        stepped = decoder.decode(*prompts, 9, **arguments)
    for part, expected in zip(together.tensors(), stepped.tensors(), strict=True):
        assert torch.equal(part, expected)


def test_a_prior_that_does_not_fit_is_refused(bench):
    made = bench("t5")
    prompts = made.prompts([3, 5])
    decoder = Decoder(made.model, made.catalog, START)
    with pytest.raises(UserError, match="a prior of 1 requests for 2 prompts"):
        decoder.decode(*prompts, 3, prior=ItemPrior([1], [1.0]))
    with pytest.raises(UserError, match="has the item 60, which the trie does not have"):
        decoder.decode(*prompts, 3, prior=ItemPrior([[1], [60]], [[1.0], [1.0]]))
    with pytest.raises(UserError, match="must be within 0 to 1, got 2"):
        decoder.decode(*prompts, 3, prior=draw_prior(made, 2, 0), prior_weight=2)
    with pytest.raises(UserError, match="prior must be an ItemPrior, got dict"):
        decoder.decode(*prompts, 3, prior={1: 0.5})


@pytest.mark.parametrize("backend", ["native", "torch", "reference", "model"])
def test_random_searches_agree_with_brute_force(backend):
    """Of 1 to 4 levels, 1 to 8 beams, all normalisations, filters, and weights from 0 to 1."""
    counts = mixture_searches.run(320, backend, seed=7)
    assert not any(counts[name] for name in mixture_searches.WRONG)
    assert counts["certified"] > counts["searches"] and counts["proven"] == counts["searches"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "torch", "model"])
def test_100_000_random_searches_agree_with_brute_force(backend):
    counts = mixture_searches.run(100_000, backend, seed=10_000)
    assert not any(counts[name] for name in mixture_searches.WRONG)
    assert counts["proven"] == counts["searches"]


def test_items_that_share_a_semantic_id_count_with_the_sum_of_their_masses(bench):
    """Rows 0 and 1 share an ID, rows 2 and 3 too; of the second request's pair, one item is not allowed."""
    made = bench("t5", 12)
    codes = made.catalog.codes
    catalog = Catalog.from_codes(torch.cat((codes[:1], codes[:1], codes[1:2], codes[1:])), SIZE, shared=True)
    ids, mask = made.prompts([3, 5])
    decoder = Decoder(made.model, catalog, START)
    prior = ItemPrior([[0, 1, 5], [2, 3, 5]], [[1.0, 2.0, 1.0], [3.0, 1.0, 1.0]])
    filter = catalog.excluding([[], [2]])
    assert isinstance(filter, SharedFilter)
    own = score_all(decoder, ids, mask).double().exp()
    expected = 0.5 * own
    expected[0, [0, 1]] += 0.5 * 0.75
    expected[0, 5] += 0.5 * 0.25
    expected[1, 3] += 0.5 * 0.5
    expected[1, 5] += 0.5 * 0.5
    expected[1, 2] = 0.0
    options = {"filter": filter, "prior": prior, "prior_weight": 0.5}
    scores = score_all(decoder, ids, mask, **options).double()
    torch.testing.assert_close(scores, expected.log(), rtol=0, atol=1e-5)
    found = decoder.decode_exact(ids, mask, 14, 14, **options)
    for row, count in ((0, 14), (1, 13)):
        items = found.items[row, :count]
        assert sorted(items.tolist()) == [i for i in range(14) if not (row == 1 and i == 2)]
        torch.testing.assert_close(
            found.scores[row, :count].double(), expected[row, items].log(), rtol=0, atol=1e-5
        )
    with pytest.raises(UserError, match="request 0 of the prior has the item 5 twice"):
        decoder.decode(ids[:1], mask[:1], 3, prior=ItemPrior([5, 5], [1.0, 1.0]))
    with pytest.raises(UserError, match="item 14 is not in the catalog"):
        decoder.decode(ids[:1], mask[:1], 3, prior=ItemPrior([5, 14], [1.0, 1.0]))
