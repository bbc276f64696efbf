"""TIGER and LETTER are tasks that cemg-train trains: their search and their free beams are collected."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg.config import RunConfig, load_config
from cemg.data.dataset import Dataset
from cemg.experiments import Store, Task, plan, write_experiment_report
from cemg.experiments.work import Options, Source, command_of, run_tasks
from cemg.pipeline import Pipeline
from cemg.settings import config_file
from cemg.storage.read import read_tensors
from cemg.storage.run import Run

NAMES = ("tiger", "letter")
TINY = (
    "pca.dim=8", "tokenizer.codebook_size=8", "tokenizer.hidden=[32]", "tokenizer.latent=8", "graph.dim=8",
    "graph.epochs=3", "tokenizer.dim=16", "tokenizer.epochs=30", "tokenizer.clusters=3", "backbone.layers=1",
    "backbone.dim=32", "backbone.heads=2", "backbone.head_dim=16", "backbone.ff=64", "backbone.dropout=0.0",
    "generator.batch_size=32", "generator.learning_rate=5.0e-3", "generator.epochs=40",
    "generator.validate_every=20", "decoding.beams=10", "decoding.validation_beams=5", "gate.beams=10",
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A ring of 30 items with texts: item i + 1 follows item i."""
    rng = np.random.default_rng(0)
    sequences = [((s + np.arange(6)) % 30).astype(np.int32) for s in rng.integers(30, size=120)]
    ids, items = [str(i) for i in range(120)], range(30)
    texts = [f"{chr(97 + i % 7)} {chr(105 + i % 11)} {chr(97 + i // 2)}" for i in items]
    toy = Dataset("toy", ids, ids[:30], sequences, [""] * 30, list(texts), [None] * 30, "as written")
    toy.save(tmp_path / "toy")
    return tmp_path / "toy"


def options(**changes: object) -> Options:
    return Options(sources={("toy", "leave-one-out"): Source(720, "a" * 64)}, **changes)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("model", NAMES)
def test_the_ring_is_learned_and_free_beams_stand_beside_the_search(
    model: str, source: Path, tmp_path: Path, tiny_text_model: Path
) -> None:
    store = Store(tmp_path / "out")
    (task,) = plan(["rq1"], {"toy": source}, models=[model])
    task = dataclasses.replace(task, settings=(*TINY, f"text.model={tiny_text_model}"))
    assert run_tasks([task], store, options(budget=0.5)) == []
    title = task.title
    found = store.results(task)
    assert set(found) == {title, f"{title}, free beams"} and title == model.upper()
    search, free = found[title], found[f"{title}, free beams"]
    assert search["metrics"]["HR@5"] > 0.5  # 0.17 at random
    assert 0.4 < free["metrics"]["HR@5"] <= search["metrics"]["HR@5"] + 0.05
    assert 0 < free["config"]["share_of_beams_that_are_items"] <= 1
    assert search["config"]["generator"]["budget_hours"] == 0.5 and "stopped" not in search["config"]
    assert search["config"]["without"] == ["collab", "image"]
    codes = json.loads((store.path(task) / "codes.json").read_text())
    assert 0 <= codes["colliding"] <= 1
    page = write_experiment_report(store, [task], ["rq1"]).read_text()
    assert f"{title}, free beams" in page


def test_the_command_has_the_configuration_the_budget_and_the_precision(tmp_path: Path) -> None:
    store = Store(tmp_path)
    task = Task("toy", Path("toy"), "tiger")
    words = command_of(task, store, options(budget=0.25, dtype="bfloat16"))
    for name, value in (("--config", "tiger"), ("--dtype", "bfloat16"), ("--cache", str(store.cache)),
                        ("--set", "generator.budget_hours=0.25"), ("--data", "toy")):  # fmt: skip
        assert words[words.index(name) + 1] == value
    assert "--set" not in command_of(task, store, options())
    about = options(budget=0.25, dtype="bfloat16").identity(task)
    assert (about["budget"], about["dtype"]) == ("0.25 h", "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_an_included_configuration_is_that_of_the_paper(name: str) -> None:
    config = load_config(config_file(Path(name)))
    backbone, tokenizer = config.backbone, config.tokenizer
    shape = (backbone.kind, backbone.layers, backbone.dim, backbone.ff, backbone.heads, backbone.head_dim)
    assert shape == ("t5", 4, 128, 1024, 6, 64) and backbone.dropout == 0.1
    assert config.without == ("collab", "image") and config.generator.loss == "vocab"
    assert (tokenizer.codebook_size, tokenizer.latent) == (256, 32)
    assert not config.generator.item_tokens and not config.generator.item_loss
    if name == "tiger":
        assert (tokenizer.levels, tokenizer.unique, tokenizer.diversity) == (3, "suffix", 0)
        assert tokenizer.collab_loss == 0 and config.generator.schedule == "inverse-sqrt"
    else:
        assert (tokenizer.levels, tokenizer.clusters, config.decoding.beams) == (4, 10, 20)
        assert tokenizer.collab_loss > 0 and tokenizer.diversity > 0
        assert tokenizer.diversity_kind == "clusters" and config.generator.temperature < 1


def test_the_collaborative_embeddings_are_those_of_the_training_split(
    source: Path, tmp_path: Path, tiny_text_model: Path
) -> None:
    data = Dataset.load(source)
    held_out = [np.append(s[:-2], (s[-2:] + 7) % 30).astype(np.int32) for s in data.sequences]
    config = load_config(
        config_file(Path("letter")), [*TINY, f"text.model={tiny_text_model}"], data_path="toy"
    )
    made = []
    for name, one in (("one", data), ("other", dataclasses.replace(data, sequences=held_out))):
        pipeline = Pipeline(Run(tmp_path / name), config, data=one)
        pipeline.data()
        pipeline.graph()
        made.append(read_tensors(tmp_path / name / "graph" / "graph.safetensors")["collab"])
    assert torch.equal(*made) and made[0].shape == (30, 8) and bool(made[0].any())


def test_the_losses_of_letter_can_be_switched_off() -> None:
    off = ["tokenizer.collab_loss=0", "tokenizer.diversity=0", "generator.temperature=1"]
    config = load_config(config_file(Path("letter")), off)
    assert config.generator.temperature == RunConfig().generator.temperature
