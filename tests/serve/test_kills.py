"""Kill -9 of the real server under load, at random moments: nothing that was acknowledged is lost.

CEMG_KILL_ROUNDS: number of kills, 5 by default.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

from .clients import Client
from .process import PATIENCE, ServerProcess, copy_of

ROUNDS = int(os.environ.get("CEMG_KILL_ROUNDS", "5"))
CLIENTS = 3


def test_nothing_acknowledged_is_lost_by_kills_under_load(tiny_run: Path, tmp_path: Path) -> None:
    run, draw, starts = copy_of(tiny_run, tmp_path), random.Random(7), []
    clients: list[Client] = []
    for number in range(ROUNDS + 1):
        begun = time.monotonic()
        with ServerProcess(run) as server:
            starts.append(time.monotonic() - begun)
            clients = clients or Client.several(server.http, CLIENTS)
            version = server.json("GET", "/v1/catalog")["catalog_version"]
            assert version >= max(client.version for client in clients)
            for client in clients:
                client.check(server.http)
                client.search(server.http, f"{client.name}-u0")
            if number < ROUNDS:
                kill_under_load(server, clients, draw)
            assert "Traceback" not in server.log.read_text()
            server.log.unlink()
    count = sum(client.acknowledged for client in clients)
    print(f"{ROUNDS} kills, {count} acknowledged requests, start {sorted(starts)[len(starts) // 2]:.2f} s")
    assert count > ROUNDS


def kill_under_load(server: ServerProcess, clients: list[Client], draw: random.Random) -> None:
    threads = [threading.Thread(target=client.work, args=(server.url,)) for client in clients]
    for thread in threads:
        thread.start()
    wanted = draw.randrange(60) + sum(client.acknowledged for client in clients)
    while sum(client.acknowledged for client in clients) < wanted and all(one.is_alive() for one in threads):
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.05))
    server.send(signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for client in clients:
        if client.error is not None:
            raise client.error
