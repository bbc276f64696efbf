"""Recommendations under a prior of the caller: ids of the catalog, filters, removed items, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cemg import ItemPrior
from cemg.decoding import score_all
from cemg.errors import UserError
from cemg.recommender import Recommender

HISTORIES = [["item-0001", "item-0002"], ["item-0003"]]
PRIOR = ItemPrior([["item-0004", "item-0001", "item-0020"], ["item-0030"]], [[5.0, 3.0, 2.0], [1.0]])


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    return Recommender.from_run(tiny_run)


def test_a_weight_of_1_recommends_the_items_of_the_prior_in_their_order(recommender):
    found = recommender.recommend(HISTORIES, top=4, prior=PRIOR, prior_weight=1.0)
    assert found.ids == [["item-0004", "item-0001", "item-0020", None], ["item-0030", None, None, None]]
    torch.testing.assert_close(found.scores[0, :3], torch.tensor([0.5, 0.3, 0.2]).log())
    assert found.certified.tolist() == [3, 1]


@pytest.mark.parametrize("exact", [False, True])
def test_the_scores_are_those_of_the_mixture_of_all_items(recommender, exact):
    found = recommender.recommend(
        HISTORIES, top=50, beams=50, prior=PRIOR, prior_weight=[0.3, 0.6], exact=exact
    )
    rows = [np.array(recommender.catalog.rows_of(history)) for history in HISTORIES]
    own = score_all(recommender.decoder, *recommender.prompter.batch(rows)).double().exp()
    for row, weight in enumerate((0.3, 0.6)):
        mass = torch.zeros(50, dtype=torch.float64)
        items = [PRIOR.items[:3], PRIOR.items[3:]][row].tolist()
        mass[recommender.catalog.rows_of(items)] = torch.from_numpy(
            [PRIOR.mass[:3] / 10, PRIOR.mass[3:]][row]
        )
        expected = ((1 - weight) * own[row] + weight * mass).log()
        torch.testing.assert_close(found.scores[row].double(), expected[found.items[row]], rtol=0, atol=1e-4)
        assert len(set(found.ids[row])) == 50


def test_excluded_and_removed_items_give_their_mass_to_the_others(recommender, monkeypatch):
    monkeypatch.setattr(recommender, "removed", ["item-0004"])
    for name in ("_not_removed", "removed_leaves"):
        recommender.__dict__.pop(name, None)
    try:
        found = recommender.recommend(HISTORIES, top=2, prior=PRIOR, prior_weight=1.0)
        assert found.ids[0] == ["item-0001", "item-0020"]
        torch.testing.assert_close(found.scores[0], torch.tensor([0.6, 0.4]).log())
        found = recommender.recommend(HISTORIES, top=2, prior=PRIOR, prior_weight=1.0, exclude_history=True)
        assert found.ids[0] == ["item-0020", None] and found.scores[0, 0] == 0
        only = recommender.only(["item-0001", "item-0005"])
        found = recommender.recommend(HISTORIES, top=2, prior=PRIOR, prior_weight=0.9, filter=only)
        assert found.ids[0][0] == "item-0001"
        plain = recommender.recommend(HISTORIES, top=2, filter=only, memory="off")
        assert found.ids[1] == plain.ids[1] and torch.equal(found.scores[1], plain.scores[1])
    finally:
        for name in ("_not_removed", "removed_leaves"):
            recommender.__dict__.pop(name, None)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([["item-0001", "item-9999"], ["item-0002"]], "item 'item-9999' is not in the catalog"),
        (
            [["item-0001"], ["item-0002", "item-0002"]],
            "request 1 of the prior has the item 'item-0002' twice",
        ),
        ([["item-0001"]], "a prior of 1 requests for 2 prompts"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(recommender, items, message):
    with pytest.raises(UserError, match=message):
        recommender.recommend(HISTORIES, prior=ItemPrior(items, [[1.0] * len(row) for row in items]))


@pytest.mark.parametrize("weight", [-0.1, 1.01, [0.5]])
def test_a_weight_outside_0_to_1_is_refused(recommender, weight):
    with pytest.raises(UserError, match="the weight of a prior must be"):
        recommender.recommend(HISTORIES, prior=PRIOR, prior_weight=weight)


def test_other_engines_refuse_a_prior_and_name_the_engine_that_has_it(tiny_run):
    other = Recommender.from_run(tiny_run, engine="transformers")
    with pytest.raises(UserError, match="engine=transformers does not support a prior") as error:
        other.recommend(HISTORIES, prior=PRIOR)
    assert error.value.fix == "use engine=cemg"


@pytest.mark.parametrize("memory", ["off", "gate"])
def test_a_weight_without_a_prior_is_refused(recommender, memory):
    with pytest.raises(UserError, match="prior_weight has no effect without a prior"):
        recommender.recommend(HISTORIES, top=1, memory=memory, prior_weight=0.5)
