"""A decoder written to a folder comes back with the same lists and scores, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LogitsProcessorList

from cemg.decoding import Decoder, TrieLogitsProcessor
from cemg.errors import UserError
from cemg.tokenizer import Catalog

from .conftest import FAMILIES, LEVELS, SIZE, START, Bench, make_model, random_catalog


def mapped(catalog: Catalog, *, shared: bool = False) -> Catalog:
    """The catalog's codes on tokens in reverse order, so that no start describes them."""
    table = torch.arange(LEVELS * SIZE).flip(0).view(LEVELS, SIZE) + START
    codes = torch.cat([catalog.codes, catalog.codes[:5]]) if shared else catalog.codes
    names = [f"item {i}" for i in range(len(codes))]
    counts = torch.arange(len(codes)) if shared else None
    return Catalog.from_codes(codes, SIZE, names, tokens=table, shared=shared, counts=counts)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_decoder_returns_the_same_lists_and_scores(tmp_path: Path, family: Any, shared: bool):
    catalog = mapped(random_catalog(40, 2), shared=shared)
    made = Bench(make_model(family), catalog)
    decoder = Decoder(made.model, catalog, normalize="valid")
    prompts = made.prompts([6, 3])
    found = decoder.decode(*prompts, 10)
    decoder.save_pretrained(tmp_path / "out")
    again = Decoder.from_pretrained(tmp_path / "out")
    assert (again.normalize, again.path) == ("valid", decoder.path)
    other = again.decode(*prompts, 10)
    for mine, theirs in zip(found.tensors(), other.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.catalog.ids_of(other.items) == catalog.ids_of(found.items)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_models_load_the_folder_and_generate_the_same_items(tmp_path: Path, family: Any):
    catalog = mapped(random_catalog(40, 2))
    made = Bench(make_model(family), catalog)
    decoder = Decoder(made.model, catalog)
    decoder.save_pretrained(tmp_path)
    auto: Any = AutoModelForSeq2SeqLM if made.seq2seq else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.model.parameters(), strict=True))
    loaded = Catalog.load(tmp_path / "cemg_catalog")
    ids, mask = made.prompts([6, 3])
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=8, num_return_sequences=8, do_sample=False,
        max_new_tokens=LEVELS, min_new_tokens=LEVELS, length_penalty=0.0, early_stopping=False,
        logits_processor=LogitsProcessorList([TrieLogitsProcessor(loaded)]),
    )  # fmt: skip
    codes = loaded.code_tokens().codes_of(out[:, -LEVELS:])
    items = loaded.trie.items(loaded.trie.lookup(codes)).view(2, 8)
    assert torch.equal(items, decoder.decode(ids, mask, 8).items)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype):
    make_model("llama").save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    made = Bench(model, random_catalog(40, 2))
    decoder = Decoder(made.model, made.catalog, START)
    found = decoder.decode(*made.prompts([6, 3]), 10)
    decoder.save_pretrained(tmp_path / "out")
    again = Decoder.from_pretrained(tmp_path / "out")
    assert again.model.dtype == dtype
    assert torch.equal(again.decode(*made.prompts([6, 3]), 10).scores, found.scores)


def test_a_consecutive_token_layout_is_loaded_as_one(tmp_path: Path):
    made = Bench(make_model("t5"), random_catalog(40, 2))
    Decoder(made.model, made.catalog, START, "level").save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert (again.tokens.start, again.normalize, again.catalog.item_ids) == (START, "level", list(range(40)))
    assert Decoder.from_pretrained(tmp_path, normalize="vocab", backend="reference").normalize == "vocab"


def test_lora_is_merged_into_the_saved_weights(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    made = Bench(make_model("llama"), random_catalog(40, 2))
    adapted: Any = get_peft_model(made.model, LoraConfig(target_modules="all-linear", r=2)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    decoder = Decoder(adapted, made.catalog, START)
    prompts = made.prompts([6, 3])
    found = decoder.decode(*prompts, 10)
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path).decode(*prompts, 10)
    assert torch.equal(again.items, found.items) and torch.equal(again.scores, found.scores)
    assert "lora_A" in " ".join(
        name for name, _ in adapted.named_parameters()
    )  # the model itself is as it was
    assert not list(tmp_path.glob("adapter*"))


def test_adapters_that_cannot_be_merged_are_refused_and_nothing_is_written(tmp_path: Path):
    from peft import PromptTuningConfig, get_peft_model

    made = Bench(make_model("llama"), random_catalog(40, 2))
    decoder = Decoder(made.model, made.catalog, START)
    decoder.model = get_peft_model(
        made.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )  # type: ignore[assignment]
    with pytest.raises(UserError, match="adapters of the kind PROMPT_TUNING cannot be merged"):
        decoder.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_folder_stay_and_saving_again_replaces_the_checkpoint(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    made = Bench(make_model("t5"), random_catalog(40, 2))
    Decoder(made.model, made.catalog, START).save_pretrained(tmp_path)
    Decoder(made.model, random_catalog(30, 5), START).save_pretrained(tmp_path)
    assert len(Decoder.from_pretrained(tmp_path).catalog) == 30
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not tmp_path.with_name(f".{tmp_path.name}.part").exists()


def test_weight_files_of_an_earlier_checkpoint_are_removed(tmp_path: Path):
    """transformers reads model.safetensors before the index of a checkpoint in several files."""
    made = Bench(make_model("t5"), random_catalog(40, 2))
    made.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = make_model("t5", seed=1)
    Decoder(other, made.catalog, START).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]
    loaded = Decoder.from_pretrained(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), other.parameters(), strict=True))


def test_saving_into_a_folder_of_adapters_is_refused(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    made = Bench(make_model("t5"), random_catalog(40, 2))
    with pytest.raises(UserError, match="holds adapters"):
        Decoder(made.model, made.catalog, START).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cemg_catalog" / "cemg_decoder.json").unlink(), "holds no cemg_catalog"),
        (
            lambda f: (f / "cemg_catalog" / "cemg_decoder.json").write_text("[1]"),
            "cemg_decoder.json is damaged",
        ),
        (lambda f: (f / "cemg_catalog" / "cemg_decoder.json").write_text("[" * 99_999), "is damaged"),
        (lambda f: (f / "cemg_catalog" / "catalog.json").write_text("{}"), "catalog"),
        (lambda f: (f / "config.json").write_text("{"), "holds no readable model"),
        (lambda f: (f / "config.json").unlink(), "holds no readable model"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "holds no readable model"),
        (lambda f: rename_a_weight(f / "model.safetensors"), "1 weights are missing"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Any, message: str):
    made = Bench(make_model("t5"), random_catalog(40, 2))
    Decoder(made.model, made.catalog, START).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Decoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def rename_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    name = next(name for name in weights if "layer_norm" in name)
    weights[f"{name}.other"] = weights.pop(name)
    save_file(weights, path, metadata={"format": "pt"})


def test_an_unknown_normalize_in_the_folder_is_refused(tmp_path: Path):
    made = Bench(make_model("t5"), random_catalog(40, 2))
    Decoder(made.model, made.catalog, START).save_pretrained(tmp_path)
    about = tmp_path / "cemg_catalog" / "cemg_decoder.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"normalize": "softmax"}))
    with pytest.raises(UserError, match="normalize must be"):
        Decoder.from_pretrained(tmp_path)
