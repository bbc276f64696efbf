"""Settings that a later stage would refuse are refused before the first stage. Unusual data sets train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, T5Config

from cemg.commands import recommend, train
from cemg.config import load_config
from cemg.data import read_dataset
from cemg.errors import UserError
from cemg.pipeline import Pipeline
from cemg.storage.run import Run
from cemg_kernels.trie.arrays import MAX_LEVELS

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")
Shop = Callable[..., Path]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """``shop(users=4, items=6, text=...)``: orders.csv, where each user buys every item in an order of their
    own, and items.csv with the text of each item."""

    def make(
        *, users: int = 4, items: int = 6, text: Callable[[int], str] = lambda n: f"music {chr(97 + n)}"
    ) -> Path:
        rows = [(u, (u * 5 + n) % items, n) for u in range(users) for n in range(items)]
        orders = "".join(f"u{u},i{i},{t}\n" for u, i, t in rows)
        (tmp_path / "orders.csv").write_text("user,item,timestamp\n" + orders)
        titles = "".join(f"i{n},{text(n)},i{n}.png\n" for n in range(items))
        (tmp_path / "items.csv").write_text("item,title,image\n" + titles)
        return tmp_path / "orders.csv"

    return make


@pytest.fixture
def run_of(tiny_settings: list[str], tmp_path: Path, feature_cache: Path):
    """``run_of(orders, *overrides)``: the pipeline of a tiny run on these data."""

    def make(orders: Path, *overrides: str) -> Pipeline:
        own = [setting for setting in tiny_settings if not setting.startswith("data.")]
        config = load_config(None, [*own, "data.min_count=0", *overrides], data_path=str(orders))
        return Pipeline(Run(tmp_path / "run"), config, cache=feature_cache)

    return make


def checkpoint(folder: Path, config: GPT2Config | LlamaConfig | T5Config, *, weights: bool = True) -> Path:
    config.save_pretrained(folder)
    if weights:
        (folder / "model.safetensors").touch()  # which is not opened before the stage that needs it
    return folder


GPT2 = GPT2Config(n_positions=16, n_embd=8, n_head=2, n_layer=1, vocab_size=20)
LLAMA = LlamaConfig(
    hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=20, intermediate_size=8
)
T5 = T5Config(d_model=8, num_heads=2, num_layers=1, vocab_size=20, d_kv=4, d_ff=8)
CAUSAL = "backbone.kind=causal"
IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "more items than semantic IDs": (
        ["tokenizer.levels=1", "tokenizer.codebook_size=5"],
        "6 items do not fit 1 levels of 5 codes",
    ),
    "more items than semantic IDs with a suffix": (
        ["tokenizer.levels=1", "tokenizer.codebook_size=2", "tokenizer.unique=suffix"],
        "6 items do not fit 2 levels",
    ),
    "too many levels with a suffix": (
        [f"tokenizer.levels={MAX_LEVELS}", "tokenizer.unique=suffix"],
        "the limit is",
    ),
    "nothing left": (["without=[collab, image, text]"], "no features are left for the semantic IDs"),
    "heads of an odd width": (
        ["backbone.architecture=llama", "backbone.dim=18", "backbone.heads=2"],
        "make heads of 9, which is odd",
    ),
    "an unknown image backbone": (["image.backbone=resnet51"], "unknown image backbone 'resnet51'"),
    "image weights that do not exist": (
        ["image.weights=none.pt"],
        "none.pt is not a readable checkpoint",
    ),
    "a text model that does not exist": (
        ["text.model=TMP/none"],
        "the text model 'TMP/none' cannot be loaded",
    ),
    "texts longer than the model": (["text.max_tokens=4096"], "max_tokens is 4096"),
    "a backbone that does not exist": (
        [CAUSAL, "backbone.pretrained=TMP/none"],
        "cannot be loaded as a hub name",
    ),
    "a backbone without weights": ([CAUSAL, "backbone.pretrained=TMP/bare"], "has no weights"),
    "an encoder-decoder as a decoder": (
        [CAUSAL, "backbone.pretrained=TMP/t5"],
        "is not a decoder-only language model",
    ),
    "a decoder as an encoder-decoder": (
        ["backbone.kind=t5", "backbone.pretrained=TMP/gpt2"],
        "is not an encoder-decoder",
    ),
    "too few positions": (
        [CAUSAL, "backbone.pretrained=TMP/gpt2"],
        "prompts of 22 tokens do not fit the 16 positions",
    ),
    "an instruction without a tokenizer": (
        [CAUSAL, "backbone.pretrained=TMP/llama", "backbone.instruction=Next"],
        "backbone.instruction needs a tokenizer",
    ),
    "a GGUF file that does not exist": (
        [CAUSAL, "backbone.pretrained=TMP/llama", "backbone.gguf_file=none.gguf"],
        "cannot be loaded as a folder",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_setting_is_refused_before_the_first_stage(name, shop, run_of, tmp_path):
    overrides, reason = IMPOSSIBLE[name]
    for folder, config in (("gpt2", GPT2), ("llama", LLAMA), ("t5", T5)):
        checkpoint(tmp_path / folder, config)
    checkpoint(tmp_path / "bare", LLAMA, weights=False)
    orders = shop()
    for n in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"i{n}.png")
    pipeline = run_of(orders, *(setting.replace("TMP", str(tmp_path)) for setting in overrides))
    with pytest.raises(UserError) as refused:
        pipeline.train()
    assert reason.replace("TMP", str(tmp_path)) in str(refused.value)
    assert not (tmp_path / "run" / "data").exists()


def test_compatible_settings_pass_without_loading_weights(shop, run_of, tmp_path):
    folder = checkpoint(tmp_path / "llama", LLAMA)
    pipeline = run_of(shop(), CAUSAL, f"backbone.pretrained={folder}")
    pipeline.data()
    assert (tmp_path / "run" / "data" / "manifest.json").is_file()


def test_a_model_is_not_needed_again_after_the_stage_that_used_it(shop, run_of, tmp_path, tiny_text_model):
    orders = shop()
    moved = tmp_path / "text"
    moved.symlink_to(tiny_text_model)
    pipeline = run_of(orders, f"text.model={moved}")
    pipeline.data()
    pipeline.features()
    moved.unlink()
    run_of(orders, f"text.model={moved}").data()
    with pytest.raises(UserError, match="cannot be loaded"):
        run_of(orders, f"text.model={moved}", "text.max_tokens=64").data()


def test_a_data_set_whose_images_were_moved_is_refused(shop, run_of, tmp_path):
    orders, inside = shop(), tmp_path / "prepared" / "images"
    inside.mkdir(parents=True)
    for n in range(6):
        Image.new("RGB", (8, 8), (40 * n, 0, 0)).save((inside if n < 2 else tmp_path) / f"i{n}.png")
    data = read_dataset(orders, min_count=0)
    data.images[:2] = [inside / f"i{n}.png" for n in range(2)]
    data.save(tmp_path / "prepared")
    (tmp_path / "prepared").rename(tmp_path / "moved")  # with the images inside
    run_of(tmp_path / "moved", "data.min_count=null").data()
    for n in range(2, 6):
        (tmp_path / f"i{n}.png").unlink()
    with pytest.raises(UserError, match="4 of the 6 images of"):
        run_of(tmp_path / "moved", "data.min_count=null").data()
    run_of(tmp_path / "moved", "data.min_count=null", "without=[image]").data()


def test_a_text_shared_by_all_items_is_left_out_with_a_note(shop, run_of, tmp_path, capsys):
    pipeline = run_of(shop(text=lambda n: "music"))
    pipeline.data()
    pipeline.features()
    made = load_file(tmp_path / "run" / "features" / "features.safetensors")
    assert not made["text_present"].any() and made["text"].isfinite().all()
    assert "text: the features of all 6 items are identical, so they are not used" in capsys.readouterr().err


@pytest.mark.parametrize("whiten", ["false", "true"])
def test_two_different_texts_give_one_component_without_noise(shop, run_of, tmp_path, whiten):
    pipeline = run_of(shop(text=lambda n: ("music", "garden")[n % 2]), f"pca.whiten={whiten}")
    pipeline.data()
    pipeline.features()
    text = load_file(tmp_path / "run" / "features" / "features.safetensors")["text"]
    assert text.shape == (6, 1) and text.isfinite().all()
    assert torch.equal(text[0], text[2]) and not torch.equal(text[0], text[1])


ODD_SETS: dict[str, tuple[dict, list[str]]] = {
    "three users, three items": ({"users": 3, "items": 3}, []),
    "one user": ({"users": 1, "items": 5}, []),
    "one text for all": ({"text": lambda n: "music"}, []),
    "one text for all, without text": ({"text": lambda n: "music"}, ["without=[text]"]),
    "one text for all, without the graph": ({"text": lambda n: "abc"[n % 2]}, ["without=[collab]"]),
    "no text at all": ({"text": lambda n: ""}, []),
    "one item with a text": ({"text": lambda n: "" if n else "music"}, []),
    "one item without a text": (
        {"text": lambda n: "" if n == 2 else f"music {chr(97 + n)}"},
        ["pca.whiten=true"],
    ),
    "one item without any modality": (
        {"text": lambda n: "" if n == 2 else f"music {chr(97 + n)}"},
        ["without=[collab, image]"],
    ),
    "more components than items": ({}, ["pca.dim=512"]),
    "as many items as semantic IDs": ({"items": 8}, ["tokenizer.levels=1", "tokenizer.codebook_size=8"]),
    "a t5": ({}, ["backbone.kind=t5"]),
    "a llama": ({}, ["backbone.architecture=llama"]),
    "more beams than items": ({}, ["decoding.beams=500", "decoding.validation_beams=500"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_SETS)
def test_an_unusual_data_set_trains_and_recommends(
    name, shop, tiny_settings, tmp_path, feature_cache, command, capsys
):
    about, overrides = ODD_SETS[name]
    orders = shop(**about)
    run = tmp_path / "run"
    own = [s for s in tiny_settings if not s.startswith(("data.", "generator.epochs"))]
    settings = [*own, "data.min_count=0", "generator.epochs=1", "generator.validate_every=1", *overrides]
    words = [part for setting in settings for part in ("--set", setting)]
    assert command(train.main, "--run", run, "--interactions", orders, "--cache", feature_cache, *words) == 0
    capsys.readouterr()
    assert command(recommend.main, "--run", run, "--history", "i0", "--top", 3, "--beams", 8, "--json") == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert len(items) == 3 and all(item["score"] > -1e9 for item in items)


def test_without_sizes_the_number_of_items_chooses_a_preset(shop, tmp_path, command, capsys):
    run, orders = tmp_path / "run", shop()
    words = ["--run", run, "--interactions", orders, "--set", "data.min_count=0", "--dry-run"]
    assert command(train.main, *words) == 0
    assert "6 items: --preset small" in capsys.readouterr().err
    assert command(train.main, *words, "--preset", "medium") == 0
    assert "--preset" not in capsys.readouterr().err


def test_a_setting_overrides_the_chosen_preset_and_a_run_of_the_plain_defaults_keeps_them(
    shop, tmp_path, tiny_settings, feature_cache, command, capsys
):
    run, orders = tmp_path / "run", shop()
    own = [s for s in tiny_settings if not s.startswith(("data.", "generator.epochs"))]
    overrides = [*own, "data.min_count=0", "generator.epochs=1", "generator.validate_every=1"]
    plain = load_config(None, overrides, data_path=str(orders))
    Pipeline(Run(run), plain, cache=feature_cache).train()
    words = [part for setting in overrides for part in ("--set", setting)]
    words += ["--interactions", orders, "--cache", feature_cache]
    assert command(train.main, "--run", run, *words, "--dry-run") == 0
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == {"reused"}
    assert command(train.main, "--run", tmp_path / "new", *words) == 0
    sized = load_config(tmp_path / "new" / "config.yaml", of_run=True)
    assert sized == load_config(None, overrides, data_path=str(orders), preset="small") != plain
