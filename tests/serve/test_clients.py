"""Several clients change and search one server at once; each compares every answer with a plain model.

No removed, filtered or excluded item is ever recommended, versions only grow, and reads follow writes.
CEMG_CLIENT_STEPS: requests of each client, 150 by default.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import httpx

from .clients import Client
from .process import PATIENCE, ServerProcess, copy_of

STEPS = int(os.environ.get("CEMG_CLIENT_STEPS", "150"))


def work(client: Client, url: str) -> None:
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        try:
            for _ in range(STEPS):
                client.step(http)
            client.in_doubt = None
        except Exception as error:
            client.error = error


def test_answers_follow_a_plain_model_whatever_other_clients_do(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    with ServerProcess(run) as server:
        clients = Client.several(server.http, 4)
        threads = [threading.Thread(target=work, args=(client, server.url)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            if client.error is not None:
                raise client.error
            client.check(server.http)
        version = server.json("GET", "/v1/catalog")["catalog_version"]
        log = server.json("GET", "/v1/catalog/changes?limit=1000")["changes"]
        assert [one["version"] for one in log] == list(range(1, min(version, 1000) + 1))
        assert "Traceback" not in server.log.read_text()
    with ServerProcess(run) as server:  # after a kill, all is as before
        assert server.json("GET", "/v1/catalog")["catalog_version"] >= version
        for client in clients:
            client.check(server.http)
