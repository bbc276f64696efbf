"""The memory is a stage of its own: an old run gains it and keeps its generator; wrong files are refused."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from cemg.artifacts import RunArtifacts
from cemg.commands import train
from cemg.config import generator_of
from cemg.errors import DamagedError, UserError
from cemg.memory import MEMORY_FILE, TEXTS_FILE
from cemg.storage.read import digest
from cemg.tokenizer import Catalog


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def made_by_an_earlier_version(run: Path) -> None:
    """Removes the memory, the gate and their settings, and signs the settings as they were."""
    for stage in ("memory", "gate"):
        shutil.rmtree(run / stage)
    path = run / "config.yaml"
    generator = generator_of(path)
    tree = yaml.safe_load(path.read_text())
    del tree["memory"], tree["gate"]
    head = f"# cemg-train wrote these settings: sha256 {digest([tree, generator])}, generator {generator}\n"
    path.write_text(head + yaml.safe_dump(tree, sort_keys=False))


def test_the_memory_of_a_run_knows_its_items_and_its_training_histories(tiny_run: Path) -> None:
    artifacts = RunArtifacts.open(tiny_run)
    memory, data = artifacts.load_memory(), artifacts.load_data()
    assert artifacts.has_memory() and memory.num_items == data.num_items
    train = data.split().train
    assert int(memory.counts.sum()) == sum(map(len, train))
    assert all(memory.knows(history) for history in train if len(history))


def test_a_run_without_a_memory_opens_and_the_printed_command_builds_only_memory_and_gate(
    run: Path, command, capsys
) -> None:
    before = RunArtifacts.open(run).load_memory()
    made_by_an_earlier_version(run)
    artifacts = RunArtifacts.open(run)
    assert not artifacts.has_memory()
    with pytest.raises(UserError, match="has no item memory") as caught:
        artifacts.load_memory()
    assert caught.value.fix == f"build it, and keep all other stages: cemg-train --run {run}"
    weights = (run / "generator" / "weights.safetensors").stat()
    capsys.readouterr()
    assert command(train.main, "--run", run, "--dry-run") == 0
    said = capsys.readouterr()
    assert "memory     built: it does not exist yet" in said.out and "--force" not in said.err
    assert said.out.count("reused") == 6
    assert command(train.main, "--run", run) == 0
    after = (run / "generator" / "weights.safetensors").stat()
    assert (after.st_mtime_ns, after.st_ino) == (weights.st_mtime_ns, weights.st_ino)
    built = RunArtifacts.open(run).load_memory()
    assert built.constants == before.constants
    assert built.scores([1, 2])[1].tolist() == before.scores([1, 2])[1].tolist()


@pytest.mark.parametrize(("name", "damage"), [(MEMORY_FILE, b"torn"), (TEXTS_FILE, None)])
def test_a_damaged_memory_is_refused_by_name_and_rebuilt_alone(run: Path, command, name, damage) -> None:
    path = run / "memory" / name
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(DamagedError, match=name) as caught:
        RunArtifacts.open(run).load_memory()
    assert caught.value.fix == f"cemg-train --run {run} --rebuild"
    weights = (run / "generator" / "weights.safetensors").stat().st_mtime_ns
    assert command(train.main, "--run", run, "--rebuild") == 0
    assert RunArtifacts.open(run).load_memory().num_items == 50
    assert (run / "generator" / "weights.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize("stage", ["memory", "graph"])
def test_a_deleted_stage_is_named_and_the_printed_command_builds_it_alone(
    run: Path, command, stage: str
) -> None:
    files = [path for path in run.glob("*/*") if path.parent.name != stage and path.suffix == ".safetensors"]
    before = [path.stat().st_mtime_ns for path in files]
    shutil.rmtree(run / stage)
    with pytest.raises(UserError, match=f"the {stage} of {run} is missing") as caught:
        RunArtifacts.open(run)
    assert caught.value.fix is not None and "between two trainings" not in str(caught.value)
    prefix, _, words = caught.value.fix.partition(": ")
    assert prefix == "restore it from a copy, or build it again"
    name, *rest = shlex.split(words)
    assert name == "cemg-train" and command(train.main, *rest) == 0
    assert RunArtifacts.open(run).load_memory().num_items == 50
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_memory_of_another_catalog_is_refused(run: Path) -> None:
    artifacts = RunArtifacts.open(run)
    catalog = artifacts.load_catalog()
    other = Catalog.from_codes(catalog.codes, catalog.codebook_size, [*map(str, catalog.item_ids[::-1])])
    with pytest.raises(UserError, match="this memory does not belong to the catalog") as caught:
        artifacts.load_memory(other)
    assert caught.value.fix == f"build the memory of this catalog: cemg-train --run {run} --rebuild"


def test_a_memory_copied_from_a_run_of_other_data_is_refused(
    run: Path, tmp_path: Path, tiny_settings, feature_cache, command
) -> None:
    from cemg.config import load_config
    from cemg.pipeline import Pipeline
    from cemg.storage.run import Run

    config = load_config(None, [*tiny_settings, "data.synthetic_users=41"])
    other = Pipeline(Run(tmp_path / "other"), config, cache=feature_cache)
    other.data()
    other.memory()
    for stage in ("memory", "gate"):
        shutil.rmtree(run / stage)
    shutil.copytree(tmp_path / "other" / "memory", run / "memory")
    with pytest.raises(UserError, match="is between two trainings") as caught:
        RunArtifacts.open(run)
    assert caught.value.cause == "its memory was not built from the data that is there now"
