"""--memory of cemg-eval and cemg-recommend, and memory= of the recommender."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cemg import Recommender
from cemg.artifacts import RunArtifacts
from cemg.commands import evaluate, recommend, train
from cemg.dense import DenseConfig, DenseRanker, SequenceEncoder
from cemg.errors import UserError
from cemg.mixture import Gate
from cemg_kernels import ItemPrior


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    return Recommender.from_run(tiny_run)


def history_of(run: Path) -> list[str]:
    data = RunArtifacts.open(run).load_data()
    return [data.item_ids[row] for row in data.sequences[0]]


def test_an_evaluation_has_the_generator_the_memory_and_the_mixture_side_by_side(
    tiny_run, tmp_path, command, capsys
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run / "results")
    assert command(evaluate.main, "--run", run, "--result", tmp_path / "r.json") == 0
    printed = capsys.readouterr().out
    names = ("popularity", "cemg", "memory", "cemg-gate")
    assert [f"synthetic-{name}-test" in printed for name in names] == [True] * 4
    assert "- minus memory" in printed and "95 % lower bound" in printed
    record = json.loads((tmp_path / "r.json").read_text())
    memory = json.loads((run / "results" / "synthetic-memory-test.json").read_text())
    compared = record["compared"]
    assert compared["metrics"] == memory["metrics"] and compared["file"] == "synthetic-memory-test.json"
    repeats = Gate.load(run / "gate" / "gate.json").repeats
    without = "metrics_history_removed"
    for ranking, own in (("metrics", "metrics" if repeats else without), (without, without)):
        difference = compared["differences"][ranking]["HR@10"]
        assert difference["mean"] == pytest.approx(record[ranking]["HR@10"] - memory[own]["HR@10"])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert record["config"]["mixture"] == "gate"


def test_the_constant_mixture_is_a_file_of_its_own_and_off_is_the_generator(tiny_run, tmp_path, command):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = json.loads((run / "results" / "synthetic-cemg-test.json").read_text())["metrics"]
    shutil.rmtree(run / "results")
    assert command(evaluate.main, "--run", run, "--memory", "off") == 0
    assert sorted(path.name for path in (run / "results").iterdir()) == [
        "synthetic-cemg-test.json",
        "synthetic-popularity-test.json",
    ]
    assert json.loads((run / "results" / "synthetic-cemg-test.json").read_text())["metrics"] == before
    assert command(evaluate.main, "--run", run, "--memory", "constant") == 0
    assert (run / "results" / "synthetic-cemg-constant-test.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "on"), "--memory must be off, constant or gate, got 'on'"),
        (("--memory", "gate", "--exact"), "--memory gate cannot be combined with"),
        (("--memory", "gate", "--engine", "transformers"), "--memory gate cannot be combined with"),
    ],
)
def test_options_without_a_mixture_are_refused(tiny_run, command, capsys, options, message):
    assert command(evaluate.main, "--run", tiny_run, *options) == 2
    assert message in capsys.readouterr().err


def test_recommendations_of_the_mixture_differ_and_say_what_ranked_them(recommender, tiny_run):
    history = history_of(tiny_run)
    off = recommender.recommend([history, history[:1]], top=8, beams=20, memory="off")
    assert recommender.recommend([history, history[:1]], top=8, beams=20).ranked_by == ["mixture"] * 2
    mixed = recommender.recommend([history, history[:1]], top=8, beams=20, memory="gate")
    constant = recommender.recommend([history, history[:1]], top=8, beams=20, memory="constant")
    assert off.ranked_by == ["generator"] * 2 and mixed.ranked_by == ["mixture"] * 2
    assert mixed.ids != off.ids
    assert constant.ids == mixed.ids  # too few users to fit slopes, so the gate is constant
    unseen = recommender.recommend(history, top=8, beams=20, memory="gate", exclude_history=True)
    assert not set(history) & set(unseen.ids[0])


def test_a_filter_that_leaves_nothing_of_a_prior_leaves_the_generator(tiny_run: Path) -> None:
    recommender = Recommender.from_run(tiny_run)
    one, two = (recommender.catalog.item_ids[row] for row in (5, 7))
    prior = ItemPrior([[one], [one]], [[1.0], [1.0]])
    asked = {"top": 1, "beams": 20, "prior": prior}
    other = recommender.recommend([[one], [two]], filter=~recommender.only([one]), **asked)
    assert other.ranked_by == ["generator"] * 2
    assert recommender.recommend([[one], [two]], exclude_history=True, **asked).ranked_by == [
        "generator",
        "mixture",
    ]
    assert (
        recommender.recommend([[one], []], filter=recommender.only([one]), **asked).ranked_by
        == ["mixture"] * 2
    )


def test_an_empty_history_is_ranked_by_popularity_and_labelled(
    recommender, tiny_run, tmp_path, command, capsys
):
    found = recommender.recommend([[], history_of(tiny_run)], top=5, beams=20, memory="gate")
    assert found.ranked_by == ["popularity", "mixture"]
    counts = RunArtifacts.open(tiny_run).load_memory().counts
    rows = found.items[0].tolist()
    assert [counts[row] for row in rows] == sorted(counts, reverse=True)[:5]
    requests = tmp_path / "requests.jsonl"
    requests.write_text(f'[]\n{json.dumps(history_of(tiny_run))}\n\n{{"user": "u", "history": []}}\n')
    assert command(recommend.main, "--run", tiny_run, "--histories", requests, "--memory", "gate") == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("ranked_by") for line in lines] == ["popularity", "mixture", None, "popularity"]
    assert [item["item"] for item in lines[0]["items"]][:5] == found.ids[0]
    assert lines[2]["error"] == "the history is empty"  # a blank line is no request
    assert command(recommend.main, "--run", tiny_run, "--histories", requests, "--memory", "off") == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("error") for line in lines] == ["the history is empty", None] + [
        "the history is empty"
    ] * 2


@pytest.mark.parametrize("empty", ["", "[]"])
def test_an_empty_history_on_the_command_line_lists_popular_items_or_says_what_does(
    tiny_run, command, capsys, empty
):
    words = ["--run", tiny_run, "--history", empty, "--top", 5]
    assert command(recommend.main, *words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    counts = RunArtifacts.open(tiny_run).load_memory().counts
    rows = RunArtifacts.open(tiny_run).load_catalog().rows_of([row["item"] for row in answer["items"]])
    assert answer["history"] == [] and answer["ranked_by"] == "popularity"
    assert [counts[row] for row in rows] == sorted(counts, reverse=True)[:5]
    assert command(recommend.main, *words) == 0
    assert "there is no history: ranked by popularity" in capsys.readouterr().out
    assert command(recommend.main, *words, "--memory", "off") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the history is empty") and "; --memory gate ranks by popularity" in said


def test_a_run_without_a_gate_or_a_memory_is_refused_and_the_printed_command_adds_them(
    tiny_run, tmp_path, command, capsys
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    history = " ".join(history_of(run))
    shutil.rmtree(run / "gate")
    recommender = Recommender.from_run(run)
    with pytest.raises(UserError, match="has no gate") as caught:
        recommender.recommend(history.split(), memory="gate")
    assert caught.value.fix == f"fit it, and keep all other stages: cemg-train --run {run}"
    shutil.rmtree(run / "memory")
    assert command(evaluate.main, "--run", run, "--memory", "gate") == 2
    assert f"cemg-train --run {run}" in capsys.readouterr().err
    assert command(evaluate.main, "--run", run) == 0  # as before there were gates
    assert "cemg-gate" not in capsys.readouterr().out
    assert command(train.main, "--run", run) == 0
    arguments = ("--run", run, "--history", history, "--memory", "gate", "--json")
    capsys.readouterr()
    assert command(recommend.main, *arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 10


def test_a_gate_without_a_memory_or_of_another_memory_is_refused(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.copytree(run / "memory", tmp_path / "memory")
    shutil.rmtree(run / "memory")
    artifacts = RunArtifacts.open(run, verify=False)
    with pytest.raises(UserError, match="needs the item memory, which is missing") as caught:
        artifacts.load_gate()
    assert caught.value.fix == f"build it, and keep all other stages: cemg-train --run {run}"
    shutil.copytree(tmp_path / "memory", run / "memory")
    path = run / "gate" / "gate.json"
    dataclasses.replace(Gate.load(path), memory="another").save(run / "gate")
    with pytest.raises(UserError, match="was fitted with another item memory") as caught:
        RunArtifacts.open(run, verify=False).load_gate()
    assert caught.value.fix == f"cemg-train --run {run} --rebuild"


def test_a_memory_and_a_prior_or_another_engine_exclude_each_other(recommender, tiny_run):
    history = history_of(tiny_run)
    with pytest.raises(UserError, match="memory=gate and a prior exclude each other"):
        recommender.recommend(history, memory="gate", prior=ItemPrior([history[0]], [1.0]))
    with pytest.raises(UserError, match="memory must be off, constant or gate, got 'on'"):
        recommender.recommend(history, memory="on")
    with pytest.raises(UserError, match="engine=transformers does not support memory=gate"):
        Recommender.from_run(tiny_run, engine="transformers").recommend(history, memory="gate")


def test_a_dry_run_with_changed_settings_of_the_gate_asks_for_no_consent(
    tiny_run: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for setting, needed in (("gate.beams=30", False), ("memory.window=4", True)):
        assert command(train.main, "--run", tiny_run, "--set", setting, "--dry-run") == 0
        out, err = capsys.readouterr()
        assert "gate       built: " in out and ("--force is needed" in err) == needed


def test_a_dense_expert_of_other_data_is_refused_before_a_stage_is_built(
    tmp_path: Path, tiny_run: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = DenseConfig(dim=8, inner=8, blocks=1)
    items = RunArtifacts.open(tiny_run).load_data().num_items
    for count, targets, message in (
        (items + 1, "", f"it was trained on {items + 1} items, this run has {items}"),
        (items, "0" * 64, "other users, items or test targets"),
    ):
        DenseRanker(SequenceEncoder(count, config), config, targets).save(tmp_path / "dense")
        words = [
            "--data",
            tiny_run / "data",
            "--run",
            tmp_path / "new",
            "--set",
            f"gate.dense={tmp_path / 'dense'}",
        ]
        assert command(train.main, *words) == 2
        assert message in capsys.readouterr().err
        assert not list((tmp_path / "new").glob("*/manifest.json"))
    assert command(train.main, *words[:-1], f"gate.dense={tmp_path / 'nowhere'}") == 2
    assert "has no trained SASRec or BSARec" in capsys.readouterr().err
