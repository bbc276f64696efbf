"""Another run is loaded while the service runs, with what was added, removed and stored, and back again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cemg.artifacts import RunArtifacts
from cemg.data.dataset import Served
from cemg.errors import UserError
from cemg.features import encode_texts
from cemg.serve.engine import Answer, Query
from cemg.serve.expressions import Filter
from cemg.serve.models import Loader, LoadingError
from cemg.serve.rows import Event, Item
from cemg.serve.served_run import ServedRun
from cemg.serve.service import Service
from cemg.serve.shadow import WAITING, Shadow
from cemg.serve.store import Store

from .clients import Client
from .process import PATIENCE, ServerProcess, copy_of, eventually, free_port

USER = "user-0001"
LOADS = 20  # without a lock, one in ten fails
KILLS = int(os.environ.get("CEMG_KILL_ROUNDS", "4"))


@pytest.fixture
def runs(tiny_run: Path, other_run: Path, tmp_path: Path) -> Path:
    """A folder with both runs: ``run``, and ``other``."""
    copy_of(tiny_run, tmp_path)
    shutil.copytree(other_run, tmp_path / "other")
    return tmp_path


@pytest.fixture
def server(runs: Path) -> Iterator[ServerProcess]:
    with ServerProcess(runs / "run") as process:
        yield process


def wait(server: ServerProcess) -> dict[str, Any]:
    """The last attempt to load a run, once it has ended."""

    def ended() -> dict[str, Any] | None:
        last = server.json("GET", "/v1/models")["last"]
        return None if last["state"] == "loading" else dict(last)

    return dict(eventually(ended))


def load(server: ServerProcess, run: str = "other") -> None:
    server.json("POST", "/v1/models", {"run": run}, status=202)
    last = wait(server)
    assert last["state"] == "ready", last


def recommended(server: ServerProcess, **body: Any) -> list[str]:
    answer = server.json("POST", "/v1/recommend", {"limit": 1000, "exclude_history": False} | body)
    return [one["item_id"] for one in answer["items"]]


def test_another_run_takes_over_what_was_stored_and_survives_a_restart(runs: Path) -> None:
    with ServerProcess(runs / "run") as server:
        items = [one["item_id"] for one in server.json("GET", "/v1/items")["items"]]
        server.json("PUT", "/v1/items/new", {"title": "sturdy rudder", "attributes": {"price": 3}})
        server.json("PUT", "/v1/items/brief", {"title": "plain telescope"})
        eventually(lambda: {"new", "brief"} <= {*recommended(server, history=items[:2])})
        server.json("DELETE", "/v1/items/brief")
        server.json("DELETE", f"/v1/items/{items[0]}")
        server.json("PATCH", f"/v1/items/{items[1]}", {"attributes": {"price": 5}})
        event = {"event_id": "e1", "user_id": USER, "item_id": "new"}
        server.json("POST", "/v1/events", {"events": [event]})
        before = server.json("GET", "/v1/catalog")
        history = server.json("GET", f"/v1/users/{USER}")["history"]
        codes = codes_of(server)
        load(server)
        checks(server, items, history)
        after = server.json("GET", "/v1/catalog")
        assert after["model_version"] != before["model_version"]
        assert after["catalog_version"] > before["catalog_version"]
        assert codes_of(server) != codes
        server.stop()
    with ServerProcess(runs / "run") as server:  # the choice is in the store
        assert server.json("GET", "/v1/catalog") == after
        models = server.json("GET", "/v1/models")
        assert models["current"] == {"run": str(runs / "other"), "model_version": after["model_version"]}
        assert models["previous"]["model_version"] == before["model_version"] and models["last"] is None
        checks(server, items, history)
        server.json("PUT", f"/v1/items/{items[0]}", {"title": "back"})
        server.json("DELETE", "/v1/items/new")
        server.json("POST", "/v1/events", {"events": [event | {"event_id": "e2", "item_id": items[2]}]})
        server.json("POST", "/v1/models/rollback", status=202)
        assert wait(server)["state"] == "ready"
        found = server.json("GET", "/v1/catalog")
        assert found["model_version"] == before["model_version"]
        assert found["catalog_version"] > after["catalog_version"]
        listed = recommended(server, history=items[:2])
        assert items[0] in listed and not {"new", "brief"} & {*listed}
        assert server.json("GET", f"/v1/users/{USER}")["history"] == [*history, items[2]]
        assert codes_of(server) == codes
        models = server.json("GET", "/v1/models")
        assert models["current"]["run"] == str(runs / "run")
        assert models["previous"]["run"] == str(runs / "other")


def codes_of(server: ServerProcess) -> list[list[int]]:
    """The semantic IDs of the items of the run."""
    found = server.json("GET", "/v1/items?limit=1000")["items"]
    return [one["codes"] for one in found if one["item_id"] not in ("new", "brief")]


def checks(server: ServerProcess, items: list[str], history: list[str]) -> None:
    listed = recommended(server, history=items[:2])
    assert "new" in listed and items[1] in listed and not {items[0], "brief"} & {*listed}
    cheap = {"must": [{"key": "price", "range": {"lt": 4}}]}
    assert recommended(server, history=items[:2], filter=cheap) == ["new"]
    assert server.json("GET", f"/v1/users/{USER}")["history"] == history
    assert server.json("GET", "/v1/items/new")["state"] == "active"
    assert server.json("GET", "/v1/items/brief")["state"] == "removed"


def test_a_shadow_is_compared_and_answers_nothing(server: ServerProcess) -> None:
    items = [one["item_id"] for one in server.json("GET", "/v1/items")["items"]]
    version = server.json("GET", "/v1/catalog")["model_version"]
    server.json("POST", "/v1/models", {"run": "other", "shadow": True, "sample": 1}, status=202)
    assert wait(server)["state"] == "ready"
    server.json("PUT", "/v1/items/new", {"title": "sturdy rudder", "attributes": {"price": 3}})
    eventually(lambda: "new" in recommended(server, history=items[:1]))
    server.json("DELETE", f"/v1/items/{items[0]}")
    server.json("POST", "/v1/events", {"events": [{"event_id": "1", "user_id": "who", "item_id": items[1]}]})
    cheap = {"must": [{"key": "price", "range": {"lt": 4}}]}
    bodies: list[dict[str, Any]] = [
        {"user_id": "who", "limit": 5}, {"history": items[2:4], "limit": 1000},
        {"history": [], "filter": cheap}, {"history": items[2:4], "filter": {"must": [{"key": "no"}]}},
    ]  # fmt: skip
    answers = [server.http.post("/v1/recommend", json=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 422]
    assert {answer.json()["model_version"] for answer in answers[:3]} == {version}

    def compared() -> list[dict[str, Any]]:
        """The comparisons, once that of the last request is there."""
        found = [json.loads(one) for one in server.log.read_text().splitlines() if '"shadow_items"' in one]
        return found if found and found[-1]["items"] == ["new"] else []

    lines = eventually(compared)
    seen = server.json("GET", "/v1/models")["shadow"]
    assert seen["failed"] == seen["left_out"] == 0 and seen["compared"] == len(lines)
    user, whole, filtered = lines[-3:]
    for line, answer in zip(lines[-3:], answers[:3], strict=True):
        found = answer.json()
        assert line["items"] == [one["item_id"] for one in found["items"]]
        assert line["model"] == version != line["shadow"] == seen["model_version"]
        assert line["overlap"] == len({*line["items"]} & {*line["shadow_items"]}) / len(line["items"])
    assert items[1] not in user["shadow_items"] and filtered["shadow_items"] == ["new"]
    assert {*whole["shadow_items"]} == {*whole["items"]} and items[0] not in whole["shadow_items"]
    assert f"cemg_shadow_requests_total {seen['compared']:.1f}" in server.http.get("/metrics").text
    server.json("DELETE", "/v1/models/shadow")
    assert server.json("GET", "/v1/models")["shadow"] is None
    server.json("DELETE", "/v1/models/shadow", status=404)


def test_a_shadow_that_is_loading_can_be_ended(server: ServerProcess) -> None:
    server.json("POST", "/v1/models", {"run": "other", "shadow": True}, status=202)
    server.json("DELETE", "/v1/models/shadow")
    wait(server)
    assert server.json("GET", "/v1/models")["shadow"] is None


def test_the_number_of_an_event_that_is_not_stored_is_refused(server: ServerProcess) -> None:
    for body in ({"run": "other", "events": 10**6}, {"run": "other", "events": 10**6, "shadow": True}):
        assert "the last stored event" in server.json("POST", "/v1/models", body, status=422)["detail"]


def test_attributes_of_two_types_do_not_stop_a_run_that_has_the_items(
    other_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.open(tmp_path / "store.sqlite", catalog="another") as store:
        loaded = ServedRun.load(other_run, store)
        first, second = [str(item) for item in loaded.recommender.catalog.item_ids][:2]
        store.put_item(Item(first, attributes={"size": "large", "price": 1}))  # without a semantic ID there
        store.put_item(Item(second, attributes={"size": 5, "price": 2}))
        loaded.follow(store)
    assert "'size'" in caplog.text
    large, cheap = (
        Filter.model_validate({"must": [condition]})
        for condition in ({"key": "size", "match": {"value": "large"}}, {"key": "price", "range": {"lt": 3}})
    )
    assert [int(loaded.filters.mask(one).sum()) for one in (large, cheap)] == [1, 2]


def test_a_shadow_continues_after_a_restart_until_it_is_ended_or_its_run_changes(runs: Path) -> None:
    def shadow_of(service: Service) -> tuple[Path, float] | None:
        eventually(lambda: service.loader.last is None or service.loader.last.state != "loading")
        now = service.shadows.current
        return None if now is None else (now.loaded.run.resolve(), now.sample)

    service = Service(runs / "run")
    service.shadows.load("other", sample=0.5, events=3)
    expected = ((runs / "other").resolve(), 0.5)
    assert shadow_of(service) == expected
    service.close()
    service = Service(runs / "run")
    assert shadow_of(service) == expected
    assert service.shadows.current is not None and service.shadows.current.loaded.events == 3
    service.close()
    (runs / "other").rename(runs / "away")
    service = Service(runs / "run")  # it serves, and says why there is no shadow
    assert shadow_of(service) is None and service.loader.last is not None
    assert service.loader.last.state == "failed" and "other" in str(service.loader.last.reason)
    (runs / "away").rename(runs / "other")
    service.close()
    service = Service(runs / "run")
    assert shadow_of(service) == expected
    assert service.shadows.stop() and not service.shadows.stop()
    service.close()
    service = Service(runs / "run")
    assert shadow_of(service) is None and service.loader.last is None
    service.close()


def test_a_shadow_that_fails_or_is_slow_costs_the_answers_nothing(tiny_run: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.sqlite") as store:
        loaded = ServedRun.load(tiny_run, store)
        shadow, hold = Shadow(loaded, store, sample=1.0), threading.Event()
        answer = loaded.engine.recommend([Query(limit=3, beams=10)])[0]

        def slow(queries: object) -> list[Answer]:
            assert hold.wait(60)
            raise RuntimeError("it failed")

        loaded.engine.recommend = slow  # type: ignore[method-assign, assignment]
        for _ in range(WAITING + 10):
            shadow.offer(Query(limit=3, beams=10), answer)
        assert shadow.compared.left_out >= 9
        hold.set()
        eventually(lambda: shadow.compared.failed + shadow.compared.left_out == WAITING + 10)
        shadow.stop()
        shadow.offer(Query(limit=3, beams=10), answer)
        assert shadow.compared.requests == 0


def test_a_run_that_cannot_be_loaded_leaves_the_present_one(server: ServerProcess, runs: Path) -> None:
    before = server.json("GET", "/v1/catalog")
    (runs / "other" / "memory" / "memory.safetensors").write_bytes(b"nothing")
    (runs / "empty").mkdir()
    for run, reason in (("other", "memory.safetensors"), ("empty", "empty"), ("run", "is served already")):
        server.json("POST", "/v1/models", {"run": run}, status=202)
        last = wait(server)
        assert last["state"] == "failed" and reason in last["reason"], last
    assert server.json("GET", "/v1/catalog") == before
    for run in ("..", "/etc", "run/../..", "missing", "a\0b", "x" * 300, "."):
        answer = server.http.post("/v1/models", json={"run": run})
        assert answer.status_code == 422 and answer.json()["detail"].startswith("run: "), answer.text
    answer = server.http.post("/v1/models/rollback")
    assert answer.status_code == 409 and "no other model" in answer.json()["detail"]
    assert recommended(server, user_id=USER)


def test_a_store_is_moved_to_another_run_only_when_told_to(
    runs: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from cemg.commands.serve import main

    options = ("--store", runs / "store.sqlite")
    with ServerProcess(runs / "run", *options) as server:
        server.json("PUT", "/v1/items/new", {"title": "sturdy rudder"})
        eventually(lambda: server.json("GET", "/v1/items/new")["codes"])
        load(server)
        version = server.json("GET", "/v1/catalog")["catalog_version"]
        server.stop()
    shutil.move(runs / "other", runs / "moved")
    assert command(main, "--run", runs / "run", *options, "--port", free_port()) == 2
    assert "is missing" in (text := capsys.readouterr().err) and "--move-store" in text
    with ServerProcess(runs / "run", *options, "--move-store") as server:
        assert server.json("GET", "/v1/catalog")["catalog_version"] > version
        assert "new" in recommended(server, user_id=USER)
        assert server.json("GET", "/v1/models")["current"]["run"] == str(runs / "run")


def test_a_previous_run_that_was_changed_is_not_returned_to(server: ServerProcess, runs: Path) -> None:
    load(server)
    shutil.rmtree(runs / "run" / "gate")
    shutil.copytree(runs / "other", runs / "run", dirs_exist_ok=True)
    server.json("POST", "/v1/models/rollback", status=202)
    assert "was changed since it was served" in wait(server)["reason"]


def test_links_out_of_the_folder_are_refused_and_one_run_is_loaded_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "elsewhere")
    loader = Loader(tmp_path / "models")
    assert loader.path_of("one") == loader.path_of(str(tmp_path / "models" / "one"))
    with pytest.raises(UserError, match="not a run below"):
        loader.path_of("link")
    release = False

    def slow() -> None:
        eventually(lambda: release)

    loader.start(tmp_path, slow)
    with pytest.raises(LoadingError, match="is being loaded"):
        loader.start(tmp_path, slow)
    release = True
    loader.join(60)
    assert loader.last is not None and loader.last.state == "ready"


def test_events_that_the_data_have_are_not_learned_again(tiny_run: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.sqlite") as store:
        loaded = ServedRun.load(tiny_run, store)
        data = loaded.recommender.artifacts.load_data()
        (first, *_, last), other = data.sequences[0].tolist(), 0
        while other in data.sequences[0]:
            other += 1
        user, ids = data.user_ids[0], data.item_ids
        pairs = [(user, ids[last]), (user, ids[other]), ("unknown", ids[last]), (user, ids[first])]
        store.append_events([Event(f"e{n}", *pair) for n, pair in enumerate(pairs)])
        history = loaded.engine.history(user)
        counts = loaded.engine.recommender.memory.counts.copy()
        loaded.events = 3
        loaded.follow(store)
        # the first is in the data, which lack the next two; the last came after them
        assert loaded.engine.history(user) == [*history, ids[other], ids[first]]
        assert loaded.engine.history("unknown") == [ids[last]]
        learned = loaded.engine.recommender.memory.counts - counts
        assert [learned[row] for row in (other, last, first)] == [1, 1, 1] and learned.sum() == 3
        store.delete_user(user)
        store.append_events([Event("e9", user, ids[last])])
        loaded.events = 100
        loaded.follow(store)
        assert loaded.engine.history(user) == [ids[last]]  # after a deletion, the data have nothing
        assert loaded.engine.in_data(data.user_ids[1], ids[data.sequences[1][0]])


def test_the_data_say_which_events_of_which_store_they_have(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    with Store.open(tmp_path / "store.sqlite") as store, Store.open(tmp_path / "other.sqlite") as other:
        assert store.created != other.created and ServedRun.load(run, store).events == 0
        data = ServedRun.load(run, store).recommender.artifacts.load_data()
        dataclasses.replace(data, served=Served(store.created, 7)).save(tmp_path / "data")
        assert type(data).load(tmp_path / "data").served == Served(store.created, 7)


def test_a_model_is_whole_while_another_thread_loads_one(tiny_run: Path) -> None:
    artifacts, done, failed = RunArtifacts.open(tiny_run), threading.Event(), list[Exception]()

    def encode() -> None:
        while not done.is_set():
            try:
                encode_texts(["sturdy rudder"], config=artifacts.config.text, progress=False)
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        for _ in range(LOADS):
            artifacts.load_trained()  # compares the names of the weights
    finally:
        done.set()
        thread.join()
    assert not failed, failed


def test_following_in_steps_equals_following_at_once(other_run: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.sqlite", catalog="another") as store:
        one = ServedRun.load(other_run, store)
        ids = [str(item) for item in one.recommender.catalog.item_ids]
        steps: list[Any] = [
            lambda: store.put_items([Item("a", "sturdy rudder"), Item("b", "plain telescope")]),
            lambda: store.place_items({"a": [1, 2, 3], "b": [1, 2, 4]}),
            lambda: store.append_events([Event("1", USER, "a"), Event("2", "new", ids[3])]),
            lambda: store.remove_item("b"),
            lambda: store.put_item(Item(ids[0], "renamed", attributes={"price": 2})),
            lambda: store.remove_item(ids[1]),
            lambda: store.delete_user("new"),
            lambda: store.patch_item("a", {"attributes": {"price": 1}}),
        ]
        for step in steps:
            step()
            one.follow(store)
        assert one.follow(store) == 0
        whole = ServedRun.load(other_run, store)
        whole.follow(store)
        for loaded in (one, whole):
            assert loaded.engine.removed == {"b", ids[1]}
            assert loaded.engine.history(USER)[-1] == "a" and not loaded.engine.knows("new")
            assert loaded.table["a"] == {"price": 1} and loaded.table[ids[0]] == {"price": 2}
            assert loaded.engine.titles[ids[0]] == "renamed" and loaded.engine.version == store.version
            assert loaded.engine.codes("a") not in (None, [1, 2, 3])
        assert one.codes == whole.codes and {*one.codes} == {"a", "b"}


def test_kills_while_a_run_is_loaded_leave_one_of_the_two_and_lose_nothing(runs: Path) -> None:
    """Clients change and search meanwhile: nothing is lost, and no illegal item is listed, by either run."""
    draw, clients, seen = random.Random(3), list[Client](), list[dict[str, Any]]()
    for number in range(KILLS + 1):
        with ServerProcess(runs / "run") as server:
            seen.append(server.json("GET", "/v1/catalog"))
            clients = clients or Client.several(server.http, 2)
            for client in clients:
                client.one_model = False
                client.check(server.http)
                client.search(server.http, f"{client.name}-u0")
            other = "other" if server.json("GET", "/v1/models")["current"]["run"].endswith("run") else "run"
            threads = [threading.Thread(target=client.work, args=(server.url,)) for client in clients]
            for thread in threads:
                thread.start()
            server.json("POST", "/v1/models", {"run": other}, status=202)
            if number % 2:
                assert wait(server)["state"] == "ready"
            time.sleep(draw.uniform(0.0, 2.0))
            server.send(signal.SIGKILL)
            for thread in threads:
                thread.join(PATIENCE)
            for client in clients:
                if client.error is not None:
                    raise client.error
            assert "Traceback" not in server.log.read_text()
    assert len({one["model_version"] for one in seen}) == 2  # a load that is waited for takes over
    versions = [one["catalog_version"] for one in seen]
    assert versions == sorted(versions)
