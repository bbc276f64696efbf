"""The chunked cross-entropy against that of PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.baselines import linear_cross_entropy


def draw(positions: int, items: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(positions, 16, generator=generator, dtype=torch.float32).requires_grad_()
    table = torch.randn(items, 16, generator=generator, dtype=torch.float32).requires_grad_()
    return states, table, torch.randint(items, (positions,), generator=generator)


@pytest.mark.parametrize("positions", [1, 31, 64, 65])
@pytest.mark.parametrize("items", [2, 301])
def test_loss_and_gradients_equal_those_of_pytorch(positions: int, items: int) -> None:
    states, table, targets = draw(positions, items)
    expected = F.cross_entropy(states @ table.T, targets)
    expected_gradients = torch.autograd.grad(3 * expected, (states, table))
    loss = linear_cross_entropy(states, table, targets=targets, rows=32)
    gradients = torch.autograd.grad(3 * loss, (states, table))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # float32, another order of summation
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_of_bfloat16_products_are_within_their_rounding() -> None:
    states, table, targets = draw(200, 500)
    expected_gradients = torch.autograd.grad(F.cross_entropy(states @ table.T, targets), (states, table))
    loss = linear_cross_entropy(states, table, targets=targets, dtype=torch.bfloat16)
    for ours, theirs in zip(torch.autograd.grad(loss, (states, table)), expected_gradients, strict=True):
        # rounding logits up to about 16 at 2 ** -9 changes a probability by about 3 %; the norm averages this
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_states_without_gradients_are_allowed() -> None:
    states, table, targets = draw(5, 7)
    linear_cross_entropy(states.detach(), table, targets=targets).backward()
    assert table.grad is not None and bool(table.grad.isfinite().all())
