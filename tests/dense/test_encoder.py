"""SASRec and BSARec: what a state depends on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cemg.dense import DenseConfig, SequenceEncoder
from cemg.errors import UserError

ITEMS = 30
SMALL = DenseConfig(dim=16, inner=32, heads=2, blocks=2, max_length=12)
CONFIGS = [
    SMALL,
    dataclasses.replace(SMALL, norm_first=True),
    dataclasses.replace(SMALL, model="bsarec"),
    dataclasses.replace(SMALL, model="bsarec", norm_first=True),
]
pytestmark = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.model}-{c.norm_first}")


def encoder(config: DenseConfig) -> SequenceEncoder:
    torch.manual_seed(0)
    return SequenceEncoder(ITEMS, config).eval()


def test_the_newest_state_is_that_of_all_positions(config: DenseConfig) -> None:
    model = encoder(config)
    items, lengths = torch.randint(ITEMS, (5, 9)), torch.tensor([1, 3, 9, 5, 8])
    every = model(items, lengths)[torch.arange(5), lengths - 1]
    torch.testing.assert_close(model(items, lengths, newest=True), every, rtol=0, atol=1e-5)  # float32 sums


def test_a_state_depends_neither_on_the_padding_nor_on_the_batch(config: DenseConfig) -> None:
    model = encoder(config)
    history = torch.tensor([[3, 4, 5]])
    alone = model(history, torch.tensor([3]), newest=True)[0]
    for width, filler in ((4, 0), (12, 7)):
        batch = torch.full((3, width), filler)
        batch[1, :3] = history[0]
        found = model(batch, torch.tensor([width, 3, 1]), newest=True)[1]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)  # float32 sums


def test_positions_are_counted_from_the_newest_item(config: DenseConfig) -> None:
    model = encoder(config)
    before = model(torch.tensor([[5, 6]]), torch.tensor([2]), newest=True)
    with torch.no_grad():
        model.positions.weight[2:] += 1  # older than both items
    assert torch.equal(model(torch.tensor([[5, 6]]), torch.tensor([2]), newest=True), before)
    with torch.no_grad():
        model.positions.weight[0] += torch.linspace(-1, 1, 16)
    assert not torch.allclose(model(torch.tensor([[5, 6]]), torch.tensor([2]), newest=True), before)


def test_sasrec_is_causal_and_bsarec_is_not(config: DenseConfig) -> None:
    model = encoder(config)
    with torch.no_grad():
        first, second = (model(torch.tensor([[3, 4, last]]), torch.tensor([3]))[:, :2] for last in (5, 9))
    assert torch.allclose(first, second, atol=1e-5) == (config.model == "sasrec")


def test_bsarec_therefore_refuses_to_train_on_all_positions(config: DenseConfig) -> None:
    if config.model == "sasrec":
        assert dataclasses.replace(config, samples="positions").samples == "positions"
        return
    with pytest.raises(UserError, match="samples=prefixes"):
        dataclasses.replace(config, samples="positions")
