"""A run whose histories have one token per item: training, engines, added and removed items, exports."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg import Recommender
from cemg.artifacts import RunArtifacts
from cemg.commands import catalog, evaluate, train
from cemg.config import RunConfig, keyed, load_config
from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.evaluation import evaluate as evaluate_ranker
from cemg.evaluation.ranker import beam_ranker
from cemg.evaluation.selection import checkpoint_selection
from cemg.generator import Prompter, Vocabulary
from cemg.mixture import MEMORY, SOFTMAX
from cemg.storage.manifest import Manifest

SETTINGS = [
    "generator.item_tokens=true", "generator.item_loss=1.0", "generator.loss=valid", "generator.epochs=2",
    "decoding.normalize=valid", "backbone.architecture=llama", "backbone.tied=false",
]  # fmt: skip
HISTORY = ["item-0003", "item-0001", "item-0007"]


@pytest.fixture(scope="module")
def trained(tiny_run: Path, make_once: Callable[..., Path], command: Callable[..., int]) -> Path:
    def make(folder: Path) -> None:
        run = shutil.copytree(tiny_run, folder / "run")
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        assert command(train.main, "--run", run, "--force", *settings) == 0

    return make_once("item-tokens", make) / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_only_the_generator_is_trained_again_and_its_weights_have_an_embedding_per_item(trained, tiny_run):
    for stage in ("data", "features", "tokenizer", "catalog"):
        assert Manifest.read(trained / stage).key == Manifest.read(tiny_run / stage).key
    vocabulary = json.loads((trained / "generator" / "vocabulary.json").read_text())
    assert vocabulary["items"] == 50
    assert "items" not in json.loads((tiny_run / "generator" / "vocabulary.json").read_text())


def test_settings_of_earlier_versions_have_the_keys_that_they_had():
    assert {"item_tokens", "item_loss"}.isdisjoint(keyed(RunConfig(), "generator"))
    assert "item_tokens" in keyed(load_config(None, SETTINGS), "generator")


def test_the_engines_recommend_the_same(trained: Path):
    found = [
        Recommender.from_run(trained, engine=engine).recommend(HISTORY, top=8, memory="off")
        for engine in ("cemg", "transformers")
    ]
    assert found[0].ids == found[1].ids
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=1e-4, rtol=0)


def test_an_added_item_is_recommended_and_may_be_in_a_history(run: Path, tmp_path: Path, command):
    before = Recommender.from_run(run).recommend(HISTORY, top=50).scores
    (tmp_path / "new.csv").write_text("item,title,text\nn1,First,a plain rudder\n")
    assert command(catalog.main, "add", "--run", run, "--items", tmp_path / "new.csv") == 0
    recommender = Recommender.from_run(run)
    found = recommender.recommend([HISTORY, ["item-0003", "n1"]], top=51, beams=60)
    assert all("n1" in row and None not in row for row in found.ids)
    assert not torch.equal(found.scores[0, :50], before[0])  # a softmax has one more code
    assert not torch.equal(found.scores[0], found.scores[1])


def test_a_removed_item_is_not_in_an_export_and_the_others_keep_their_tokens(run: Path, tmp_path, command):
    assert command(catalog.main, "remove", "--run", run, "--items", "item-0002 item-0004") == 0
    recommender = Recommender.from_run(run)
    found = recommender.recommend(HISTORY, top=8, memory="off")
    recommender.save_pretrained(tmp_path / "checkpoint")
    saved = Decoder.from_pretrained(tmp_path / "checkpoint")
    about = json.loads((tmp_path / "checkpoint" / "cemg_catalog" / "cemg_decoder.json").read_text())
    prompts = about["prompts"]
    items = prompts.pop("history_items")
    assert prompts["items"] == len(saved.catalog) == 48
    prompter = Prompter(Vocabulary(**prompts), saved.catalog.codes, history_items=items, seq2seq=False)
    again = saved.decode(*prompter.batch([np.array(saved.catalog.rows_of(HISTORY))]), 50).top(8)
    # without the removed items, the softmax runs over fewer codes in both
    assert saved.catalog.ids_of(again.items) == found.ids
    torch.testing.assert_close(again.scores, found.scores, atol=1e-5, rtol=0)


def test_a_softmax_over_tokens_of_items_is_refused(trained: Path):
    with pytest.raises(UserError, match="normalize=vocab has no meaning in this run") as caught:
        Recommender.from_run(trained, normalize="vocab")
    assert caught.value.fix == "normalize=valid"
    Recommender.from_run(trained, normalize="valid")
    with pytest.raises(UserError, match=r"cannot be combined with decoding\.normalize=vocab") as caught:
        load_config(None, ["generator.item_tokens=true"])
    fix = [part for part in str(caught.value.fix).split() if "=" in part]
    load_config(None, ["generator.item_tokens=true", *fix])
    with pytest.raises(UserError, match="needs embeddings of items") as caught:
        load_config(None, ["generator.item_loss=1"])
    load_config(None, ["generator.item_loss=1", str(caught.value.fix).removeprefix("--set "), *fix])


def test_the_item_softmax_ranks_the_whole_catalog(trained: Path):
    artifacts = RunArtifacts.open(trained)
    softmax = artifacts.item_softmax().model
    histories = [np.array([3, 1, 7]), np.array([5]), np.array([], dtype=np.int64)]
    items, mass = softmax.prior(histories, top=60)
    assert all(sorted(row) == list(range(50)) for row in items.tolist())
    torch.testing.assert_close(mass.sum(1), torch.ones(3, dtype=torch.float64))
    model, vocabulary = artifacts.load_generator()
    prompter = artifacts.prompter(model, vocabulary, artifacts.load_catalog())
    table = model.get_input_embeddings().weight[vocabulary.item_token_start :]
    for row, history in enumerate(histories):
        state = model.model(input_ids=prompter.prompt(history)[None]).last_hidden_state[0, -1]
        wanted = (table @ state).softmax(0)
        torch.testing.assert_close(mass[row].float(), wanted[items[row]].detach(), atol=1e-6, rtol=1e-4)
    few, part = softmax.prior(histories, top=5)
    assert torch.equal(few, items[:, :5]) and bool((part[:, :-1] >= part[:, 1:]).all())


def test_the_checkpoint_is_selected_by_the_mean_of_the_search_and_the_item_softmax(trained: Path):
    artifacts = RunArtifacts.open(trained)
    split, config = artifacts.load_data().split(), artifacts.config
    selection = checkpoint_selection(split, config)
    assert selection.history == "excluded"
    model, vocabulary = artifacts.load_generator()
    beams = config.decoding.validation_beams
    search = beam_ranker(
        artifacts, model, vocabulary, artifacts.load_catalog(), beams=beams, exclude_history=True
    )
    users = selection.users
    searched = evaluate_ranker(search, split, part="valid", users=users, max_list=beams).metrics
    histories, targets = split.histories("valid"), split.targets("valid")
    gains = []
    for user in users:  # the items by probability, without those of the history
        items = artifacts.item_softmax().model.prior([histories[user]], top=50)[0][0].tolist()
        listed = [item for item in items if item not in histories[user]][:10]
        gains.append(1 / np.log2(listed.index(targets[user]) + 2) if targets[user] in listed else 0.0)
    found = [searched["NDCG@10"], float(np.mean(gains))]
    written = json.loads((trained / "generator" / "training.json").read_text())["validation_ndcg10"]
    assert written == pytest.approx(sum(found) / 2, abs=1e-6) and found[0] != found[1]


def test_the_item_softmax_is_an_expert_of_the_gate(trained: Path, tmp_path: Path, command):
    artifacts = RunArtifacts.open(trained)
    gate = artifacts.load_gate()
    assert gate.sources == ["memory", SOFTMAX] and len(gate.constant) == 3
    names = [source.name for source in artifacts.sources(gate, artifacts.load_memory())]
    assert names == gate.sources
    out = tmp_path / "result.json"
    assert command(evaluate.main, "--run", trained, "--memory", "gate", "--result", out) == 0
    assert json.loads(out.read_text())["metrics"]["HR@10"] > 0


def test_a_gate_without_the_memory_keeps_the_generator_and_its_result_has_another_name(run: Path, command):
    key = Manifest.read(run / "generator").key
    assert command(train.main, "--run", run, "--set", "gate.memory=false") == 0
    assert RunArtifacts.open(run).load_gate().sources == [SOFTMAX]
    assert Manifest.read(run / "generator").key == key
    record = json.loads((run / "results" / "synthetic-cemg-gate-without-memory-test.json").read_text())
    assert record["config"]["experts"] == ["generator", SOFTMAX]
    found = Recommender.from_run(run).recommend([HISTORY, []], top=5, memory="gate")
    assert found.ranked_by == ["mixture", "popularity"] and None not in found.ids[0]


def test_without_another_expert_there_is_no_gate_and_the_printed_fix_brings_it_back(
    tiny_run: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    mixture = run / "results" / "synthetic-cemg-gate-test.json"
    searched = Recommender.from_run(run).recommend([HISTORY], top=5, memory="off").ids
    generator = Manifest.read(run / "generator").key
    mixture.unlink()
    assert command(train.main, "--run", run, "--set", "gate.memory=false") == 0
    found = Recommender.from_run(run).recommend([HISTORY], top=5)
    assert (found.ids, found.ranked_by) == (searched, ["generator"])
    assert not mixture.exists() and Manifest.read(run / "generator").key == generator
    capsys.readouterr()
    assert command(evaluate.main, "--run", run, "--memory", "gate") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "has no gate" in error and "leave the generator without another expert" in error
    (fix,) = re.findall(r"--set (gate\.memory=true)", error)
    assert command(train.main, "--run", run, "--set", fix) == 0
    assert RunArtifacts.open(run).load_gate().sources == [MEMORY] and mixture.exists()
