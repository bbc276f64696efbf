"""The losses are those of plain cross-entropies over the codes of each prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cemg.generator import GeneratorConfig, Vocabulary
from cemg.generator.losses import CodeLoss, FullPredictions
from cemg.tokenizer import Catalog

LEVELS, SIZE, START = 3, 4, 5
VOCABULARY = Vocabulary(LEVELS, SIZE, START, pad=0, bos=1, eos=2)
CODES = torch.tensor([[0, 1, 0], [0, 2, 3], [0, 2, 1], [3, 0, 0]])
TRIE = Catalog.from_codes(CODES, SIZE).trie
CONFIG = GeneratorConfig(loss="valid")


def predictions(items: int) -> FullPredictions:
    rows = torch.randn(items, LEVELS, VOCABULARY.size, generator=torch.Generator().manual_seed(0))
    return FullPredictions(rows.requires_grad_(), torch.empty(0), VOCABULARY)


def loss(made: FullPredictions, items: list[int], config: GeneratorConfig = CONFIG) -> torch.Tensor:
    return CodeLoss(VOCABULARY.tokens(CODES), TRIE, VOCABULARY, config)(made, torch.tensor(items))


def test_the_loss_over_valid_codes_is_the_mean_of_each_codes_own_softmax():
    items = [1, 3, 0, 1]
    made = predictions(len(items))
    wanted = torch.zeros(())
    for row, item in enumerate(items):
        for level in range(LEVELS):
            prefix = CODES[item, :level]
            valid = {int(codes[level]) for codes in CODES if torch.equal(codes[:level], prefix)}
            logits = made.rows[row, level, START + level * SIZE :][:SIZE]
            own = logits[int(CODES[item, level])]
            wanted = wanted + logits[sorted(valid)].logsumexp(0) - own
    found = loss(made, items)
    assert found.item() == pytest.approx(wanted.item() / (len(items) * LEVELS))
    expected = torch.autograd.grad(wanted / (len(items) * LEVELS), made.rows)[0]
    torch.testing.assert_close(torch.autograd.grad(found, made.rows)[0], expected)


def test_label_smoothing_spreads_over_the_valid_codes():
    items, share = [1, 3, 0], 0.3
    made = predictions(len(items))
    wanted = 0.0
    for row, item in enumerate(items):
        for level in range(LEVELS):
            prefix = CODES[item, :level]
            valid = sorted({int(codes[level]) for codes in CODES if torch.equal(codes[:level], prefix)})
            logits = made.rows[row, level, START + level * SIZE :][:SIZE][valid].detach()
            label = torch.tensor(valid.index(int(CODES[item, level])))
            wanted += F.cross_entropy(logits[None], label[None], label_smoothing=share).item()
    found = loss(made, items, replace(CONFIG, label_smoothing=share))
    assert found.item() == pytest.approx(wanted / (len(items) * LEVELS))
    found.backward()
    assert bool(made.rows.grad.isfinite().all())


def test_items_without_an_alternative_at_any_level_cost_nothing():
    one = CODES[3:]
    made = predictions(2)
    total = CodeLoss(VOCABULARY.tokens(one), Catalog.from_codes(one, SIZE).trie, VOCABULARY, CONFIG)(
        made, torch.tensor([0, 0])
    )
    total.backward()
    assert total.item() == 0 and not made.rows.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_over_all_tokens_is_cross_entropy(smoothing):
    made, items = predictions(3), [2, 0, 3]
    config = replace(CONFIG, loss="vocab", label_smoothing=smoothing)
    wanted = F.cross_entropy(
        made.rows.flatten(0, 1), VOCABULARY.tokens(CODES[items]).flatten(), label_smoothing=smoothing
    )
    assert torch.equal(loss(made, items, config), wanted)


@pytest.mark.parametrize("kind", ["vocab", "valid"])
def test_a_temperature_of_one_is_the_loss_without_and_others_divide_the_logits(kind):
    made, items = predictions(3), [2, 0, 3]
    config = replace(CONFIG, loss=kind)
    assert torch.equal(
        loss(made, items, replace(config, temperature=1.0)), loss(made, items, GeneratorConfig(loss=kind))
    )
    cooled = FullPredictions(made.rows / 0.7, made.hidden, VOCABULARY)
    assert torch.equal(loss(made, items, replace(config, temperature=0.7)), loss(cooled, items, config))
    assert loss(made, items, replace(config, temperature=0.7)) != loss(made, items, config)
