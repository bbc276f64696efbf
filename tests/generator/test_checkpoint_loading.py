"""Pre-trained models keep their own class, all of their weights, and a head that is not their embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cemg.decoding import Decoder, TransformersDecoder
from cemg.errors import UserError
from cemg.generator import BackboneConfig, build_backbone
from cemg.generator.pretrained import check_whole, tied
from cemg.tokenizer import Catalog

LEVELS, SIZE = 2, 3
CATALOG = Catalog.from_codes(torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)), SIZE)
T5: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1,
    "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
FAMILIES = {
    "T5": T5, "MT5": T5, "UMT5": T5, "LongT5": T5, "SwitchTransformers": T5 | EXPERTS, "Bart": BART,
}  # fmt: skip


def checkpoint(family: str, folder: Path, *, untied: bool = False) -> dict[str, torch.Tensor]:
    """A tiny model's folder, its weights far from where they start; returns them by name."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return dict(model.state_dict())


def backbone(folder: Path, **values: Any) -> tuple[Any, Any]:
    config = BackboneConfig(**({"kind": "t5", "pretrained": str(folder)} | values))
    return build_backbone(config, LEVELS, SIZE, history_items=4)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_keeps_its_class_and_every_weight(family, untied, tmp_path):
    """Old rows of embeddings and head stay, new ones are made, and what was tied stays so: nothing else."""
    before = checkpoint(family, tmp_path, untied=untied)
    model, vocabulary = backbone(tmp_path)
    assert type(model).__name__ == f"{family}ForConditionalGeneration"
    assert (vocabulary.code_token_start, vocabulary.size) == (40, 46)
    assert tied(model) != untied
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        kept = after[name][:, :40] if name == "final_logits_bias" else after[name][: len(weight)]
        assert torch.equal(kept, weight), name
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == 46
    for stack in (model.get_encoder(), model.get_decoder()):
        assert stack.embed_tokens.weight.shape[0] == 46


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_decodes_like_generate(family, untied, tmp_path):
    checkpoint(family, tmp_path, untied=untied)
    model, vocabulary = backbone(tmp_path)
    ids = torch.randint(40, 46, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    start = vocabulary.code_token_start
    found = Decoder(model.eval(), CATALOG, start).decode(ids, mask, 9)
    theirs = TransformersDecoder(model, CATALOG, start).decode(ids, mask, 9)
    torch.testing.assert_close(found.scores, theirs.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["MT5", "UMT5"])
def test_an_untied_head_survives_saving_and_lora(family, tmp_path):
    checkpoint(family, tmp_path / "given", untied=True)
    model, _ = backbone(tmp_path / "given")
    model.save_pretrained(tmp_path / "saved")
    again, _ = backbone(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight[:46], model.lm_head.weight) and not tied(again)
    adapted, _ = backbone(tmp_path / "given", lora_rank=2)
    assert not tied(adapted.get_base_model())
    assert torch.equal(adapted.get_base_model().lm_head.weight[:40], model.lm_head.weight[:40])


def edit(folder: Path, change: str) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith(("wo.weight", "down_proj.weight")))
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["adapter.extra.weight"] = torch.ones(2)
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
@pytest.mark.parametrize("kind", ["t5", "causal"])
def test_a_checkpoint_that_does_not_fit_its_class_is_refused(kind, change, tiny_llama, tmp_path):
    checkpoint("T5", tmp_path / "t5")
    causal = tmp_path / "causal"
    causal.mkdir()
    for file in tiny_llama.iterdir():
        (causal / file.name).write_bytes(file.read_bytes())
    edit(tmp_path / kind, change)
    with pytest.raises(UserError, match=r"backbone\.pretrained=") as error:
        backbone(tmp_path / kind, kind=kind)
    assert error.value.cause and error.value.fix


def test_a_checkpoint_of_another_class_is_refused_not_cut_to_size(tmp_path):
    """UMT5 has a position bias in every layer: as a T5 it would lose those of the second."""
    shape = transformers.UMT5Config(**(T5 | {"num_layers": 2, "num_decoder_layers": 2}))
    transformers.UMT5ForConditionalGeneration(shape).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(UserError, match="weights of its T5ForConditionalGeneration are unknown to it") as e:
        backbone(tmp_path)
    assert "relative_attention_bias" in str(e.value.cause)


def test_an_encoder_alone_has_no_decoder(tmp_path):
    transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights of its T5ForConditionalGeneration are missing"):
        backbone(tmp_path)


def test_a_body_without_its_untied_head_is_refused(tmp_path):
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaModel(shape).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="1 weights of its LlamaForCausalLM are missing") as error:
        backbone(tmp_path, kind="causal")
    assert error.value.cause == "lm_head.weight"


def test_a_model_of_the_other_kind_is_refused_with_the_setting_that_takes_it(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as error:
        backbone(tiny_llama)
    assert "backbone.kind=causal" in str(error.value.fix)
    backbone(tiny_llama, kind="causal")  # the fix
    checkpoint("T5", tmp_path)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        backbone(tmp_path, kind="causal")
    assert "backbone.kind=t5" in str(error.value.fix)


def test_computed_buffers_in_older_files_are_accepted():
    report = {
        "missing_keys": set(), "mismatched_keys": set(),
        "unexpected_keys": {
            "model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias", "h.3.attn.masked_bias",
        },
    }  # fmt: skip
    check_whole("x", "Model", report)
    report["unexpected_keys"] |= {"transformer.h.0.attn.c_attn.bias", "score.weight"}
    with pytest.raises(UserError, match="2 weights of its Model are unknown to it"):
        check_whole("x", "Model", report)


def test_a_start_token_of_the_generation_settings_is_trained_with(tmp_path):
    checkpoint("T5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder_start_token_id"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 5}))
    model, vocabulary = backbone(tmp_path)
    assert model.config.decoder_start_token_id == 5
    prompt = torch.tensor([[vocabulary.code_token_start]])
    assert model(input_ids=prompt, labels=prompt).loss.isfinite()
