"""Fitting a gate: the metric, the constant mixture, and weights per history where they are better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cemg.mixture.fitting import (
    PENALTIES,
    POWERS,
    Candidates,
    best_constant,
    fit_gate,
    fit_slopes,
    gains_of,
    masked,
    simplex,
    smooth_gain,
)

USERS, ITEMS = 400, 30


def draw(informative: bool) -> Candidates:
    """Half of the users are served by the generator alone, the others by the memory alone.

    The first feature says which, unless it is noise.
    """
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(USERS, generator=generator) < 0.5
    scores = torch.randn(2, USERS, ITEMS, generator=generator)
    target = torch.zeros(USERS, dtype=torch.int64)
    scores[0, :, 0] = torch.where(right, 3.0, -6.0)
    scores[1, :, 0] = torch.where(right, -6.0, 3.0)
    logs = torch.log_softmax(2 * scores, dim=2)
    feature = right.double() if informative else torch.rand(USERS, generator=generator).double()
    features = torch.stack([feature, *torch.rand(5, USERS, generator=generator).double()], dim=1)
    totals = torch.stack([torch.logsumexp(power * logs[1], dim=1) for power in POWERS], dim=1)
    return Candidates(
        generator=logs[0], masses=logs[1][:, :, None], totals=totals[:, None], target=target,
        features=features.numpy(), present=np.ones((USERS, 1), dtype=bool), users=2 * USERS,
    )  # fmt: skip


def test_the_gain_is_the_ndcg_of_the_mixture():
    experts = torch.log(torch.tensor([[[0.5, 0.1], [0.3, 0.7], [0.2, 0.2]]]))  # one user, three items
    for weights, rank in (([1.0, 0.0], 2), ([0.0, 1.0], 1), ([0.5, 0.5], 2)):
        found = gains_of(experts, torch.tensor(weights), torch.tensor([2]))
        assert float(found) == 1 / np.log2(rank + 2)
    assert float(gains_of(experts, torch.tensor([0.9, 0.1]), torch.tensor([0]))) == 1


def test_the_constant_is_the_best_of_the_grid():
    found = draw(informative=False)
    weights, powers = best_constant(found)
    present = torch.from_numpy(found.present)
    gains = {
        (tuple(tried), power): float(
            gains_of(found.experts([power]), masked(torch.tensor(tried), present), found.target).sum()
        )
        for power in POWERS
        for tried in simplex(2)
    }
    assert gains[tuple(weights), powers[0]] == max(gains.values())
    assert len(list(simplex(2))) == 21 and len(list(simplex(3))) == 66
    assert all(abs(sum(tried) - 1) < 1e-9 for tried in simplex(3))


def test_weights_per_history_are_kept_where_they_are_better_on_users_that_did_not_fit_them():
    gate = fit_gate(draw(informative=True), ["memory"], memory="digest")
    figures = gate.fit["ndcg10"]
    assert figures["gate"] > figures["constant"] + 0.02 > figures["generator"] + 0.02
    right = np.array([[1.0, 0.5, 0.5, 0.5, 0.5, 0.5], [0.0, 0.5, 0.5, 0.5, 0.5, 0.5]])
    weights = gate.weights(right, np.ones((2, 1), dtype=bool))
    assert weights[0, 0] > 0.6 > 0.4 > weights[1, 0]


def test_the_constant_is_kept_where_the_features_say_nothing():
    gate = fit_gate(draw(informative=False), ["memory"], memory="digest")
    assert gate.fit["penalty"] is None and not np.any(gate.slopes)
    features, present = draw(informative=False).features, np.ones((USERS, 1), dtype=bool)
    by_gate = gate.weights(features, present)
    np.testing.assert_allclose(by_gate, gate.constant_weights(present), atol=1e-6)


def with_scores(*scores: torch.Tensor) -> Candidates:
    """Experts with these scores [U, C], the generator first; the target is candidate 0."""
    logs = [torch.log_softmax(each, dim=1) for each in scores]
    sources = logs[1:]
    totals = torch.stack([torch.stack([torch.logsumexp(p * s, 1) for p in POWERS], 1) for s in sources], 1)
    users, features = len(logs[0]), 3 * len(sources) + 3
    drawn = torch.rand(users, features, generator=torch.Generator().manual_seed(1)).double().numpy()
    return Candidates(
        generator=logs[0], masses=torch.stack(sources, 2), totals=totals,
        target=torch.zeros(users, dtype=torch.int64), features=drawn,
        present=np.ones((users, len(sources)), dtype=bool), users=users,
    )  # fmt: skip


def good_and_useless(users: int = USERS) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of an expert that ranks the target high, and of one that is sure of other items."""
    scores = torch.randn(2, users, ITEMS, generator=torch.Generator().manual_seed(2))
    scores[0, :, 0] += 2
    scores[1] *= 8
    scores[1, :, 0] = -20
    return scores[0], scores[1]


@pytest.mark.parametrize("useless", ["generator", "memory"])
def test_a_useless_expert_has_no_weight_at_all(useless: str):
    good, bad = good_and_useless()
    found = with_scores(bad, good) if useless == "generator" else with_scores(good, bad)
    gate = fit_gate(found, ["memory"], memory="digest")
    alone = [0.0, 1.0] if useless == "generator" else [1.0, 0.0]
    assert gate.constant == alone and gate.constant_weights(found.present[:1]).tolist() == [alone]
    assert (gate.weights(found.features, found.present) == alone).all()
    figures = gate.fit["ndcg10"]
    kept = "memory" if useless == "generator" else "generator"
    assert figures["gate"] == figures["constant"] == pytest.approx(figures[kept])
    assert fit_gate(found, ["memory"], memory="digest") == gate


def test_a_gate_of_three_experts_leaves_out_the_useless_one():
    """The first feature says which of the two others is right."""
    right = torch.rand(USERS, generator=torch.Generator().manual_seed(0)) < 0.5
    one, other = torch.randn(2, USERS, ITEMS, generator=torch.Generator().manual_seed(3))
    one[:, 0], other[:, 0] = torch.where(right, 2.0, -4.0), torch.where(right, -4.0, 2.0)
    found = with_scores(2 * one, 2 * other, good_and_useless()[1])
    found.features[:, 0] = right
    gate = fit_gate(found, ["memory", "dense"], memory="digest")
    weights = gate.weights(found.features, found.present)
    assert gate.constant[2] == 0 and gate.fit["penalty"] is not None
    assert weights[:, 2].max() < 0.01 and weights[right, 0].mean() > 0.6 > 0.4 > weights[~right, 0].mean()
    experts, present = found.experts(gate.powers), torch.from_numpy(found.present)
    features = torch.from_numpy((found.features - gate.means) / gate.scales).float()
    bias, slopes = fit_slopes(
        experts, found.target, features, present, gate.constant, PENALTIES[0], narrow=True
    )
    shares = torch.softmax(bias + features @ slopes, 1)
    assert shares[:, 2].max() == 0 and shares[right, 0].mean() > 0.6 > 0.4 > shares[~right, 0].mean()


def test_an_item_of_probability_0_is_not_listed():
    experts = torch.log(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]))  # one user, two items
    assert float(gains_of(experts, torch.tensor([0.0, 1.0]), torch.tensor([0]))) == 1
    assert float(gains_of(experts, torch.tensor([0.0, 1.0]), torch.tensor([1]))) == 0
    assert float(gains_of(experts, torch.tensor([0.5, 0.5]), torch.tensor([1]))) == 1 / np.log2(3)


def test_the_smooth_gain_has_finite_gradients_and_follows_the_target():
    experts = torch.full((1, 40, 2), -1e4)
    experts[0, :20] = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(1, 2, requires_grad=True)
    gain = smooth_gain(experts, torch.softmax(logits, 1), torch.tensor([0])).sum()
    gain.backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and 0 < gain.item() < 1
    better = experts.clone()
    better[0, 0] += 2
    assert float(smooth_gain(better, torch.tensor([[0.5, 0.5]]), torch.tensor([0])).sum()) > gain.item()
