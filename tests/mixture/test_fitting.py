"""Fitting a gate: the metric, the constant mixture, and weights per history where they are better."""

from __future__ import annotations

import numpy as np
import torch

from cemg.mixture.fitting import (
    POWERS,
    Candidates,
    best_constant,
    fit_gate,
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
    np.testing.assert_allclose(by_gate, gate.constant_weights(present), atol=0.021)  # LEAST, rounded up


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
