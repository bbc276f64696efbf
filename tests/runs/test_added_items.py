"""``cemg-catalog add`` extends the item memory together with the catalog."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cemg import Recommender
from cemg.artifacts import RunArtifacts
from cemg.commands import catalog, evaluate, train
from cemg.errors import UserError
from cemg.memory import MEMORY_FILE, Memory
from cemg.memory.build import build_memory
from cemg.memory.similarity import TextIndex
from cemg.pipeline import Pipeline
from cemg.storage import files
from cemg.storage.manifest import STAGES
from cemg.tokenizer import Catalog

TEXTS = ["a plain telescope", "a sturdy garden rudder"]
ITEMS = 50


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def add(run: Path, tmp_path: Path, command: Callable[..., int]) -> Callable[..., int]:
    """``add(n1="text")`` adds items with these texts."""

    def added(**texts: str) -> int:
        lines = ["item,title,text", *(f"{item},,{text}" for item, text in texts.items())]
        (tmp_path / "new.csv").write_text("\n".join(lines) + "\n")
        return command(catalog.main, "add", "--run", run, "--items", tmp_path / "new.csv")

    return added


def assert_equal(one: Memory, other: Memory) -> None:
    assert one.counts.tolist() == other.counts.tolist()
    for row in range(one.num_items):
        (items, scores), (expected_items, expected) = one.scores([row]), other.scores([row])
        assert items.tolist() == expected_items.tolist()
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def rebuilt(run: Path, texts: list[str]) -> Memory:
    """The memory of a run with further items, built under its constants, words and weights."""
    artifacts = RunArtifacts.open(run)
    data, before = artifacts.load_data(), artifacts.load_memory()
    assert before.similar is not None
    words = before.similar.index
    whole = [*data.texts, *texts]
    index = TextIndex(words.words, words.weights, words.vectors_of(whole))
    return build_memory(
        data.split().train, whole, config=before.config, constants=before.constants, index=index
    )


def test_added_items_are_in_the_memory_as_a_rebuild_has_them(run, tiny_run, add, command, capsys) -> None:
    assert add(n1=TEXTS[0], n2=TEXTS[1]) == 0
    artifacts = RunArtifacts.open(run)
    memory = artifacts.load_memory()
    assert memory.num_items == ITEMS + 2 and artifacts.load_gate().memory
    assert_equal(memory, rebuilt(tiny_run, TEXTS))
    near = memory.scores([ITEMS])[0]
    assert len(near) and all(ITEMS in memory.scores([row])[0] for row in near.tolist() if row < ITEMS)
    assert_equal(memory.first(ITEMS), RunArtifacts.open(tiny_run).load_memory())
    capsys.readouterr()
    assert command(train.main, "--run", run) == 0
    assert capsys.readouterr().err.count(": reused") == 8  # the gate too
    assert RunArtifacts.open(run).load_memory().num_items == ITEMS + 2


def test_the_mixture_recommends_from_and_to_added_items(run, add) -> None:
    add(n1=TEXTS[0], n2=TEXTS[1])
    recommender = Recommender.from_run(run)
    by_memory, alone = (
        recommender.recommend(["n1"], top=50, beams=50, memory=memory).ids[0] for memory in ("gate", "off")
    )
    assert recommender.artifacts.load_memory().knows([ITEMS]) and by_memory != alone
    neighbor = int(recommender.artifacts.load_memory().scores([ITEMS])[0][0])
    (listed,) = recommender.recommend([recommender.catalog.item_ids[neighbor]], top=52, beams=52).ids
    assert "n1" in listed


def test_a_second_addition_and_evaluations_after_it(run, add, command, tmp_path) -> None:
    figures = []
    for number in range(3):
        out = tmp_path / f"{number}.json"
        assert command(evaluate.main, "--run", run, "--model", "memory", "--result", out) == 0
        figures.append(json.loads(out.read_text())["metrics"])
        assert add(**{f"n{number}": TEXTS[number % 2]}) == 0
    assert figures[0] == figures[1] == figures[2]  # the test items are those of the training
    assert RunArtifacts.open(run).load_memory().num_items == ITEMS + 3


def test_a_run_whose_memory_lacks_added_items_works_and_catches_up(run, tiny_run, add) -> None:
    add(n1=TEXTS[0])
    shutil.rmtree(run / "memory")
    shutil.copytree(tiny_run / "memory", run / "memory")  # as an earlier version left it
    recommender = Recommender.from_run(run)
    assert recommender.artifacts.load_memory().num_items == ITEMS
    assert recommender.recommend(["n1", "item-0003"], top=5, memory="gate").ranked_by == ["mixture"]
    assert add(n2=TEXTS[1]) == 0
    memory = RunArtifacts.open(run).load_memory()
    assert memory.num_items == ITEMS + 2 and memory.knows([ITEMS + 1]) and memory.knows([ITEMS])


def test_a_memory_that_is_built_again_has_the_added_items(run, add, command, capsys) -> None:
    add(n1=TEXTS[0])
    add(n2=TEXTS[1])
    before = Memory.load(shutil.copytree(run / "memory", run.parent / "memory"))
    (run / "memory" / MEMORY_FILE).write_bytes(b"damaged")
    capsys.readouterr()
    assert command(train.main, "--run", run, "--rebuild") == 0
    assert capsys.readouterr().err.count(": reused") == 7  # the gate too
    memory = RunArtifacts.open(run).load_memory()
    assert_equal(memory, before)
    assert command(train.main, "--run", run) == 0
    assert capsys.readouterr().err.count(": reused") == 8


def test_items_that_a_new_catalog_does_not_have_leave_the_memory(run, tiny_run, add) -> None:
    add(n1=TEXTS[0])
    shutil.rmtree(run / "catalog")
    shutil.copytree(tiny_run / "catalog", run / "catalog")  # as a training writes it
    assert RunArtifacts.open(run).load_memory().num_items == ITEMS
    assert add(n2=TEXTS[1]) == 0
    assert_equal(RunArtifacts.open(run).load_memory(), rebuilt(tiny_run, [TEXTS[1]]))


def test_a_run_without_a_memory_takes_new_items(run, add) -> None:
    for stage in ("memory", "gate"):
        shutil.rmtree(run / stage)
    assert add(n1=TEXTS[0]) == 0
    assert not RunArtifacts.open(run).has_memory() and len(Catalog.load(run / "catalog")) == ITEMS + 1


def test_a_recommender_that_was_open_before_reads_the_memory_of_its_catalog(run, add) -> None:
    recommender = Recommender.from_run(run)
    before = recommender.recommend(["item-0003"], top=5, memory="off").ids
    add(n1=TEXTS[0])
    found = recommender.recommend(["item-0003"], top=5, memory="gate")  # loads the memory now
    assert found.ranked_by == ["mixture"] and len(recommender.catalog) == ITEMS
    assert recommender.recommend(["item-0003"], top=5, memory="off").ids == before


@pytest.mark.parametrize("fails", ["the memory cannot be written", "the memory is not in place yet"])
def test_an_interrupted_addition_changes_both_or_none(run, add, monkeypatch, fails) -> None:
    expected = ITEMS
    with monkeypatch.context() as patch:
        if fails == "the memory cannot be written":
            patch.setattr(Memory, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        else:
            expected += 1
            move = files.move

            def stop(source: Path, target: Path) -> None:
                if target.name == "memory" and source.parent.name == ".ready":
                    raise OSError(5, "killed")
                move(source, target)

            patch.setattr(files, "move", stop)
        assert add(n1=TEXTS[0]) != 0
        assert (run / ".ready").is_dir() == (expected > ITEMS)
    artifacts = RunArtifacts.open(run)
    assert len(artifacts.load_catalog()) == artifacts.load_memory().num_items == expected
    assert {path.name for path in run.glob(".*")} <= {".lock", ".image-hashes.json"}


def test_a_memory_with_other_added_items_is_refused(run, tmp_path, add) -> None:
    add(n1=TEXTS[0])
    other = shutil.copytree(run / "memory", tmp_path / "memory")
    memory = Memory.load(other)
    memory.record_ids([*RunArtifacts.open(run).load_catalog().item_ids[:-1], "n2"])
    memory.save(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / MEMORY_FILE, run / "memory" / MEMORY_FILE)
    with pytest.raises(UserError, match="this memory does not belong to the catalog"):
        RunArtifacts.open(run, verify=False).load_memory()


def test_a_full_disk_while_items_are_added_keeps_the_catalog(
    run, command, capsys, tmp_path, monkeypatch, fail_disk
):
    (tmp_path / "new.csv").write_text("item,text\nn1,a plain telescope\n")

    def state() -> dict[Path, bytes]:
        files_of = [path for stage in STAGES for path in (run / stage).rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in [run / "config.yaml", *files_of]}

    before = state()
    opened = Recommender.from_run(run)
    monkeypatch.setattr(Recommender, "from_run", lambda *_, **__: opened)
    monkeypatch.setattr(files, "_fsync", lambda number: None)
    for call in range(99):
        with pytest.MonkeyPatch.context() as patch:
            fail_disk(patch, call)
            code = command(catalog.main, "add", "--run", run, "--items", tmp_path / "new.csv")
        if code == 0:
            break
        assert code == 2
        lines = capsys.readouterr().err.splitlines()
        said = next(line for line in lines if line.startswith("error: "))
        assert said.startswith("error: disk full: ") and lines[-1].startswith("  fix:   free space")
        Pipeline.open(run)  # like any command, it moves published stages into place
        assert {path.name for path in run.rglob(".*")} <= {".lock", ".image-hashes.json"}
        if state() != before:  # published, and the flush of a folder failed
            assert "n1" in (run / "catalog" / "catalog.json").read_text()
            break
    assert call > 10


def test_a_live_memory_is_not_saved_over_that_of_a_run(run: Path, tmp_path: Path) -> None:
    memory = RunArtifacts.open(run).load_memory()
    memory.observe([0], 1)
    with pytest.raises(UserError, match="belongs to a run") as caught:
        memory.save(run / "memory")
    memory.save(Path(str(caught.value).rpartition("such as ")[2]))  # the folder that the fix names
    assert_equal(Memory.load(run / "live-memory"), memory)
    RunArtifacts.open(run).load_memory()
