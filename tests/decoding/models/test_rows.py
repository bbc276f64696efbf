"""One row per beam, for models that the tree mask cannot serve, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from cemg.decoding import Decoder, score_all
from cemg.decoding.models.rows import RowsPlan
from cemg.decoding.protocol import Unsupported

from ..conftest import START, VOCABULARY, Bench, Family, random_catalog

pytestmark = pytest.mark.medium

SHAPES = {
    "mpt": (MptForCausalLM, MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2)),
    "gpt_neo": (
        GPTNeoForCausalLM,
        GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
        ),
    ),
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, n_layer=2)),
    "mamba": (MambaForCausalLM, MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
}  # fmt: skip


def make(name: str) -> Bench:
    """A tiny model with weights large enough that scores differ, and a catalog of 60 items."""
    kind, config = SHAPES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, 0.2)
    return Bench(model, random_catalog(60, 0))


def with_plan(made: Bench, plan: RowsPlan, normalize: str = "vocab") -> Decoder:
    decoder = Decoder(made.model, made.catalog, START, normalize, backend="reference")
    decoder.plan = plan
    return decoder


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", SHAPES)
def test_every_variant_ranks_the_catalog_like_the_models_plain_forward(name, number):
    made = make(name)
    ids, mask = made.prompts([12, 3, 12])
    decoder = with_plan(made, RowsPlan.variants(made.model)[number])
    found = decoder.decode(ids, mask, 60)
    every = score_all(decoder, ids, mask, rows=50)  # in chunks, so states are reset to their prefill
    for row in range(3):
        expected = made.all_scores(ids[row, mask[row].bool()], "vocab")
        assert sorted(found.items[row].tolist()) == list(range(60))
        torch.testing.assert_close(found.scores[row], expected[found.items[row]], rtol=0, atol=1e-4)
        torch.testing.assert_close(every[row], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_rows_return_the_lists_of_the_fast_path(bench, same_lists, family: Family, normalize):
    made = bench(family)
    prompts = made.prompts([9, 4, 1, 9])
    fast = Decoder(made.model, made.catalog, START, normalize)
    for plan in RowsPlan.variants(made.model):
        rows = with_plan(made, plan, normalize)
        same_lists(rows.decode(*prompts, 7), fast.decode(*prompts, 7))
        same_lists(rows.decode_exact(*prompts, 3, 7), fast.decode_exact(*prompts, 3, 7))


def test_prompts_grouped_by_length_may_be_padded_on_either_side(bench, same_lists):
    made = bench("llama")
    ids, mask = made.prompts([9, 4, 6])
    decoder = with_plan(made, RowsPlan(made.model, padded=False))
    left = decoder.decode(ids, mask, 10)
    for row in range(3):  # the same tokens, now on the left
        ids[row], mask[row] = ids[row].roll(int(mask[row].sum())), mask[row].roll(int(mask[row].sum()))
    same_lists(decoder.decode(ids, mask, 10), left)


def test_a_model_that_generate_does_not_serve_is_refused():
    with pytest.raises(Unsupported, match="Linear has no prepare_inputs_for_generation"):
        RowsPlan(nn.Linear(1, 1))
