"""Replicas on a Ray cluster, of which one node dies while they serve.

Needs Ray: ``pip install 'cemg[distributed]'``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .process import PATIENCE, copy_of, eventually, free_port


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs for replicas, on which the requests arrive."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 makes tests beside others very slow
        for check in ("READY_CHECK", "HEALTH_CHECK"):
            patch.setenv(f"RAY_SERVE_PROXY_{check}_TIMEOUT_S", "60")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            ray.serve.shutdown()
            ray.shutdown()
            made.shutdown()


def sent(http: httpx.Client, *call: Any, **options: Any) -> httpx.Response:
    """An answer, as the client in examples/serve gets it: what fails with a node is sent again."""

    def attempt() -> httpx.Response | None:
        try:
            answer = http.request(*call, **options)
        except httpx.TransportError:
            return None
        return None if answer.status_code >= 500 else answer

    found: httpx.Response = eventually(attempt)
    return found


def test_a_node_that_dies_loses_no_event_and_no_request(cluster: Any, tiny_run: Path, tmp_path: Path) -> None:
    from ray import serve

    from cemg.serve.on_ray import Arguments, application

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    run, port = copy_of(tiny_run, tmp_path), free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(run=run, store=str(tmp_path / "store.sqlite"), replicas=2)
    serve.run(application(arguments), name="cemg")
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
    acknowledged: list[str] = []
    wrong: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            number = len(acknowledged)
            item = f"item-00{2 + number % 30:02}"
            event = {"event_id": f"e{number}", "user_id": "u", "item_id": item}
            sent(http, "POST", "/v1/events", json={"events": [event]}).raise_for_status()
            acknowledged.append(item)
            history = sent(http, "GET", "/v1/users/u").json()["history"]
            if history != acknowledged:
                wrong.append(f"{history} is not {acknowledged}")
            answer = sent(http, "POST", "/v1/recommend", json={"user_id": "u", "limit": 5})
            if answer.status_code != 200 or len(answer.json()["items"]) != 5:
                wrong.append(answer.text)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: len(acknowledged) > 5 or not thread.is_alive())
    cluster.remove_node(nodes[0], allow_graceful=False)
    before = len(acknowledged)
    eventually(lambda: len(acknowledged) > before + 5 or not thread.is_alive())
    cluster.add_node(num_cpus=1)  # the lost replica starts there
    running = lambda: serve.status().applications["cemg"].deployments["cemg"].replica_states  # noqa: E731
    eventually(lambda: running() == {"RUNNING": 2}, seconds=2 * PATIENCE)
    time.sleep(1)
    stop.set()
    thread.join()
    assert not wrong, wrong[:2]
    assert len(acknowledged) > before + 5
