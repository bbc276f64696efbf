"""Many requests while the catalog changes: none fails, and the memory of the process does not grow.

CEMG_SOAK_REQUESTS: number of requests, for example 100000; without it the test is skipped.
CEMG_SOAK_CHANGES: number of changes of the catalog meanwhile, 1 in 100 requests by default.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import httpx
import pytest

from .process import PATIENCE, ServerProcess, copy_of

REQUESTS = int(os.environ.get("CEMG_SOAK_REQUESTS", "0"))
CHANGES = int(os.environ.get("CEMG_SOAK_CHANGES", REQUESTS // 100))
CLIENTS, WARM_UP = 8, 1_000


@pytest.mark.skipif(not REQUESTS, reason="CEMG_SOAK_REQUESTS is not set")
def test_no_request_fails_and_memory_does_not_grow(tiny_run: Path, tmp_path: Path) -> None:
    failed: list[object] = []
    with ServerProcess(copy_of(tiny_run, tmp_path)) as server:
        items = [one["item_id"] for one in server.json("GET", "/v1/items?limit=1000")["items"]]

        def search(first: int, count: int) -> None:
            with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
                for n in range(first, first + count):
                    history = [items[(7 * n + k) % len(items)] for k in range(3)]
                    answer = http.post("/v1/recommend", json={"history": history})
                    if answer.status_code != 200 or not answer.json()["complete"]:
                        failed.append(answer.text)

        def searches(count: int) -> list[threading.Thread]:
            share = count // CLIENTS
            return [threading.Thread(target=search, args=(n * share, share)) for n in range(CLIENTS)]

        def change(number: int) -> None:
            item = f"soak-{number % 10}"
            server.json("PUT", f"/v1/items/{item}", {"title": f"sturdy rudder {number}"})
            server.json("DELETE", f"/v1/items/{item}" if number % 2 else f"/v1/items/{items[number % 20]}")
            if number % 2 == 0:
                server.json("PUT", f"/v1/items/{items[number % 20]}", {"title": "back"})

        for number in range(20):
            change(number)
        run_all(searches(WARM_UP))
        before, begun = server.memory(), time.monotonic()
        threads = searches(REQUESTS)
        for thread in threads:
            thread.start()
        for number in range(CHANGES):
            change(number)
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        seconds, after = time.monotonic() - begun, server.memory()
        print(
            f"{REQUESTS} requests and {CHANGES} changes in {seconds:.0f} s: "
            f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after ({after / before - 1:+.1%})"
        )
        assert not failed, failed[:3]
        assert after < 1.02 * before


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
