"""The pipeline on a tiny synthetic data set: reused stages, rebuilt stages, and kills in any stage."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cemg.commands import train
from cemg.config import load_config
from cemg.errors import UserError
from cemg.evaluation.ranker import beam_ranker
from cemg.pipeline import Pipeline
from cemg.progress import StageLog
from cemg.recommender import Recommender
from cemg.storage.manifest import Manifest, describe
from cemg.storage.run import Run
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, use_fast_kernels

STAGES = ("data", "features", "graph", "memory", "tokenizer", "catalog", "generator", "gate")
pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which the test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def pipeline(feature_cache: Path):
    """``pipeline(folder, *overrides)`` opens a run with its own configuration and some overrides."""

    def make(folder: Path, *overrides: str) -> Pipeline:
        return Pipeline(Run(folder), load_config(folder / "config.yaml", overrides), cache=feature_cache)

    return make


def finish_again(stage: Path) -> None:
    """Writes the manifest that the stage would have if it had been built with its current files."""
    old = Manifest.read(stage)
    inputs = {name: Manifest.read(stage.parent / name) for name in old.inputs}
    about = describe(stage, key=old.key, config=old.config, seconds=old.seconds, made_of=inputs)
    (stage / "manifest.json").write_text(json.dumps(about))


def stamps(run: Path) -> dict[str, int]:
    return {stage: (run / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}


def made_anew(run: Path, pipeline: Pipeline) -> set[str]:
    before = stamps(run)
    pipeline.train()
    after = stamps(run)
    return {stage for stage in STAGES if before[stage] != after[stage]}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "generator" / "weights.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert Catalog.load(one / "catalog").codes.tolist() == Catalog.load(other / "catalog").codes.tolist()
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_finished_generator_keeps_no_checkpoint(tiny_run):
    kept = {path.name for path in (tiny_run / "generator").iterdir()}
    assert "weights.safetensors" in kept and "checkpoints" not in kept


def test_repeating_a_command_reuses_every_stage(copy, pipeline):
    assert made_anew(copy, pipeline(copy)) == set()


@pytest.mark.parametrize(
    "override, anew",
    [
        ("generator.epochs=1", {"generator", "gate"}),
        ("decoding.beams=7", set()),  # of the test, not of the training
        ("decoding.batch_size=9", set()),
        ("generator.checkpoint_seconds=100", set()),
        ("graph.epochs=1", {"graph", "tokenizer", "catalog", "generator", "gate"}),
        ("without=[text]", {"tokenizer", "catalog", "generator", "gate"}),
        ("memory.window=3", {"memory", "gate"}),
        ("gate.users=7", {"gate"}),
    ],
)
def test_a_changed_setting_rebuilds_its_stage_and_the_stages_after_it(copy, pipeline, override, anew):
    assert made_anew(copy, pipeline(copy, override)) == anew


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_died_in_a_stage_ends_with_the_results_of_an_uninterrupted_one(
    tiny_run, copy, pipeline, monkeypatch, stage
):
    for name in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(copy / name)
    build = getattr(Pipeline, f"_build_{stage}", None)

    def dies(self: Pipeline, folder: Path) -> None:
        build(self, folder)
        (folder / "manifest.json.part").write_text("torn")
        raise KeyboardInterrupt

    if build is not None:  # the data are read before their stage, which only writes them
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Pipeline, f"_build_{stage}", dies)
            pipeline(copy).train()
        assert not (copy / stage).exists()
    pipeline(copy).train()
    assert_same_run(copy, tiny_run)


def test_a_generator_training_that_died_resumes_and_ends_with_the_same_weights(
    tiny_run, copy, pipeline, monkeypatch
):
    shutil.rmtree(copy / "generator")
    steps = [0]

    def dying(self, step: int, values: dict[str, float]) -> None:
        steps[0] += 1
        if steps[0] == 14:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cemg.progress.StageLog.__call__", dying)
        pipeline(copy).train()
    assert (copy / ".generator.part" / "checkpoints" / "checkpoint.safetensors").is_file()
    pipeline(copy).train()
    lines = (copy / "generator" / "log.jsonl").read_text().splitlines()
    assert min(json.loads(line)["step"] for line in lines) > 5  # not from the start
    assert_same_run(copy, tiny_run)


def test_the_reference_backends_train_to_the_same_codes_and_losses(tiny_run, copy, pipeline):
    for stage in ("tokenizer", "catalog", "generator", "gate"):
        shutil.rmtree(copy / stage)
    use_fast_kernels(False)
    try:
        pipeline(copy).train()
    finally:
        use_fast_kernels(None)
    assert Catalog.load(copy / "catalog").codes.tolist() == Catalog.load(tiny_run / "catalog").codes.tolist()
    mine, theirs = (
        [json.loads(line) for line in (run / "generator" / "log.jsonl").read_text().splitlines()]
        for run in (copy, tiny_run)
    )
    losses = [line["generator/loss"] for line in mine if "generator/loss" in line]
    assert len(losses) > 10
    assert losses == pytest.approx(
        [line["generator/loss"] for line in theirs if "generator/loss" in line], abs=1e-4
    )


def test_a_stage_that_restarts_also_restarts_its_log(copy, pipeline, monkeypatch):
    whole = (copy / "tokenizer" / "log.jsonl").read_text()
    shutil.rmtree(copy / "tokenizer")

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cemg.tokenizer.Tokenizer.save", dies)
        pipeline(copy).train()
    pipeline(copy).train()
    assert (copy / "tokenizer" / "log.jsonl").read_text() == whole


def test_a_catalog_of_another_shape_is_refused_with_both_shapes(copy, pipeline):
    old = Catalog.load(copy / "catalog")
    longer = torch.cat((old.codes, torch.zeros(len(old), 1, dtype=torch.int64)), dim=1)
    Catalog.from_codes(longer, 8, old.item_ids).save(copy / "catalog")
    finish_again(copy / "catalog")
    with pytest.raises(UserError) as error:
        pipeline(copy).load_generator()
    assert error.value.lines() == [
        "this catalog does not belong to the generator",
        f"  cause: {copy}/generator was trained on 3 levels of 8 codes; {copy}/catalog has 4 levels of 8",
        f"  fix:   train a generator on that catalog: cemg-train --run {copy}",
    ]


@pytest.mark.parametrize(
    "override, dies_in",
    [
        ("data.synthetic_users=30", "features"),
        ("pca.dim=4", "tokenizer"),
        ("tokenizer.epochs=1", "generator"),
    ],
)
def test_a_run_whose_retraining_is_interrupted_recommends_as_before(
    tiny_run, copy, pipeline, monkeypatch, override, dies_in
):
    history = [["item-0003", "item-0004"]]
    before = Recommender.from_run(tiny_run).recommend(history)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pipeline, dies_in, lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        pipeline(copy, override).train()
    after = Recommender.from_run(copy).recommend(history)
    assert torch.equal(before.items, after.items) and torch.equal(before.scores, after.scores)
    assert (copy / ".config.next.yaml").is_file() and (copy / ".next").is_dir()
    pipeline(copy, override).train()
    assert not (copy / ".config.next.yaml").exists() and not (copy / ".next").exists()
    trained = Recommender.from_run(copy).artifacts.config
    assert trained == load_config(tiny_run / "config.yaml", [override]).seeded()


def test_stages_of_two_trainings_are_refused(tiny_run, copy, pipeline):
    """They have the same shapes, so nothing else would show that the parts do not belong together."""
    pipeline(copy, "tokenizer.epochs=1").train()
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(tiny_run / "tokenizer", copy / "tokenizer")
    with pytest.raises(UserError, match="is between two trainings") as error:
        Recommender.from_run(copy)
    assert error.value.cause == "its catalog was not built from the tokenizer that is there now"
    pipeline(copy, "tokenizer.epochs=1").train()
    Recommender.from_run(copy)


def test_a_rebuilt_catalog_with_other_codes_retrains_the_generator(copy, pipeline):
    """This happens on a GPU, where training the tokenizer is not deterministic."""
    catalog = Catalog.load(copy / "catalog")
    Catalog.from_codes(catalog.codes.flip(0), catalog.codebook_size, catalog.item_ids).save(copy / "catalog")
    finish_again(copy / "catalog")
    assert made_anew(copy, pipeline(copy)) == {"generator", "gate"}


def test_an_invalid_configuration_is_not_resumed(copy, pipeline):
    kept = (copy / "config.yaml").read_text()
    with pytest.raises(UserError):
        pipeline(copy, "text.model=no/such-model").train()
    assert not (copy / ".config.next.yaml").exists() and (copy / "config.yaml").read_text() == kept


def test_both_engines_rank_the_validation_users_alike(tiny_run, pipeline):
    made = pipeline(tiny_run)
    catalog, split = made.load_catalog(), made.load_data().split()
    model, vocabulary = made.load_generator()
    histories = split.histories("valid")[:12]
    lists = [
        beam_ranker(made, model, vocabulary, catalog, beams=20, engine=engine)(histories, 10)
        for engine in ("cemg", "transformers")
    ]
    assert torch.equal(*lists)


# ---- the recommender


def test_recommendations_are_distinct_items_with_descending_scores(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    known = recommender.catalog.item_ids
    found = recommender.recommend([[known[3]], [known[4], known[5]], known[:30]], top=10, beams=20)
    assert found.items.shape == found.scores.shape == (3, 10) and found.codes.shape == (3, 10, 3)
    for row, names in zip(found.items.tolist(), recommender.item_ids(found), strict=True):
        assert len(set(row)) == 10 and names == [known[i] for i in row]
    assert bool((found.scores.diff(dim=1) <= 0).all())


def test_excluding_the_history_leaves_no_gaps_in_the_list(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    history = recommender.item_ids(recommender.recommend([["item-0001"]], top=3))[0]
    kept = recommender.recommend([history], top=50, beams=50)
    without = recommender.recommend([history], top=50, beams=50, exclude_history=True)
    expected = [i for i in recommender.item_ids(kept)[0] if i not in history]
    assert recommender.item_ids(without)[0] == expected + [None] * 3
    assert int(kept.certified) == 50 and int(without.certified) == 47


def test_excluding_a_history_as_long_as_the_beam_still_fills_the_list(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    histories = [row[:n] for row, n in zip(tastes(recommender), (10, 3), strict=True)]
    without = recommender.recommend(histories, top=10, beams=10, exclude_history=True, exact=True)
    for row, (history, names) in enumerate(zip(histories, recommender.item_ids(without), strict=True)):
        ranking = recommender.item_ids(recommender.recommend([history], top=50, beams=50))[0]
        assert names == [i for i in ranking if i not in history][:10]
        assert int(without.certified[row]) == 10


def tastes(recommender: Recommender) -> list[list[str]]:
    """The full ranking of the items for two histories of one item."""
    found = recommender.recommend([["item-0001"], ["item-0002"]], top=50, beams=50)
    return [[str(name) for name in row] for row in recommender.item_ids(found)]


def test_the_transformers_engine_removes_the_history_from_its_results(tiny_run):
    recommender = Recommender.from_run(tiny_run, engine="transformers")
    history = tastes(recommender)[0][:10]
    kept = recommender.item_ids(recommender.recommend([history], top=10, beams=10))[0]
    without = recommender.item_ids(recommender.recommend([history], top=10, beams=10, exclude_history=True))
    left = [i for i in kept if i not in history]
    assert without[0] == left + [None] * (10 - len(left))


def test_an_exact_list_is_the_start_of_the_full_ranking(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    history = ["item-0001", "item-0004"]
    whole = recommender.recommend([history], top=50, beams=50)
    for excluded in (False, True):
        exact = recommender.recommend([history], top=4, beams=4, exclude_history=excluded, exact=True)
        ranking = [i for i in recommender.item_ids(whole)[0] if not excluded or i not in history]
        assert recommender.item_ids(exact)[0] == ranking[:4] and int(exact.certified) == 4
    with pytest.raises(UserError, match="transformers does not support exact=True"):
        Recommender.from_run(tiny_run, engine="transformers").recommend([history], exact=True)


def test_a_filter_is_applied_by_our_engine_and_refused_by_transformers(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    allowed = ItemFilter.from_items(recommender.catalog.trie, [1, 2, 40])
    found = recommender.recommend([["item-0001"]], top=10, filter=allowed)
    assert sorted(found.items[0].tolist()) == [-1] * 7 + [1, 2, 40]
    with pytest.raises(UserError, match="does not support filter"):
        Recommender.from_run(tiny_run, engine="transformers").recommend([["item-0001"]], filter=allowed)


def test_a_filter_can_be_built_from_item_ids(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    some = ["item-0003", "item-0010", "item-0042"]
    histories = [["item-0001", "item-0002"]]
    admitted = recommender.recommend(histories, top=50, filter=recommender.only(some))
    assert {item for item in recommender.item_ids(admitted)[0] if item} == set(some)
    others = recommender.recommend(histories, top=50, filter=~recommender.only(some))
    assert {item for item in recommender.item_ids(others)[0] if item} == {
        item for item in recommender.catalog.item_ids if item not in some
    }
    with pytest.raises(UserError, match="item 'item-9' is not in the catalog"):
        recommender.only(["item-9"])


def test_each_history_has_its_own_filter_beside_what_it_excludes(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    few = ItemFilter.from_items(recommender.catalog.trie, [1, 2, 40])
    ids = recommender.catalog.item_ids
    histories = [[ids[40], ids[7]], [ids[1]], [ids[3]]]
    found = recommender.recommend(histories, top=47, filter=[few, None, few], exclude_history=True)
    first, second, third = ([i for i in row if i >= 0] for row in found.items.tolist())
    assert sorted(first) == [1, 2] and len(second) == 47 and 1 not in second and sorted(third) == [1, 2, 40]
    plain = recommender.recommend(histories, top=50, filter=[None, None, None])
    assert torch.equal(plain.items, recommender.recommend(histories, top=50).items)
    with pytest.raises(UserError, match="2 filters for 3 histories"):
        recommender.recommend(histories, filter=[few, few])


def test_asking_for_more_results_than_items_leaves_the_last_ranks_empty(tiny_run):
    found = Recommender.from_run(tiny_run).recommend([["item-0001"]], top=60, beams=60)
    assert found.items.shape == (1, 60) and found.codes.shape == (1, 60, 3)
    assert sorted(found.items[0].tolist()) == [-1] * 10 + list(range(50))


def test_new_items_get_codes_of_their_own(tiny_run):
    recommender = Recommender.from_run(tiny_run)
    texts = recommender.artifacts.load_data().texts
    old = next(text for text in texts if text)
    codes = recommender.encode_items([old, old, "a plain telescope"], [None, None, None])
    everything = torch.cat((recommender.catalog.codes, codes))
    assert len(everything.unique(dim=0)) == 53
    with pytest.raises(UserError, match="new item 1 has neither"):
        recommender.encode_items([old, None], [None, None])


def test_wrong_requests_are_refused(tiny_run, tmp_path):
    recommender = Recommender.from_run(tiny_run)
    with pytest.raises(UserError, match="got top=10 and beams=5"):
        recommender.recommend([["item-0001"]], top=10, beams=5)
    with pytest.raises(UserError, match="item 'item-9' is not in the catalog of 50 items"):
        recommender.recommend([["item-9"]])
    assert recommender.recommend([], top=4).items.shape == (0, 4)
    with pytest.raises(UserError, match="unknown engine 'fast'"):
        Recommender.from_run(tiny_run, engine="fast")
    with pytest.raises(UserError, match="is not a run"):
        Recommender.from_run(tmp_path)


def test_the_vllm_engine_names_the_package_to_install_if_it_is_missing(tiny_run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest)
    )
    with pytest.raises(UserError, match=r"engine vllm is not installed\n.*cemg\[vllm\]"):
        Recommender.from_run(tiny_run, engine="vllm")


# ---- kill -9 through the command line


def start(run: Path, cache: Path, settings: list[str]) -> subprocess.Popen:
    arguments = [part for setting in settings for part in ("--set", setting)]
    code = "from cemg.commands.train import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--run", str(run), "--cache", str(cache), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def killed_at(process: subprocess.Popen, *signs: Path) -> bool:
    """Kills the process when one of ``signs`` exists. Returns False if the process ended first."""
    while not any(sign.exists() for sign in signs) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_repeating_a_command_killed_in_two_stages_gives_the_metrics_of_an_uninterrupted_run(
    tmp_path, tiny_settings, feature_cache, command
):
    settings = [*tiny_settings, "tokenizer.epochs=200", "generator.epochs=40"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = [part for setting in settings for part in ("--set", setting)]
    assert command(train.main, "--run", whole, "--cache", feature_cache, *options) == 0
    assert killed_at(start(torn, feature_cache, settings), torn / ".tokenizer.part" / "log.jsonl")
    assert (torn / "graph").is_dir() and not (torn / "tokenizer").exists()
    checkpoint = torn / ".generator.part" / "checkpoints" / "checkpoint.safetensors"
    assert killed_at(start(torn, feature_cache, settings), checkpoint)
    assert not (torn / "generator").exists()
    process = start(torn, feature_cache, settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"tokenizer: reused" in output and b"generator: resumed at step" in output
    assert_same_run(torn, whole)
    name = "synthetic-cemg-test.json"
    one, other = (json.loads((run / "results" / name).read_text()) for run in (torn, whole))
    for key in ("metrics", "metrics_history_removed", "split", "cold"):
        assert one[key] == other[key]


@pytest.mark.slow
def test_repeating_a_command_killed_in_every_stage_gives_the_metrics_of_an_uninterrupted_run(
    tmp_path, tiny_settings, feature_cache
):
    """A stage of milliseconds may finish before the kill arrives; the long stages may not."""
    settings = [*tiny_settings, "graph.epochs=300", "tokenizer.epochs=400", "generator.epochs=40"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    process = start(whole, feature_cache, settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    inside = set()
    for stage in ("data", "features", "graph", "memory", "tokenizer", "catalog", "generator", "gate"):
        part, done = torn / f".{stage}.part", torn / stage
        assert killed_at(start(torn, feature_cache, settings), part, done), stage
        inside |= {stage} if part.exists() and not done.exists() else set()
    assert inside >= {"graph", "tokenizer", "generator"}
    assert killed_at(start(torn, feature_cache, settings), torn / "generator")  # in the test or the report
    process = start(torn, feature_cache, settings)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    assert_same_run(torn, whole)
    one, other = (json.loads((r / "results" / "synthetic-cemg-test.json").read_text()) for r in (torn, whole))
    for key in ("metrics", "metrics_history_removed", "split", "cold"):
        assert one[key] == other[key]
    assert (torn / "report" / "report.html").is_file()


def test_a_run_uses_the_split_of_its_data(tiny_run, pipeline):
    made = pipeline(tiny_run)
    record = json.loads((tiny_run / "results" / "synthetic-cemg-test.json").read_text())
    assert record["split"] == made.load_data().split().fingerprint
    assert record["config"]["generator"] == dataclasses.asdict(made.config.generator)
    assert all(0 <= value <= 1 and np.isfinite(value) for value in record["metrics"].values())


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a dangling link"])
def test_a_log_path_that_is_not_a_file_is_replaced(tmp_path, what):
    path = tmp_path / "log.jsonl"
    {"a pipe": os.mkfifo, "a folder": os.mkdir, "a dangling link": lambda p: p.symlink_to("no")}[what](path)
    with StageLog(tmp_path, resumes=True) as log:
        log(3, {"loss": 0.5})
    assert json.loads(path.read_text()) == {"step": 3, "loss": 0.5}
