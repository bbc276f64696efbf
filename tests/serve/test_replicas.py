"""Several services on one store: what one acknowledged, the next request to another one sees."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cemg.errors import UserError
from cemg.serve import replica as replicas
from cemg.serve.engine import Engine, Request
from cemg.serve.rows import Event, Item
from cemg.serve.service import Service
from cemg.storage.files import StorageError

from .process import ServerProcess, copy_of, eventually, problem


@pytest.fixture
def runs(tiny_run: Path, other_run: Path, tmp_path: Path) -> Path:
    """A folder with two runs."""
    shutil.copytree(other_run, tmp_path / "other")
    return copy_of(tiny_run, tmp_path)


@pytest.fixture
def two(runs: Path, location: str) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two replicas on one store, in SQLite and in PostgreSQL."""
    with (
        ServerProcess(runs, "--replica", "--store", location) as one,
        ServerProcess(runs, "--replica", "--store", location) as other,
    ):
        yield one, other


def listed(server: ServerProcess, **body: Any) -> list[tuple[str, float]]:
    found = server.json("POST", "/v1/recommend", {"limit": 20, **body})
    return [(one["item_id"], one["score"]) for one in found["items"]]


def test_a_request_sees_what_another_replica_acknowledged(two: tuple[ServerProcess, ServerProcess]) -> None:
    draw = random.Random(0)
    names = [one["item_id"] for one in two[0].json("GET", "/v1/items?limit=20")["items"]]
    for number in range(12):
        writer, reader = draw.sample(two, 2)
        user, item = f"user-{number % 3}", names[number]
        event = {"event_id": f"e{number}", "user_id": user, "item_id": item}
        writer.json("POST", "/v1/events", {"events": [event]})
        assert reader.json("GET", f"/v1/users/{user}")["history"][-1] == item
        assert listed(reader, user_id=user) == listed(writer, user_id=user)
        gone = listed(reader, user_id=user)[0][0]
        version = writer.json("DELETE", f"/v1/items/{gone}")["catalog_version"]
        answer = reader.json("POST", "/v1/recommend", {"user_id": user, "limit": 20})
        assert answer["catalog_version"] == version
        assert gone not in [one["item_id"] for one in answer["items"]]
        writer.json("PUT", f"/v1/items/{gone}", {"title": "back", "attributes": {"turn": number}})
        body = {"user_id": user, "filter": {"must": [{"key": "turn", "match": {"value": number}}]}}
        assert [name for name, _ in listed(reader, **body)] == [gone]
    two[0].json("DELETE", "/v1/users/user-0")
    problem(two[1].http.get("/v1/users/user-0"), 404)


def test_a_new_item_has_one_semantic_id_in_all_replicas(two: tuple[ServerProcess, ServerProcess]) -> None:
    for number in range(6):
        two[number % 2].json("PUT", f"/v1/items/new-{number}", {"title": f"Sturdy rudder {number}"})
    for number in range(6):
        codes = [
            eventually(lambda one=one, n=number: one.json("GET", f"/v1/items/new-{n}")["codes"])
            for one in two
        ]
        assert codes[0] == codes[1]
    history = {"history": ["new-0", "item-0002"], "exact": True}
    assert listed(two[0], **history) == listed(two[1], **history)


def test_items_that_two_replicas_encode_at_once_get_different_semantic_ids(
    runs: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Service(runs, store=location, replica=True)
    other = Service(runs, store=location, replica=True)
    encode = Engine.encode

    def encode_slowly(engine: Engine, *args: Any) -> Any:
        if engine is not other.loaded.engine:
            return encode(engine, *args)
        found = encode(engine, *args)
        one.put_items([Item("first", "Sturdy rudder")])
        eventually(lambda: one.codes("first"))
        return found

    try:
        monkeypatch.setattr(Engine, "encode", encode_slowly)
        with monkeypatch.context() as patch:
            patch.setattr(one.new_items, "_place_some", lambda: False)
            other.put_items([Item("second", "Sturdy rudder")])
            time.sleep(0.2)
        for service in (one, other):
            eventually(lambda service=service: service.codes("first") and service.codes("second"))
        codes = [(service.codes("first"), service.codes("second")) for service in (one, other)]
        assert codes[0] == codes[1] and codes[0][0] != codes[0][1]
    finally:
        one.close()
        other.close()


def test_attributes_of_two_types_are_refused_by_one_of_two_replicas(
    two: tuple[ServerProcess, ServerProcess],
) -> None:
    statuses: list[int] = []

    def put(server: ServerProcess, value: object) -> None:
        body = {"title": "x", "attributes": {"weight": value}}
        statuses.append(server.http.put(f"/v1/items/item-000{2 + (server is two[0])}", json=body).status_code)

    threads = [threading.Thread(target=put, args=args) for args in zip(two, (1, "heavy"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 422]
    assert listed(two[0], history=["item-0002"]) == listed(two[1], history=["item-0002"])


@pytest.fixture
def pair(runs: Path, location: str) -> Iterator[tuple[Service, Service]]:
    """Two replicas in this process."""
    one, other = (Service(runs, store=location, replica=True) for _ in range(2))
    yield one, other
    one.close()
    other.close()


def test_the_types_of_removed_items_bind_no_other_item(
    pair: tuple[Service, Service], runs: Path, location: str
) -> None:
    one, other = pair
    one.put_items([Item("item-0002", "x", attributes={"weight": 1})])
    one.remove_item("item-0002")
    other.put_items([Item("item-0003", "x", attributes={"weight": "heavy"})])
    third = Service(runs, store=location, replica=True)
    for service in (*pair, third):
        assert service.recommend(Request(user="none"), timeout=60).result().catalog_version == 3
    third.close()


def test_a_write_is_checked_although_searches_do_not_ask_the_store(
    pair: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    monkeypatch.setattr(replicas, "PAUSE", 60.0)

    def fails() -> Any:
        raise StorageError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(one.store, "position", fails)
        one.recommend(Request(user="u"), timeout=60).result()
    other.put_items([Item("item-0002", "x", attributes={"weight": 1})])
    with pytest.raises(UserError, match="weight"):
        one.put_items([Item("item-0003", "x", attributes={"weight": "heavy"})])
    one.add_events([Event("e1", "u", "item-0002")])
    assert one.history("u") == ["item-0002"]
    assert one.recommend(Request(user="u"), timeout=60).result().catalog_version == 1


def test_events_of_an_item_that_is_not_placed_yet_have_one_order(
    pair: tuple[Service, Service], runs: Path, location: str
) -> None:
    one, other = pair
    one.add_events([Event("e1", "u", "nova"), Event("e2", "u", "item-0004")])
    assert other.history("u") == ["item-0004"]
    one.put_items([Item("nova", "Sturdy rudder")])
    eventually(lambda: one.codes("nova"))
    third = Service(runs, store=location, replica=True)
    assert [service.history("u") for service in (*pair, third)] == [["nova", "item-0004"]] * 3
    third.close()


def test_a_failed_item_is_tried_again_after_a_correction_by_another_replica(
    pair: tuple[Service, Service],
) -> None:
    one, other = pair
    one.put_items([Item("bad")])
    eventually(lambda: "bad" in one.status.failed_items)
    other.put_items([Item("bad", "Sturdy rudder")])
    eventually(lambda: one.codes("bad") and other.codes("bad"))
    stored = one.store.get_item("bad")
    assert stored is not None and one.status.failed_items["bad"][0] != stored.version


def test_a_store_that_returns_to_the_catalog_is_read_again(
    pair: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    one.put_items([Item("nova", "Sturdy rudder")])
    eventually(lambda: one.codes("nova") and other.codes("nova"))
    assert one.loaded.keeps_codes
    for catalog in ("another", one.loaded.catalog):
        other.store.change_catalog(catalog, other.loaded.ids, codes={"nova": [1, 2, 3]})
    before = one.loaded
    one.catch_up()
    eventually(lambda: one.loaded is not before)
    assert one.codes("nova") == [1, 2, 3]


def test_a_model_that_one_replica_loads_is_loaded_by_all(
    two: tuple[ServerProcess, ServerProcess], runs: Path
) -> None:
    two[1].json("PUT", "/v1/items/new", {"title": "Sturdy rudder"})
    eventually(lambda: two[0].json("GET", "/v1/items/new")["codes"])
    before = two[0].json("GET", "/v1/models")["current"]["model_version"]
    two[0].json("POST", "/v1/models", {"run": "other"}, status=202)
    for one in two:
        eventually(lambda one=one: one.json("GET", "/v1/models")["current"]["model_version"] != before)
    codes = [eventually(lambda one=one: one.json("GET", "/v1/items/new")["codes"]) for one in two]
    assert codes[0] == codes[1] and len(codes[0]) > 0
    history = {"history": ["new", "item-0002"]}
    assert listed(two[0], **history) == listed(two[1], **history)
    two[1].json("PUT", "/v1/items/newer", {"title": "Plain rudder"})
    codes = [eventually(lambda one=one: one.json("GET", "/v1/items/newer")["codes"]) for one in two]
    assert codes[0] == codes[1]
    two[1].json("POST", "/v1/models/rollback", status=202)
    for one in two:
        eventually(lambda one=one: one.json("GET", "/v1/models")["current"]["model_version"] == before)
    assert listed(two[0], **history) == listed(two[1], **history)
    log = "".join(one.log.read_text() for one in two)
    assert "Traceback" not in log


def test_a_replica_that_cannot_load_the_model_of_the_others_says_so(
    two: tuple[ServerProcess, ServerProcess], runs: Path
) -> None:
    two[0].json("POST", "/v1/models", {"run": "other"}, status=202)
    eventually(lambda: two[0].json("GET", "/v1/models")["last"]["state"] == "ready")
    # the second one finds the folder only if it is quick; else it is not ready, but answers
    (runs.parent / "other").rename(runs.parent / "moved")
    eventually(
        lambda: (
            two[1].http.get("/health/ready").status_code == 503
            or two[1].json("GET", "/v1/models")["current"] == two[0].json("GET", "/v1/models")["current"]
        )
    )
    assert listed(two[1], history=["item-0002"])


def test_a_killed_replica_loses_nothing_and_a_new_one_knows_all(
    two: tuple[ServerProcess, ServerProcess], runs: Path, location: str
) -> None:
    two[0].json("POST", "/v1/events", {"events": [{"event_id": "e", "user_id": "u", "item_id": "item-0002"}]})
    two[0].json("PUT", "/v1/items/orphan", {"title": "Sturdy rudder"})
    two[0].stop(signal.SIGKILL)
    found = eventually(lambda: two[1].json("GET", "/v1/items/orphan")["codes"])
    with ServerProcess(runs, "--replica", "--store", location) as third:
        assert third.json("GET", "/v1/items/orphan")["codes"] == found
        assert listed(third, user_id="u") == listed(two[1], user_id="u")


def test_a_service_alone_and_replicas_refuse_each_other(runs: Path, location: str) -> None:
    service = Service(runs, store=location, replica=True)
    try:
        with pytest.raises(UserError, match="in use by another cemg-serve") as caught:
            Service(runs, store=location)
        assert "--replica" in str(caught.value.fix)
    finally:
        service.close()
    service = Service(runs, store=location)
    try:
        with pytest.raises(UserError, match="in use by another cemg-serve") as caught:
            Service(runs, store=location, replica=True)
        assert "without --replica" in str(caught.value.fix)
    finally:
        service.close()


def test_searches_go_on_while_the_store_fails_and_follow_it_again(
    runs: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "PAUSE", 0.2)
    one = Service(runs, store=location, replica=True)
    other = Service(runs, store=location, replica=True)
    request = Request(user="u", limit=5)

    def fails() -> Any:
        raise StorageError("the server is gone")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(one.store, "position", fails)
            other.add_events([Event("e1", "u", "item-0002")])
            answer = one.recommend(request, timeout=60).result()
            assert answer.items and not answer.known_user
        eventually(lambda: one.recommend(request, timeout=60).result().known_user, seconds=10)
        assert one.history("u") == other.history("u") == ["item-0002"]
    finally:
        one.close()
        other.close()


def test_an_item_of_the_old_model_is_not_stored_under_the_new_one(
    runs: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "POLL", 3600.0)  # the replica does not see the new model by itself
    one = Service(runs, store=location, replica=True)
    other = Service(runs, store=location, replica=True)
    try:
        one.load_model("other")
        eventually(lambda: one.loader.last is not None and one.loader.last.state == "ready")
        with pytest.raises(UserError, match="moved to another model"):
            other.put_items([Item("new", "Sturdy rudder")])
        assert other.store.get_item("new") is None
        other.add_events([Event("e1", "u", "item-0002")])
        assert one.recommend(Request(user="u"), timeout=60).result().known_user
    finally:
        one.close()
        other.close()
