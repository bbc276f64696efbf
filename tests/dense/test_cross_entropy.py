"""The chunked cross-entropy, of the catalog and of a sample, against that of PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.dense import linear_cross_entropy


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_other_items_as_negatives_give_the_loss_of_the_catalog(dtype: torch.dtype) -> None:
    states, table, _ = draw(40, 60)
    targets = torch.full((40,), 7)
    others = torch.cat([torch.arange(7), torch.arange(8, 60)])
    whole = linear_cross_entropy(states, table, targets=targets, dtype=dtype)
    sampled = linear_cross_entropy(states, table, targets=targets, negatives=others, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # as above
    torch.testing.assert_close(sampled, whole, rtol=tolerance, atol=0)
    gradients = [torch.autograd.grad(loss, (states, table)) for loss in (sampled, whole)]
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def test_gradients_of_sampled_negatives_are_those_of_autograd() -> None:
    states, table, targets = draw(30, 50)
    negatives = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]
    logits = states @ table[negatives].T + torch.log(torch.tensor(49 / 20))
    logits = logits.masked_fill(negatives == targets[:, None], float("-inf"))
    own = (states * table[targets]).sum(1, keepdim=True)
    expected = F.cross_entropy(torch.cat([own, logits], dim=1), torch.zeros(30, dtype=torch.int64))
    loss = linear_cross_entropy(states, table, targets=targets, negatives=negatives, rows=16)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # float32, another order of summation
    gradients = [torch.autograd.grad(value, (states, table)) for value in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
