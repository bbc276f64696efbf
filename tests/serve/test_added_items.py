"""Text similarities of added items: a start reads them, and a changed text takes effect at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cemg.memory.similarity import Similarity
from cemg.serve.rows import Item
from cemg.serve.served_run import ServedRun
from cemg.serve.service import Service
from cemg.serve.similarity_file import SimilarityFile

from .process import copy_of, eventually

WORDS = ("sturdy rudder", "plain telescope", "music for the garden", "a kitchen", "office telescope")


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_run, tmp_path)


def items(count: int) -> list[Item]:
    return [Item(f"new-{n}", WORDS[n % 5], f"{WORDS[n % 3]} {WORDS[n % 4]}") for n in range(count)]


def placed(service: Service, *names: str) -> None:
    eventually(lambda: all(service.loaded.engine.has(name) for name in names))


def rows_by_id(loaded: ServedRun) -> dict[str, list[tuple[str, float]]]:
    """The most similar items of each item."""
    ids = [str(item) for item in loaded.engine.recommender.catalog.item_ids]
    similar = loaded.engine.recommender.memory.similar
    assert similar is not None and similar.num_items == len(ids)
    rows = (similar.row(row, similar.top) for row in range(len(ids)))
    return {
        name: [(ids[item], float(value)) for item, value in zip(*row, strict=True)]
        for name, row in zip(ids, rows, strict=True)
    }


def recomputed(loaded: ServedRun, texts: dict[str, str]) -> dict[str, list[tuple[str, float]]]:
    """`rows_by_id` of a memory that the added items are added to with these texts, in their order."""
    from cemg.recommender import Recommender

    memory = Recommender.from_run(loaded.run).memory
    ids = [str(item) for item in loaded.engine.recommender.catalog.item_ids]
    memory.add_items([texts[name] for name in ids[memory.num_items :]])
    assert memory.similar is not None
    found = {}
    for row, name in enumerate(ids):
        others, values = memory.similar.row(row, memory.similar.top)
        found[name] = [(ids[item], float(value)) for item, value in zip(others, values, strict=True)]
    return found


def texts_of(service: Service) -> dict[str, str]:
    return {one.item.item_id: f"{one.item.title}. {one.item.text}." for one in service.store.items()}


@pytest.fixture
def written(run: Path) -> Iterator[Path]:
    """A run whose service has ended with twelve added items."""
    service = Service(run)
    service.put_items(items(8))
    placed(service, *(f"new-{n}" for n in range(8)))
    service.put_items(items(12)[8:])  # their order in the catalog is not that of their ids
    placed(service, "new-11")
    service.close(timeout=60)
    yield run


def file_of(run: Path) -> Path:
    (path,) = (run / "serve").glob("similarity-*.safetensors")
    return path


def refuse(*_: object) -> None:
    raise AssertionError("a similarity was computed")


def test_a_start_reads_the_similarities_that_were_computed_before(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Similarity, "extend", lambda self, texts: refuse() if texts else None)
    service = Service(written)
    try:
        monkeypatch.undo()
        found = rows_by_id(service.loaded)
        assert found == recomputed(service.loaded, texts_of(service))
        assert any(name.startswith("new-") for name, _ in found["new-3"])
        service.put_items([Item("last", "sturdy rudder")])  # added to what was read
        placed(service, "last")
        assert rows_by_id(service.loaded) == recomputed(service.loaded, texts_of(service))
        assert "last" in [name for name, _ in rows_by_id(service.loaded)["new-0"]]
    finally:
        service.close(timeout=60)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "another run", "empty header"])
def test_a_file_that_cannot_be_used_is_computed_and_written_again(written: Path, damage: str) -> None:
    path = file_of(written)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-40])
    elif damage == "changed":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "empty header":
        path.write_bytes(b"\x02" + bytes(7) + b"{}")
    else:
        head = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + head])
        about["__metadata__"]["similarity"] = about["__metadata__"]["similarity"].replace(
            '"model": "', '"model": "0'
        )
        text = json.dumps(about).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + head :])
    damaged = path.read_bytes() if path.exists() else b""
    service = Service(written)
    try:
        assert rows_by_id(service.loaded) == recomputed(service.loaded, texts_of(service))
        eventually(lambda: path.exists() and path.read_bytes() != damaged)
        model, store = service.model_version, service.store.created
        saved = SimilarityFile(written, model_version=model, store=store).read()
        assert saved is not None and len(saved.texts) == 12
    finally:
        service.close(timeout=60)


def test_a_changed_text_is_compared_at_once_and_its_semantic_id_stays(written: Path) -> None:
    service = Service(written)
    try:
        codes, before = service.codes("new-0"), rows_by_id(service.loaded)
        service.patch_item("new-0", {"title": "plain telescope", "text": "a kitchen"})
        service.put_items([Item("new-5", "office telescope")])
        service.patch_item("item-0001", {"text": "plain telescope"})  # of the run: it stays as it was trained
        after = rows_by_id(service.loaded)
        assert after["new-0"] != before["new-0"] and service.codes("new-0") == codes
        assert after == recomputed(service.loaded, texts_of(service))
    finally:
        service.close(timeout=60)
    again = Service(written)  # the file has the changed texts
    try:
        assert rows_by_id(again.loaded) == after
    finally:
        again.close(timeout=60)


def test_a_text_that_changes_after_the_last_write_of_the_file_is_compared_at_the_start(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cemg.serve.new_items.NewItems._save_similarity", lambda self: None)
        service = Service(written)
        service.patch_item("new-2", {"text": "office telescope"})
        service.put_items([Item("last", "sturdy rudder")])
        placed(service, "last")
        after = rows_by_id(service.loaded)
        service.close(timeout=60)
    again = Service(written)
    try:
        assert rows_by_id(again.loaded) == after
    finally:
        again.close(timeout=60)


def test_replicas_compare_a_changed_text_alike(run: Path, location: str) -> None:
    one, other = Service(run, store=location, replica=True), Service(run, store=location, replica=True)
    try:
        one.put_items(items(4))
        for service in (one, other):
            eventually(lambda service=service: service.catch_up() or service.loaded.engine.has("new-3"))
        other.patch_item("new-1", {"title": "sturdy rudder", "text": ""})
        one.catch_up()
        assert rows_by_id(one.loaded) == rows_by_id(other.loaded)
        texts = texts_of(one) | {"new-1": "sturdy rudder."}
        assert rows_by_id(one.loaded) == recomputed(one.loaded, texts)
    finally:
        one.close(timeout=60)
        other.close(timeout=60)


def test_an_item_is_pending_until_the_searches_have_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, seen = Service(run), list[tuple[int, int]]()
    size, add = service.sizes()["items"], ServedRun.add

    def slow(loaded: ServedRun, *args: Any, **options: Any) -> None:
        seen.append((service.sizes()["pending"], service.sizes()["items"]))
        add(loaded, *args, **options)

    monkeypatch.setattr(ServedRun, "add", slow)
    try:
        service.put_items(items(3))
        placed(service, "new-2")
        assert seen[0] == (3, size)
        eventually(lambda: (service.sizes()["pending"], service.sizes()["items"]) == (0, size + 3))
    finally:
        service.close(timeout=60)


def test_a_removed_item_without_a_semantic_id_leaves_no_problem_behind(run: Path) -> None:
    service = Service(run)
    try:
        service.put_items([Item("bare")])
        eventually(lambda: "bare" in service.status.failed_items)
        service.remove_item("bare")
        assert service.status.failed_items == {}
    finally:
        service.close(timeout=60)


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "serve").rmdir() if (run / "serve").is_dir() else None
    (run / "serve").write_text("a file in the place of the folder")
    service = Service(run, store=tmp_path / "store.sqlite")
    try:
        service.put_items(items(2))
        placed(service, "new-1")
        eventually(lambda: "the next start computes similarities anew" in caplog.text)
        assert np.isfinite([value for row in rows_by_id(service.loaded).values() for _, value in row]).all()
    finally:
        service.close(timeout=60)
