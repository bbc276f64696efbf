"""A user's work is never replaced without permission: changed settings and data, damage, full disks."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cemg.commands import catalog, evaluate, recommend, train
from cemg.config import RunConfig, load_config
from cemg.data import Dataset
from cemg.pipeline import Pipeline
from cemg.storage.manifest import STAGES, Manifest
from cemg.storage.read import signed
from cemg.storage.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")
Trainer = Callable[..., int]


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def training(command, feature_cache: Path, monkeypatch) -> Trainer:
    """``training(run, *options)``: cemg-train without its test and report, which write beside the stages."""
    monkeypatch.setattr(train, "_test", lambda *_, **__: None)
    return lambda run, *options: command(train.main, "--run", run, "--cache", feature_cache, *options)


@pytest.fixture
def data(tiny_run: Path, tmp_path: Path) -> Path:
    """A prepared folder with the data of the run under another name, and its own images."""
    own = Dataset.load(tiny_run / "data")
    images = tmp_path / "images"
    images.mkdir()
    moved = [Path(shutil.copy(p, images / p.name)) if p else None for p in own.images]
    dataclasses.replace(own, name="shop", synthetic=False, notes=[], images=moved).save(tmp_path / "shop")
    return tmp_path / "shop"


@pytest.fixture(scope="module")
def shop_run(tiny_run: Path, tmp_path_factory, tiny_settings, feature_cache, command) -> tuple[Path, Path]:
    """A prepared folder with images, and a run trained on it."""
    folder = tmp_path_factory.mktemp("shop")
    own = Dataset.load(tiny_run / "data")
    (folder / "images").mkdir()
    moved = [Path(shutil.copy(p, folder / "images" / p.name)) if p else None for p in own.images]
    dataclasses.replace(own, name="shop", synthetic=False, notes=[], images=moved).save(folder / "shop")
    settings = [part for setting in tiny_settings for part in ("--set", setting)]
    arguments = ("--data", folder / "shop", "--run", folder / "run", "--cache", feature_cache, *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_test", lambda *_, **__: None)
        assert command(train.main, *arguments) == 0
    return folder / "shop", folder / "run"


@pytest.fixture
def shop(shop_run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both, which the test may change. The images are in another folder."""
    folder, run = shop_run
    data = Dataset.load(folder)
    (tmp_path / "pictures").mkdir()
    moved = [Path(shutil.copy(p, tmp_path / "pictures" / p.name)) if p else None for p in data.images]
    dataclasses.replace(data, images=moved).save(tmp_path / "shop")
    return tmp_path / "shop", Path(shutil.copytree(run, tmp_path / "run"))


def state(run: Path) -> dict[str, bytes]:
    """The contents of the settings and stage files of a run."""
    names = ("config.yaml", *(stage for stage in STAGES if stage != "gate"), "synthetic")
    paths = [path for name in names for path in [run / name, *(run / name).rglob("*")] if path.is_file()]
    kept = [path for path in paths if path.parent.name != "tensorboard"]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def hidden(run: Path) -> set[str]:
    return {p.name for p in run.rglob(".*")} - {".lock", ".image-hashes.json"}


def error_of(capsys: pytest.CaptureFixture, code: int) -> list[str]:
    """The lines of the error of a command that failed."""
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    return lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :]


# ---- replacing


@pytest.mark.parametrize(
    "options, said",
    [
        (("--seed", 3), "seed: 0 → 3"),
        (("--set", "graph.epochs=4"), "graph.epochs: 3 → 4"),
        (("--without", "text"), 'without: [] → ["text"]'),
        (("--set", "data.synthetic_users=41"), "data.synthetic_users: 40 → 41"),
        (("--set", "decoding.normalize=level"), "decoding.normalize: vocab → level"),
    ],
)
def test_a_finished_run_is_not_retrained_without_permission(copy, training, capsys, options, said):
    before = state(copy)
    lines = error_of(capsys, training(copy, *options))
    assert lines[0] == f"error: {copy} is already trained, and this command would retrain it"
    assert lines[1] == f"  cause: {said}"
    assert lines[2].startswith("  fix:   to replace it: add --force; to keep it: use another --run")
    assert state(copy) == before and hidden(copy) == set()


def test_force_replaces_a_finished_run(copy, training):
    before = state(copy)
    assert training(copy, "--set", "tokenizer.epochs=1", "--force") == 0
    after = state(copy)
    assert hidden(copy) == set() and before.keys() == after.keys()
    changed = {name.split("/")[0] for name in after if before[name] != after[name]}
    assert changed == {"config.yaml", "tokenizer", "catalog", "generator"}


def test_settings_that_retrain_nothing_change_without_a_question(copy, training):
    assert training(copy, "--set", "decoding.beams=7", "--set", "generator.checkpoint_seconds=9") == 0
    assert "beams: 7\n" in (copy / "config.yaml").read_text()


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_the_user_is_asked_and_the_answer_is_followed(
    copy, training, capsys, monkeypatch, answer
):
    questions = []
    monkeypatch.setattr(train.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(train.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(train.typer, "confirm", lambda text, err: questions.append(text) or answer)
    before = state(copy)
    code = training(copy, "--set", "tokenizer.epochs=1")
    assert questions == ["Replace it?"] and code == (0 if answer else 2)
    assert (state(copy) == before) is not answer


def test_without_stdin_no_question_is_asked(copy, training, capsys, monkeypatch):
    monkeypatch.setattr(train.sys, "stdin", None)  # cemg-train … <&-
    assert training(copy, "--set", "tokenizer.epochs=1") == 2
    assert "to replace it: add --force" in capsys.readouterr().err


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def load(run: Path, *overrides: str) -> RunConfig:
    return load_config(run / "config.yaml", overrides)


def test_an_approved_retraining_continues_without_another_question(copy, training, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pipeline, "_build_catalog", killed)
        Pipeline(Run(copy), load(copy, "tokenizer.epochs=1")).train()
    assert training(copy) == 0
    assert "epochs: 1\n" in (copy / "config.yaml").read_text() and hidden(copy) == set()


def test_items_that_were_added_are_named_before_a_retraining_removes_them(
    copy, training, command, capsys, tmp_path
):
    (tmp_path / "new.csv").write_text("item,text\nn1,a plain telescope\n")
    assert command(catalog.main, "add", "--run", copy, "--items", tmp_path / "new.csv") == 0
    assert training(copy) == 0  # reuses the larger catalog
    lines = error_of(capsys, training(copy, "--seed", 3))
    assert lines[1].endswith("; catalog: the 1 items that cemg-catalog added are removed")


@pytest.fixture
def grown(copy, command, tmp_path) -> Path:
    """The run after ``cemg-catalog add`` of one item."""
    (tmp_path / "new.csv").write_text("item,text\nn1,a plain telescope\n")
    assert command(catalog.main, "add", "--run", copy, "--items", tmp_path / "new.csv") == 0
    return copy


@pytest.mark.parametrize("name", ["catalog.json", "catalog.safetensors", "uniqueness.json", "manifest.json"])
def test_a_damaged_catalog_with_added_items_is_not_rebuilt_without_permission(grown, training, capsys, name):
    (grown / "catalog" / name).write_text("{")
    before = state(grown)
    for options in ((), ("--rebuild",)):
        lines = error_of(capsys, training(grown, *options))
        assert lines[0] == f"error: {grown} is damaged" and name in lines[1]
        assert lines[1].endswith("; catalog: the 1 items that cemg-catalog added are removed")
        assert state(grown) == before and hidden(grown) == set()
    fix = lines[2].partition("cemg-train --run ")[2].split()
    assert fix == [str(grown), "--rebuild", "--force"] and training(*fix) == 0
    assert "n1" not in (grown / "catalog" / "catalog.json").read_text()


def test_rebuilding_another_damaged_stage_keeps_the_added_items(grown, training):
    catalog_before = state(grown)["catalog/catalog.json"]
    (grown / "generator" / "vocabulary.json").write_text("{")
    assert training(grown, "--rebuild") == 0
    assert state(grown)["catalog/catalog.json"] == catalog_before


def test_added_items_that_a_retraining_keeps_are_not_reported_as_removed(grown, training, capsys):
    lines = error_of(capsys, training(grown, "--set", "generator.epochs=2"))
    assert lines[1] == "  cause: generator.epochs: 6 → 2"
    assert training(grown, "--set", "generator.epochs=2", "--force") == 0
    assert "n1" in (grown / "catalog" / "catalog.json").read_text()


def test_an_interrupted_retraining_is_not_discarded_without_permission(shop, training, monkeypatch, capsys):
    folder, run = shop
    original = ("--data", folder, "--config", shutil.copy(run / "config.yaml", run.parent / "c.yaml"))

    def interrupted(pipeline: Pipeline) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generator", interrupted)
        assert training(run, "--force", "--set", "seed=7") == 130
    fresh = sorted(path.name for path in (run / ".next").iterdir())
    assert "features" in fresh
    lines = error_of(capsys, training(run, *original))
    assert lines[0] == f"error: {run} has an interrupted retraining, and this command would discard it"
    assert lines[1] == "  cause: the interrupted retraining with seed: 0 → 7"
    fix = f"to continue it: cemg-train --run {run}; to discard it: repeat your command with --force"
    assert lines[2] == f"  fix:   {fix}"
    assert sorted(path.name for path in (run / ".next").iterdir()) == fresh
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generator", interrupted)
        assert training(run) == 130  # continues it
    assert load(run, "seed=7") == load_config(run / ".config.next.yaml")
    before = state(run)
    assert training(run, *original, "--force") == 0
    assert hidden(run) == set() and state(run).keys() == before.keys()
    assert load(run).seed == 0


def test_changed_settings_of_the_gate_need_no_consent_and_keep_the_generator(copy, training):
    before, key = state(copy), Manifest.read(copy / "gate").key
    assert training(copy, "--set", "gate.users=7") == 0
    changed = {name for name, value in state(copy).items() if before.get(name) != value}
    assert changed == {"config.yaml"} and Manifest.read(copy / "gate").key != key
    assert load(copy).gate.users == 7


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_the_range_of_the_random_generators_is_refused(copy, training, capsys, seed):
    lines = error_of(capsys, training(copy, "--seed", seed))
    assert lines[0] == f"error: seed must be from 0 to 4294967295, got {seed}"
    assert training(copy) == 0


def test_settings_that_caused_an_internal_error_are_not_resumed(copy, training, monkeypatch):
    before = state(copy)

    def fails(*_: object) -> None:
        raise ValueError("not a value")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not a value"):
        patch.setattr(Pipeline, "_build_tokenizer", fails)
        training(copy, "--force", "--set", "tokenizer.epochs=1")
    assert not (copy / ".config.next.yaml").exists()
    assert training(copy) == 0 and state(copy) == before


def test_printed_commands_quote_a_run_with_a_space_in_its_name(copy, training, capsys):
    run = copy.rename(copy.with_name("my run"))
    (run / "generator" / "vocabulary.json").write_text("{")
    lines = error_of(capsys, training(run))
    fix = shlex.split(lines[2].partition("cemg-train --run ")[2])
    assert fix == [str(run), "--rebuild"] and training(*fix) == 0


# ---- data


def test_moving_or_touching_images_or_moving_the_data_set_changes_nothing(shop, training):
    folder, run = shop
    before = state(run)
    for path in (folder.parent / "pictures").iterdir():
        os.utime(path, (1, 1))
    assert training(run, "--data", folder, "--config", run / "config.yaml") == 0
    after = state(run)
    assert {name for name in before if before[name] != after[name]} <= {"config.yaml"}
    assert load(run).data.path == str(folder)


def test_images_are_read_from_their_current_folder(shop, training, monkeypatch):
    folder, run = shop
    seen = []
    encode = Pipeline._encode_images
    monkeypatch.setattr(
        Pipeline,
        "_encode_images",
        lambda self, data, scratch: seen.extend(data.images) or encode(self, data, scratch),
    )
    options = ("--data", folder, "--config", run / "config.yaml", "--set", "pca.dim=4", "--force")
    assert training(run, *options) == 0
    assert {p.parent.name for p in seen if p} == {"pictures"}


def test_an_unchanged_image_is_not_read_again(shop, training, monkeypatch):
    folder, run = shop
    arguments = (run, "--data", folder, "--config", run / "config.yaml")
    assert training(*arguments) == 0
    monkeypatch.setattr(
        "cemg.pipeline.changes.read_image_file", lambda path: pytest.fail(f"{path} is read again")
    )
    assert training(*arguments) == 0
    for damaged in (lambda path: path.write_text("{"), os.mkfifo):
        (run / ".image-hashes.json").unlink()
        damaged(run / ".image-hashes.json")
        with pytest.raises(pytest.fail.Exception, match="read again"):
            training(*arguments)


def test_changed_data_are_listed_and_not_trained_on_without_permission(shop, training, capsys):
    folder, run = shop
    data, before = Dataset.load(folder), state(run)
    arguments = ("--data", folder, "--config", run / "config.yaml")

    def refused(changed: Dataset) -> str:
        changed.save(folder)
        lines = error_of(capsys, training(run, *arguments))
        assert lines[0] == f"error: {run} is already trained, and this command would retrain it"
        assert state(run) == before and hidden(run) == set()
        return lines[1].removeprefix("  cause: ")

    longer = [*data.sequences[:-1], data.sequences[-1].repeat(2)]
    texts = ["another text", *data.texts[1:]]
    assert refused(dataclasses.replace(data, sequences=longer)) == "data: 1 of 40 users' histories changed"
    assert refused(dataclasses.replace(data, texts=texts)) == "data: 1 of 50 texts changed"
    assert refused(dataclasses.replace(data, name="toys")) == "data: shop → toys"
    fewer = dataclasses.replace(data, user_ids=data.user_ids[1:], sequences=data.sequences[1:])
    assert refused(fewer) == "data: of 40 users, 1 removed"
    path = next(path for path in data.images if path)
    Image.new("RGB", (8, 8)).save(path)
    assert refused(data) == "data: 1 of 50 images changed"
    path.unlink()
    assert refused(data) == "data: 1 of 50 images changed, 1 of them missing now"


def test_different_data_are_refused_with_the_count_of_shared_items(copy, data, training, capsys):
    before = state(copy)
    lines = error_of(capsys, training(copy, "--data", data))
    assert lines[1].startswith(f"  cause: data: the synthetic set → {data}; ") and state(copy) == before


# ---- state that is missing or damaged


@pytest.mark.parametrize("damage", ["", "{", None])
def test_missing_settings_are_reported_as_damage_and_the_printed_fix_restores_them(
    copy, training, capsys, damage
):
    before = state(copy)
    path = copy / "config.yaml"
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    lines = error_of(capsys, training(copy))
    assert str(copy) in lines[0] and "config.yaml" in lines[0]
    fix = lines[-1].partition("cemg-train --run ")[2].split()
    assert fix == [str(copy), "--rebuild"]
    assert training(*fix) == 0
    assert state(copy) == before


def test_settings_that_no_stage_records_must_be_given_by_the_user(copy, training, capsys, tmp_path):
    before = state(copy)
    shutil.copy(copy / "config.yaml", tmp_path / "c.yaml")
    (copy / "config.yaml").unlink()
    for name in STAGES:
        path = copy / name / "manifest.json"
        about = json.loads(path.read_text())
        about["settings"] = None
        path.write_text(json.dumps(signed(about)))
    lines = error_of(capsys, training(copy))
    assert lines[-1].endswith(f"cemg-train --run {copy} --data DATA --config FILE")
    assert training(copy, "--config", tmp_path / "c.yaml") == 2  # the data are not named
    assert state(copy)["generator/weights.safetensors"] == before["generator/weights.safetensors"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_kill_while_the_data_are_read_loses_no_settings(
    copy, training, tmp_path, tiny_settings, monkeypatch, finished
):
    run = copy if finished else tmp_path / "new"
    asked = load_config(None, [*tiny_settings, "generator.epochs=1"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pipeline, "_read_data", killed)
        Pipeline(Run(run), asked).train()
    assert training(run) == 0
    assert load(run) == asked and hidden(run) == set()


def test_an_invalid_setting_of_a_new_run_is_not_kept(training, tmp_path, capsys):
    run = tmp_path / "new"
    error_of(capsys, training(run, "--data", tmp_path / "typo"))
    assert not (run / ".config.next.yaml").exists()


@pytest.fixture(scope="module")
def other_run(tiny_run: Path, tmp_path_factory, feature_cache, command) -> Path:
    """A finished run with other data, codes and weights."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("other") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_test", lambda *_, **__: None)
        changed = ("--force", "--seed", 3, "--set", "generator.epochs=2", "--cache", feature_cache)
        assert command(train.main, "--run", run, *changed) == 0
    return run


@pytest.mark.parametrize("name", ["data", "features", "graph", "memory", "tokenizer", "catalog", "generator"])
def test_the_printed_fix_rebuilds_a_stage_copied_from_another_run(
    copy, other_run, command, training, capsys, name
):
    before = state(copy)
    shutil.rmtree(copy / name)
    shutil.copytree(other_run / name, copy / name)
    lines = error_of(capsys, command(recommend.main, "--run", copy, "--history", "item-0001"))
    fix = lines[-1].partition("cemg-train --run ")[2].split()
    assert fix == [str(copy), "--rebuild"]
    lines = error_of(capsys, training(copy))
    assert lines[-1].partition("cemg-train --run ")[2].split() == fix
    assert training(*fix) == 0
    after = state(copy)
    differ = {n for n in before if before[n] != after[n]}  # the data name the places of pictures
    assert {n.split("/")[0] for n in differ} <= {"data", name} and hidden(copy) == set()
    for weights in ("generator/weights.safetensors", "catalog/catalog.safetensors"):
        assert after[weights] == before[weights]
    assert command(recommend.main, "--run", copy, "--history", "item-0001") == 0


def test_the_printed_fix_restores_settings_copied_from_another_run(
    copy, other_run, command, training, capsys
):
    before = state(copy)
    shutil.copy(other_run / "config.yaml", copy)
    for call in (
        lambda: command(recommend.main, "--run", copy, "--history", "item-0001"),
        lambda: training(copy),
    ):
        lines = error_of(capsys, call())
        assert lines[0] == f"error: {copy}/config.yaml belongs to another run"
        fix = lines[-1].partition("cemg-train --run ")[2].split()
        assert fix == [str(copy), "--rebuild"]
    assert training(*fix) == 0
    assert state(copy) == before


# ---- leftovers


def test_a_kill_between_the_two_renames_of_earlier_versions_is_recovered(copy, command, training):
    before = state(copy)
    (copy / "catalog").rename(copy / ".catalog.old")
    assert command(recommend.main, "--run", copy, "--history", "item-0001") == 0
    assert state(copy) == before and hidden(copy) == set()
    (copy / "catalog").rename(copy / ".catalog.old")
    assert training(copy) == 0
    assert state(copy) == before and hidden(copy) == set()


def test_leftover_folders_are_removed_and_are_not_stages(copy, command, training, capsys):
    before = state(copy)
    for name in (".catalog.old", ".generator.part"):
        shutil.copytree(copy / "catalog", copy / name)
        (copy / name / "manifest.json").write_text(
            '{"key": "other", "inputs": {"data": "other"}, "seconds": 1}'
        )
    (copy / ".config.yaml.77.part").write_text("")
    assert command(evaluate.main, "--run", copy, "--users", 5) == 0
    assert command(recommend.main, "--run", copy, "--history", "item-0001") == 0
    assert training(copy) == 0
    assert state(copy) == before and hidden(copy) == set()


def test_a_new_run_without_data_is_refused_if_its_name_resembles_an_existing_one(shop, training, capsys):
    _, run = shop
    typo = run.with_name(run.name + "s")
    lines = error_of(capsys, training(typo))
    assert lines[0] == f"error: there is no run {typo}, and a new run needs --data"
    assert lines[2].startswith(f"  fix:   cemg-train --run {run};") and not typo.exists()
