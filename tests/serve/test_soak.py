"""Many requests while the catalog changes every second and the model is swapped: none fails or is wrong.

A few hundred requests in the suite; as a proof of its own, with its figures:
``CEMG_SOAK_REQUESTS=100000 python -m pytest -s tests/serve/test_soak.py``

CEMG_SOAK_REQUESTS: number of requests, 300 by default.
CEMG_SOAK_SWAPS: number of swaps of the model meanwhile, 5 by default, 2 in the suite. With 0, the memory of
    the process must not grow by more than 2 %.
CEMG_SOAK_SECONDS: seconds between two changes of the catalog, 1 by default.
"""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .process import PATIENCE, ServerProcess, copy_of, eventually

ASKED = "CEMG_SOAK_REQUESTS" in os.environ
REQUESTS = int(os.environ.get("CEMG_SOAK_REQUESTS", "300"))
SWAPS = int(os.environ.get("CEMG_SOAK_SWAPS", "5" if ASKED else "2"))
SECONDS = float(os.environ.get("CEMG_SOAK_SECONDS", "1"))
CLIENTS, WARM_UP, SHELVES, ADDED = 8, REQUESTS // 20, 3, 10
FIRST_CHANGES = 8 if ASKED else 1  # before the memory is measured: the first additions load modules


@dataclass
class World:
    """What the clients may see. Only one thread changes it, before a restoration and after a removal."""

    shelf: dict[str, int]  # of each item, which never changes
    removed: dict[str, int] = field(default_factory=dict)  # item: number of its removal
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    swaps: int = 0
    changes: int = 0

    @property
    def done(self) -> bool:
        return (self.answered >= REQUESTS and self.swaps >= SWAPS) or bool(self.wrong)


def test_no_request_fails_or_returns_an_illegal_item(tiny_run: Path, other_run: Path, tmp_path: Path) -> None:
    shutil.copytree(other_run, tmp_path / "other")
    with ServerProcess(copy_of(tiny_run, tmp_path), "--timeout", PATIENCE) as server:
        world = prepared(server)
        items = [*world.shelf][: -2 * ADDED]  # of the run
        clients = [Client(server.url, f"c{n}", n, items, world) for n in range(CLIENTS)]
        for client in clients:
            for _ in range(WARM_UP // CLIENTS):
                client.step()
        change(server, world, items, until=lambda: world.changes >= FIRST_CHANGES)
        world.seconds.clear()
        world.answered, before, begun = 0, server.memory(), time.monotonic()
        run_all([client.work for client in clients] + [
            lambda: change(server, world, items, until=lambda: world.done), lambda: swap(server, world),
        ])  # fmt: skip
        seconds, after = time.monotonic() - begun, server.memory()
        log = server.log.read_text()
    tail = statistics.quantiles(world.seconds, n=100)
    print(
        f"\n{world.answered} requests, {world.changes} changes and {world.swaps} swaps in {seconds:.0f} s: "
        f"{len(world.wrong)} failed or illegal; p50 {1e3 * tail[49]:.1f} ms, p99 {1e3 * tail[98]:.1f} ms, "
        f"longest {1e3 * max(world.seconds):.0f} ms; {before / 2**20:.0f} MiB before, "
        f"{after / 2**20:.0f} MiB after ({after / before - 1:+.1%})"
    )
    assert not world.wrong, world.wrong[:3]
    assert "Traceback" not in log
    assert world.answered >= REQUESTS and len(world.models) == min(2, 1 + SWAPS)
    assert SWAPS or not ASKED or after < 1.02 * before


def prepared(server: ServerProcess) -> World:
    """Put every item on a shelf, and add some."""
    items = [one["item_id"] for one in server.json("GET", "/v1/items?limit=1000")["items"]]
    names = [*items, *(f"soak-{n}" for n in range(2 * ADDED))]
    world = World({item: n % SHELVES for n, item in enumerate(names)})
    for start in range(0, len(items), 500):
        server.json("POST", "/v1/items", {"items": [body(world, i) for i in items[start : start + 500]]})
    return world


def body(world: World, item: str) -> dict[str, Any]:
    return {"item_id": item, "title": f"sturdy rudder {item}", "attributes": {"shelf": world.shelf[item]}}


@dataclass
class Client:
    """Sends requests and compares the answers with the world."""

    url: str
    name: str
    number: int
    items: list[str]
    world: World
    events: list[str] = field(default_factory=list)
    version: int = 0

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def work(self) -> None:
        while not self.world.done:
            self.step()
        self.http.close()

    def step(self) -> None:
        self.number += CLIENTS
        try:
            if self.number // CLIENTS % 20 == 0:
                self.add_event()
            else:
                self.search()
        except Exception as error:
            self.world.wrong.append(f"{type(error).__name__}: {error}")
        self.world.answered += 1  # several threads: a lost count only makes the test longer

    def add_event(self) -> None:
        item = self.items[self.number % len(self.items)]
        event = {"event_id": f"{self.name}-{self.number}", "user_id": self.name, "item_id": item}
        self.asked("POST", "/v1/events", {"events": [event]})
        self.events.append(item)
        found = self.asked("GET", f"/v1/users/{self.name}")["history"]
        assert found == self.events, (self.name, found, self.events)

    def search(self) -> None:
        world, n, kind = self.world, self.number, self.number // CLIENTS % 3
        history = [self.items[(7 * n + k) % len(self.items)] for k in range(3)]
        request: dict[str, Any] = {"history": history, "limit": 10, "exclude_history": kind != 1}
        shelf = n % SHELVES
        if kind == 2:
            request["filter"] = {"must": [{"key": "shelf", "match": {"value": float(shelf)}}]}
        removed, begun = dict(world.removed), time.monotonic()
        answer = self.asked("POST", "/v1/recommend", request)
        world.seconds.append(time.monotonic() - begun)
        listed = [one["item_id"] for one in answer["items"]]
        gone = {item for item, number in removed.items() if world.removed.get(item) == number}
        assert not gone & {*listed}, ("removed", gone & {*listed}, answer)
        assert len(listed) == len({*listed}) and (len(listed) == 10 or not answer["complete"])
        if kind != 1:
            assert not {*listed} & {*history}, ("history", history, answer)
        if kind == 2:
            assert all(world.shelf[item] == shelf for item in listed), ("filter", shelf, answer)
        assert answer["catalog_version"] >= self.version, ("version", self.version, answer)
        self.version = answer["catalog_version"]
        world.models.add(answer["model_version"])

    def asked(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.http.request(method, path, json=body)
        assert answer.status_code == 200, (method, path, answer.status_code, answer.text)
        return answer.json()


def change(server: ServerProcess, world: World, items: list[str], *, until: Callable[[], bool]) -> None:
    """Add and remove items of the run and others, one after the other."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        while not until():
            number = world.changes
            names = items[::5] if number % 2 else [f"soak-{n}" for n in range(2 * ADDED)]
            item = names[(number // 2) % len(names)]
            if number % 4 < 2 or item in world.removed:
                world.removed.pop(item, None)
                answer = http.put(f"/v1/items/{item}", json={
                    name: value for name, value in body(world, item).items() if name != "item_id"
                })  # fmt: skip
            else:
                answer = http.delete(f"/v1/items/{item}")
                world.removed |= {item: number} if answer.status_code == 200 else {}
            if answer.status_code not in (200, 404):
                world.wrong.append(f"change of {item}: {answer.text}")
            world.changes += 1
            time.sleep(SECONDS)


def swap(server: ServerProcess, world: World) -> None:
    """Load both runs in turn, spread over the requests."""

    def ended() -> dict[str, Any] | None:
        last = http.get("/v1/models").json()["last"]
        return None if last["state"] == "loading" else dict(last)

    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        while world.swaps < SWAPS and not world.done:
            if world.answered < world.swaps * REQUESTS / SWAPS:
                time.sleep(0.05)
                continue
            http.post("/v1/models", json={"run": "run" if world.swaps % 2 else "other"}).raise_for_status()
            last = eventually(ended, seconds=10 * PATIENCE)
            if last["state"] != "ready":
                world.wrong.append(f"swap: {last}")
                return
            world.swaps += 1


def run_all(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
