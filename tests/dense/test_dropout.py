"""Dropout from eight bits: its rate, its scale and its gradient."""

from __future__ import annotations

import pytest
import torch

from cemg.dense.dropout import Dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_and_the_mean_are_those_of_dropout(rate: float) -> None:
    torch.manual_seed(0)
    found = Dropout(rate)(torch.ones(1000, 1003))
    rounded = round(rate * 256) / 256
    assert float((found == 0).float().mean()) == pytest.approx(rounded, abs=2e-3)  # 4 sigma of 1e6 draws
    assert found.unique().tolist() == pytest.approx([0, 1 / (1 - rounded)])


def test_the_gradient_is_zero_exactly_where_the_output_is() -> None:
    torch.manual_seed(0)
    x = torch.ones(7, 5, requires_grad=True)
    found = Dropout(0.5)(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, found) and 0 < int((found == 0).sum()) < 35


def test_it_does_nothing_outside_training_or_at_rate_zero() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x


def test_equal_seeds_give_equal_masks() -> None:
    layer, masks = Dropout(0.3), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(torch.ones(64)))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
