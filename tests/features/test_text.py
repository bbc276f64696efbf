"""Text features: missing texts, pooling, batches, the cache, invalid input, and MiniLM's real weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from cemg.errors import UserError
from cemg.features import FeatureCache, TextConfig, encode_texts
from cemg.features.text import MINILM_HUB, MINILM_PACKAGE, pool, resolve_text_model

TEXTS = ["red lipstick", "nail polish", "a shampoo for dry hair", "soap"]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason=f"the package {MINILM_PACKAGE} is not installed"
)


def quiet(texts: list[str | None], config: TextConfig, cache: FeatureCache | None = None):
    return encode_texts(texts, config=config, cache=cache, progress=False)


def test_missing_and_blank_texts_are_zero_and_masked(tiny_bert: Path):
    features = quiet(["soap", None, "", "  \n"], TextConfig(str(tiny_bert)))
    assert features.present.tolist() == [True, False, False, False]
    assert features.values.shape == (4, 16)
    assert features.values[0].abs().sum() > 0
    assert torch.equal(features.values[1:], torch.zeros(3, 16))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_equal_a_plain_forward_pass_of_each_text_alone(tiny_bert: Path, pooling: str):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    features = quiet(TEXTS, TextConfig(str(tiny_bert), pooling))
    for text, vector in zip(TEXTS, features.values, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # [T, F]
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        # two layers of 16-long float32 sums, |x| < 4: some 100 roundings of 2**-23 each
        torch.testing.assert_close(vector, expected, rtol=0, atol=4 * 100 * 2**-23)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_do_not_depend_on_the_batch_split(tiny_bert: Path, batch_size: int):
    batched = quiet(TEXTS, TextConfig(str(tiny_bert), "mean", batch_size=4))
    split = quiet(TEXTS, TextConfig(str(tiny_bert), "mean", batch_size=batch_size))
    # the same sums in another order: some 100 roundings of 2**-23 at |x| < 4
    torch.testing.assert_close(split.values, batched.values, rtol=0, atol=4 * 100 * 2**-23)


def test_mean_pooling_ignores_padding():
    hidden = torch.tensor([[[1.0], [3.0], [99.0]]])  # [1, 3, 1]
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, how="mean").tolist() == [[2.0]]
    assert pool(hidden, mask, how="cls").tolist() == [[1.0]]


def test_a_text_is_truncated_at_max_tokens(tiny_bert: Path):
    config = TextConfig(str(tiny_bert), max_tokens=4)  # [CLS], two words, [SEP]
    features = quiet(["red soap", "red soap hair"], config)
    assert torch.equal(features.values[0], features.values[1])


def test_a_second_call_returns_the_cached_features_bit_for_bit(tiny_bert: Path, tmp_path: Path):
    texts = [*TEXTS, None, "soap"]
    first = quiet(texts, TextConfig(str(tiny_bert)), cache := FeatureCache(tmp_path / "cache"))
    assert (cache.hits, cache.misses) == (0, 5)
    second = quiet(texts, TextConfig(str(tiny_bert)), cache := FeatureCache(tmp_path / "cache"))
    assert (cache.hits, cache.misses) == (5, 0)
    assert torch.equal(first.values, second.values) and torch.equal(first.present, second.present)


def test_another_pooling_length_or_weights_are_not_served_from_the_cache(tiny_bert: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    weights = load_file(other / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "cache"
    quiet(TEXTS, TextConfig(str(tiny_bert)), FeatureCache(folder))
    for config in (
        TextConfig(str(tiny_bert), "cls"),
        TextConfig(str(tiny_bert), max_tokens=8),
        TextConfig(str(other)),
    ):
        quiet(TEXTS, config, cache := FeatureCache(folder))
        assert cache.hits == 0


def test_a_checkpoint_without_its_pooler_still_hits_the_cache(tiny_bert: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    bare = tmp_path / "bare"
    shutil.copytree(tiny_bert, bare)
    weights = {k: v for k, v in load_file(bare / "model.safetensors").items() if not k.startswith("pooler")}
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    quiet(TEXTS, TextConfig(str(bare)), FeatureCache(tmp_path / "cache"))
    quiet(TEXTS, TextConfig(str(bare)), cache := FeatureCache(tmp_path / "cache"))
    assert (cache.hits, cache.misses) == (4, 0)


def test_a_checkpoint_without_a_weight_is_refused_with_the_name_of_the_weight(
    tiny_bert: Path, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_bert, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["embeddings.LayerNorm.bias"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"embeddings\.LayerNorm\.bias"):
        quiet(TEXTS, TextConfig(str(broken)))


def test_without_any_text_no_model_is_loaded():
    features = encode_texts([None, " "], config=TextConfig("no/such-model", "mean"))
    assert features.values.tolist() == [[0], [0]] and not features.present.any()


def test_an_unknown_model_is_refused_with_cause_and_fix():
    with pytest.raises(UserError) as error:
        quiet(TEXTS, TextConfig("nobody/has-such-a-model"))
    assert "nobody/has-such-a-model" in error.value.message
    assert error.value.cause and "hf download nobody/has-such-a-model" in (error.value.fix or "")


def test_a_folder_without_a_model_is_refused_with_cause_and_fix(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"hello": 1}))
    with pytest.raises(UserError, match="cannot be loaded") as error:
        quiet(TEXTS, TextConfig(str(tmp_path)))
    assert error.value.cause and "config.json" in (error.value.fix or "")


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_bert: Path):
    with pytest.raises(UserError, match="at most 128") as error:
        quiet(TEXTS, TextConfig(str(tiny_bert), max_tokens=129))
    assert error.value.fix == "use max_tokens=128"


@pytest.mark.parametrize("wrong", [{"pooling": "max"}, {"batch_size": 0}, {"max_tokens": 2}])
def test_a_config_out_of_range_is_refused(wrong: dict):
    with pytest.raises(UserError, match=next(iter(wrong))):
        TextConfig(**wrong)


def test_minilm_without_its_package_becomes_the_hub_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_text_model("minilm") == MINILM_HUB
    assert resolve_text_model("bert-base-uncased") == "bert-base-uncased"


@needs_minilm
def test_minilm_puts_related_sentences_closer_than_unrelated_ones():
    texts = [
        "a moisturizing shampoo for dry hair",
        "conditioner that hydrates brittle hair",
        "a guide dog crosses the railway line",
    ]
    vectors = quiet(texts, TextConfig("minilm", "mean")).values  # [3, 384]
    related, unrelated, other = (
        torch.cosine_similarity(vectors[i], vectors[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert vectors.shape == (3, 384)
    assert related > 0.5 > 0.2 > max(unrelated, other)
