"""``TransformersDecoder`` ranks by the model and ignores the sampling settings of its checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from cemg.decoding import TransformersDecoder, dict_trie

from ..conftest import START

INHERITED = {
    "do_sample": True, "top_k": 2, "top_p": 0.5, "temperature": 0.3, "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1, "suppress_tokens": [4, 5, 12, 13], "length_penalty": 2.0,
    "forced_eos_token_id": 1, "encoder_no_repeat_ngram_size": 1, "renormalize_logits": True,
}  # fmt: skip


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_sampling_settings_of_the_checkpoint_are_not_inherited(bench, monkeypatch, family, normalize):
    made = bench(family)
    prompts = made.prompts([6, 3])
    expected = TransformersDecoder(made.model, made.catalog, START, normalize).decode(*prompts, 10)
    own = made.model.generation_config.to_dict() | INHERITED
    monkeypatch.setattr(made.model, "generation_config", GenerationConfig.from_dict(own))
    found = TransformersDecoder(made.model, made.catalog, START, normalize).decode(*prompts, 10)
    assert torch.equal(found.items, expected.items) and torch.equal(found.scores, expected.scores)
    assert made.model.generation_config.top_k == 2  # the model's own configuration is unchanged


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_a_token_that_is_both_end_and_padding_does_not_end_a_sequence(bench, monkeypatch, family):
    made = bench(family)
    prompts = made.prompts([6, 3])
    expected = TransformersDecoder(made.model, made.catalog, START).decode(*prompts, 10)
    both = GenerationConfig.from_dict(made.model.generation_config.to_dict() | {"eos_token_id": 0})
    monkeypatch.setattr(made.model, "generation_config", both)
    found = TransformersDecoder(made.model, made.catalog, START).decode(*prompts, 10)
    assert torch.equal(found.items, expected.items)


def test_every_row_always_has_an_allowed_token(bench):
    made = bench("gpt2", 1)
    found = TransformersDecoder(made.model, made.catalog, START).decode(*made.prompts([3, 2]), 1)
    assert found.items.tolist() == [[0], [0]] and found.certified.tolist() == [0, 0]


def test_the_dict_trie_holds_exactly_the_rows():
    assert dict_trie(torch.tensor([[0, 1], [0, 2], [3, 0]])) == {0: {1: {}, 2: {}}, 3: {0: {}}}
