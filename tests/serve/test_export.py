"""``cemg-data export``: what a service stored becomes the data of the next run, which is served in turn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cemg.artifacts import RunArtifacts
from cemg.commands import data, train
from cemg.data import Dataset
from cemg.errors import UserError
from cemg.serve.database import STORE_FILE
from cemg.serve.export import ITEMS_FILE, export
from cemg.serve.rows import Event, Item
from cemg.serve.store import Store

from .process import ServerProcess, copy_of, eventually


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_run, tmp_path)


def open_store(run: Path) -> Store:
    catalog = RunArtifacts.open(run).load_catalog()
    return Store.open(
        run / STORE_FILE, catalog=catalog.digest(), run_items=frozenset(map(str, catalog.item_ids))
    )


def exported(run: Path, folder: Path) -> Dataset:
    folder.mkdir()
    export(run, run / STORE_FILE, folder)
    return Dataset.load(folder)


def items_of(data: Dataset, user: str) -> list[str]:
    return [data.item_ids[row] for row in data.sequences[data.user_ids.index(user)]]


def test_a_served_catalog_is_exported_trained_and_served_again(
    run: Path, tmp_path: Path, tiny_settings: list[str], feature_cache: Path, command
) -> None:
    old = RunArtifacts.open(run).load_data()
    user, gone_user, removed = old.user_ids[0], old.user_ids[1], old.item_ids[3]
    out = tmp_path / "next"
    with ServerProcess(run) as server:
        new = {"title": "Sturdy rudder", "text": "for the garden", "attributes": {"price": 9.5}}
        server.json("PUT", "/v1/items/new%2F1", new)
        server.json("DELETE", f"/v1/items/{removed}")
        server.json("DELETE", f"/v1/users/{gone_user}")
        pairs = [(user, "new/1"), ("fresh", old.item_ids[0]), ("fresh", removed), ("fresh", "unheard-of")]
        body = [{"event_id": str(n), "user_id": who, "item_id": item} for n, (who, item) in enumerate(pairs)]
        server.json("POST", "/v1/events", {"events": body})
        assert command(data.main, "export", "--run", run, out) == 0  # while the service runs
        found = Dataset.load(out)
    assert "new/1" in found.item_ids and removed not in found.item_ids
    assert found.texts[found.item_ids.index("new/1")] == "Sturdy rudder. for the garden."
    assert gone_user not in found.user_ids
    assert items_of(found, user) == [*(i for i in items_of(old, user) if i != removed), "new/1"]
    assert items_of(found, "fresh") == [old.item_ids[0]]
    kept = [s for u, s in zip(old.user_ids, old.sequences, strict=True) if u != gone_user]
    gone = int((np.concatenate(kept) == 3).sum()) + 2
    assert f"{gone} interactions with removed and unknown items are left out" in found.notes

    again = tmp_path / "again"
    settings = [word for one in tiny_settings if "synthetic" not in one for word in ("--set", one)]
    assert command(train.main, "--data", out, "--run", again, "--cache", feature_cache, *settings) == 0
    lines = [json.loads(line) for line in (out / ITEMS_FILE).read_text().splitlines()]
    with ServerProcess(again) as server:
        answer = server.json("POST", "/v1/recommend", {"user_id": user, "limit": 50, "beams": 50})
        assert removed not in {one["item_id"] for one in answer["items"]}
        assert server.json("GET", "/v1/items/new%2F1")["codes"] is not None
        server.json("POST", "/v1/items", {"items": lines})
        cheap = {"must": [{"key": "price", "range": {"lte": 10}}]}
        answer = server.json("POST", "/v1/recommend", {"user_id": "fresh", "filter": cheap})
        assert [one["item_id"] for one in answer["items"]] == ["new/1"]

    with ServerProcess(run) as server:  # the service that was exported loads the new run
        later = {"event_id": "later", "user_id": user, "item_id": "new/1"}
        server.json("POST", "/v1/events", {"events": [later]})
        server.json("POST", "/v1/models", {"run": "again"}, status=202)
        last = eventually(lambda: [m for m in [server.json("GET", "/v1/models")["last"]] if m["seconds"]])
        assert last[0]["state"] == "ready", last
        history = [*items_of(found, user), "new/1"]
        assert server.json("GET", f"/v1/users/{user}")["history"] == history  # nothing is twice
        assert server.json("GET", "/v1/users/fresh")["history"] == [old.item_ids[0]]
        assert server.http.get(f"/v1/users/{gone_user}").status_code == 404
        assert items_of(exported(run, tmp_path / "third"), user) == history


def test_images_and_changed_texts_are_those_of_the_store(run: Path, tmp_path: Path) -> None:
    old = RunArtifacts.open(run).load_data()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    same, other = old.item_ids[:2]
    with open_store(run) as store:
        store.patch_item(
            same, {"attributes": {"price": 1}}, base=Item(same, old.titles[0], old.texts[0] or "")
        )
        store.put_items([Item(other, "Plain telescope", "to the office", picture.getvalue()), Item("added")])
    found = exported(run, tmp_path / "next")
    assert found.texts[0] == old.texts[0] and found.images[0] == old.images[0]
    assert (found.titles[1], found.texts[1]) == ("Plain telescope", "Plain telescope. to the office.")
    assert found.images[1] is not None and found.images[1].read_bytes() == picture.getvalue()
    assert found.item_ids[len(old.item_ids) :] == ["added"] and found.texts[-1] is None
    (tmp_path / "next").rename(tmp_path / "moved")
    moved = Dataset.load(tmp_path / "moved").images[1]
    assert moved is not None and moved.read_bytes() == picture.getvalue()


def test_all_interactions_that_are_left_out_are_counted(run: Path, tmp_path: Path) -> None:
    old = RunArtifacts.open(run).load_data()
    gone = old.item_ids[0]
    with open_store(run) as store:
        store.remove_item(gone)
        store.append_events([Event("1", "new", gone), Event("2", "new", "nowhere")])
    count = int((np.concatenate([*old.sequences]) == 0).sum()) + 2
    found = exported(run, tmp_path / "next")
    assert f"{count:,} interactions with removed and unknown items are left out" in found.notes


def test_events_are_in_the_order_of_their_times_and_deletions_hold_from_then_on(
    run: Path, tmp_path: Path
) -> None:
    old = RunArtifacts.open(run).load_data()
    a, b, c = old.item_ids[:3]
    user = old.user_ids[0]
    with open_store(run) as store:
        store.append_events([Event("1", "new", b, 20.0), Event("2", "new", a, 10.0), Event("3", user, a)])
        store.delete_user(user)
        store.append_events([Event("4", user, c, 5.0)])
    found = exported(run, tmp_path / "next")
    assert items_of(found, "new") == [a, b] and items_of(found, user) == [c]


def test_a_missing_store_is_not_created(run: Path, tmp_path: Path, command, capsys) -> None:
    assert command(data.main, "export", "--run", run, tmp_path / "next") == 2
    assert "there is no store" in capsys.readouterr().err
    assert not (run / STORE_FILE).exists() and not (tmp_path / "next").exists()


def test_the_store_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    Store.open(tmp_path / "other.sqlite", catalog="0" * 64).close()
    with pytest.raises(UserError, match="another catalog"):
        export(run, tmp_path / "other.sqlite", tmp_path)
