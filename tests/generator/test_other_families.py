"""Pre-trained decoders without a fast path: trained, and decoded as their own forward scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.generator import BackboneConfig, GeneratorConfig, Prompter, build_backbone
from cemg.generator.training import train_generator
from cemg.pipeline import Pipeline
from cemg.tokenizer import Catalog

pytestmark = pytest.mark.medium

CATALOG = Catalog.from_codes(torch.cartesian_prod(torch.arange(3), torch.arange(3)), 3)
SHARED = {"vocab_size": 40, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64}
MADE = {
    "gpt_neo": (GPTNeoForCausalLM, GPTNeoConfig(**SHARED, **LOCAL, num_layers=2, num_heads=4)),
    "mamba": (MambaForCausalLM, MambaConfig(**SHARED, num_hidden_layers=2, state_size=4)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_decoder_without_a_fast_path_learns_histories_and_recommends_what_it_scores_highest(name, tmp_path):
    torch.manual_seed(0)
    kind, shape = MADE[name]
    kind(shape).save_pretrained(tmp_path / "model")
    config = BackboneConfig(kind="causal", pretrained=str(tmp_path / "model"), dropout=0.0)
    model, vocabulary = build_backbone(config, 2, 3, history_items=8)
    prompter = Prompter(vocabulary, CATALOG.codes, history_items=8, seq2seq=False)
    histories = [np.arange(9, dtype=np.int32)] * 8
    losses: list[float] = []
    settings = GeneratorConfig(
        history_items=8, batch_size=4, epochs=30, learning_rate=1e-2, validate_every=30
    )
    train_generator(
        model, vocabulary, prompter, histories, CATALOG.trie, validate=lambda _: float(len(losses)),
        config=settings, folder=tmp_path / "checkpoints",
        log=lambda _, v: losses.extend([v["generator/loss"]] if "generator/loss" in v else []),
    )  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]
    decoder = Decoder(model, CATALOG, vocabulary.code_token_start)
    assert "one row per beam" in decoder.path
    known = [histories[0][:4], histories[0][:7]]
    found = decoder.decode(*prompter.batch(known), 9)
    assert found.items[:, 0].tolist() == [4, 7]  # what follows in every history
    tokens = CATALOG.codes + vocabulary.code_token_start + 3 * torch.arange(2)
    for row, history in enumerate(known):
        prompt = prompter.prompt(history).expand(9, -1)
        with torch.no_grad():
            log_probs = model(torch.cat((prompt, tokens[:, :1]), dim=1)).logits[:, -2:].log_softmax(-1)
        expected = log_probs.gather(2, tokens[:, :, None]).sum((1, 2))
        torch.testing.assert_close(found.scores[row], expected[found.items[row]], rtol=0, atol=1e-4)


def test_a_model_that_sees_the_future_is_refused_before_it_trains(tiny_run, tmp_path: Path):
    shape = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.5
    )
    BertLMHeadModel(shape).save_pretrained(tmp_path / "bert")
    pipeline = Pipeline.open(tiny_run)
    backbone = BackboneConfig(kind="causal", pretrained=str(tmp_path / "bert"))
    pipeline.config = replace(pipeline.config, backbone=backbone)
    with pytest.raises(UserError, match="BertLMHeadModel cannot be decoded") as error:
        pipeline._train_generator(tmp_path / "generator")
    assert "differ from the model's" in str(error.value.cause)
    assert not (tmp_path / "generator" / "checkpoints").exists()
