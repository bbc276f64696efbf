"""The end and the start of the process: draining after SIGTERM, and what keeps it from starting."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from cemg.commands import serve as serve_command
from cemg.serve import security
from cemg.serve.security import Rate
from cemg.serve.server import bind
from cemg.storage.run import Run

from .process import PATIENCE, ServerProcess, copy_of, eventually, free_port

HELD = """
import threading, time
from pathlib import Path
from cemg.serve.engine import Engine
search = Engine.recommend
def held(self, queries):
    while Path({gate!r}).exists():
        time.sleep(0.01)
    return search(self, queries)
Engine.recommend = held
from cemg.commands.serve import main
main()
"""  # a server whose searches wait while a file exists


class HeldServer(ServerProcess):
    """A server whose searches begin once `release` is called."""

    def __init__(self, run: Path, *options: object) -> None:
        self.gate = run / "hold"
        self.gate.touch()
        super().__init__(run, *options, command=HELD.format(gate=str(self.gate)))

    def release(self) -> None:
        self.gate.unlink()

    def waiting(self) -> float:
        text = self.http.get("/metrics").text
        return sum(
            float(line.split()[1]) for line in text.splitlines() if line.startswith("cemg_waiting_req")
        )


def recommend(server: ServerProcess, **headers: str) -> httpx.Response:
    body = {"history": ["item-0001"], "limit": 3}
    return httpx.post(f"{server.url}/v1/recommend", json=body, headers=headers, timeout=PATIENCE)


def test_waiting_requests_are_answered_after_sigterm_and_health_tells_it(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = copy_of(tiny_run, tmp_path)
    with HeldServer(run, "--shutdown-timeout", 60, "--timeout", 60) as server, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(recommend, server)]
        eventually(lambda: "cemg_searches_total 1.0" in server.http.get("/metrics").text)  # it is held
        waiting += [pool.submit(recommend, server) for _ in range(4)]
        eventually(lambda: server.waiting() == 4)
        server.json("POST", "/v1/events", {"events": []}, status=422)
        server.send(signal.SIGTERM)
        ready = eventually(lambda: (one := httpx.get(f"{server.url}/health/ready")).is_error and one)
        assert ready.status_code == 503 and ready.headers["retry-after"]
        assert httpx.get(f"{server.url}/health/live").json() == {"status": "draining"}
        refused = recommend(server)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        server.release()
        assert [one.result().status_code for one in waiting] == [200] * 5
        begun = time.monotonic()
        assert server.wait() == 0 and time.monotonic() - begun < 30
        assert "Traceback" not in server.log.read_text()
    with ServerProcess(run) as server:  # a second start works
        assert recommend(server).status_code == 200
        assert server.stop(signal.SIGINT) == 0


def test_a_request_that_does_not_end_does_not_hold_the_shutdown(tiny_run: Path, tmp_path: Path) -> None:
    with HeldServer(copy_of(tiny_run, tmp_path), "--shutdown-timeout", 2, "--timeout", 60) as server:
        results: list[object] = []

        def ask() -> None:
            try:
                results.append(recommend(server).status_code)
            except httpx.TransportError as error:
                results.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        eventually(lambda: "cemg_searches_total 1.0" in server.http.get("/metrics").text)
        begun = time.monotonic()
        server.send(signal.SIGTERM)
        server.wait()
        assert time.monotonic() - begun < 2 + 10  # seconds to end the interpreter on a busy machine
        thread.join(PATIENCE)
        assert results and results != [200]


# ---- overload


def test_a_full_queue_answers_503_and_late_and_gone_requests_are_not_searched(
    tiny_run: Path, tmp_path: Path
) -> None:
    options = ("--max-queue", 4, "--max-batch", 1, "--timeout", 1)
    with HeldServer(copy_of(tiny_run, tmp_path), *options) as server, ThreadPoolExecutor(40) as pool:
        many = [pool.submit(recommend, server) for _ in range(30)]
        eventually(lambda: sum(one.done() for one in many) >= 25)  # one is searched, four wait
        for answer in (one.result() for one in many if one.done()):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/problem+json"
        batch = {"requests": [{"history": []}] * 3}
        assert httpx.post(f"{server.url}/v1/recommend", json=batch).status_code == 503
        assert server.waiting() == 4  # nothing of the batch
        batch = {"requests": [{"history": []}] * 5}
        refused = httpx.post(f"{server.url}/v1/recommend", json=batch)
        assert refused.status_code == 422 and "--max-queue" in refused.json()["fix"]  # no use in another try
        assert server.http.get("/health/ready").status_code == 200
        time.sleep(1.1)  # their deadline
        server.release()
        states = sorted(one.result().status_code for one in many)
        assert states == [200] + [503] * 29
        figures = server.http.get("/metrics").text
        assert "cemg_late_requests_total 4.0" in figures and "cemg_searches_total 1.0" in figures
        assert recommend(server).status_code == 200


def test_a_client_that_has_gone_is_not_searched(tiny_run: Path, tmp_path: Path) -> None:
    with HeldServer(copy_of(tiny_run, tmp_path), "--timeout", 60) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(recommend, server)
        eventually(lambda: "cemg_searches_total 1.0" in server.http.get("/metrics").text)
        body = b'{"history": []}'
        head = f"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            eventually(lambda: server.waiting() == 1)
        eventually(lambda: '"status": 499' in server.log.read_text())
        server.release()
        assert first.result().status_code == 200 and recommend(server).status_code == 200
        figures = server.http.get("/metrics").text
        assert "cemg_cancelled_requests_total 1.0" in figures and "cemg_searches_total 2.0" in figures
        assert "Traceback" not in server.log.read_text()


# ---- what keeps it from starting


def refused(capsys: pytest.CaptureFixture[str], command: object, *arguments: object) -> str:
    code = command(serve_command.main, *arguments)  # type: ignore[operator]
    text = capsys.readouterr().err
    assert code == 2 and text.startswith("error: ") and "Traceback" not in text and "\n  fix:" in text, text
    return text


def test_a_client_with_too_many_requests_gets_429_and_others_are_answered(
    tiny_run: Path, tmp_path: Path
) -> None:
    keys = {"ann": "a" * 16, "bob": "b" * 16}
    (tmp_path / "keys.yaml").write_text(f"admin: [{', '.join(keys.values())}]")
    options = ("--rate", "0.01", "--keys", tmp_path / "keys.yaml")
    with ServerProcess(copy_of(tiny_run, tmp_path), *options) as server:
        for header in ({"X-API-Key": keys["ann"]}, {"Authorization": f"Bearer {keys['bob']}"}):
            assert server.http.get("/v1/catalog", headers=header).status_code == 200
            again = server.http.get("/v1/catalog", headers=header)
            assert again.status_code == 429 and 90 < int(again.headers["retry-after"]) <= 100
            assert again.headers["content-type"] == "application/problem+json"
            assert server.http.get("/metrics", headers=header).status_code == 200  # only /v1 is limited
        wrong = [server.http.get("/v1/catalog", headers={"X-API-Key": "c" * 16 + n}) for n in "xyz"]
        assert [one.status_code for one in wrong] == [401, 429, 429]  # all are of one address


def test_a_bucket_refills_and_forgets_quiet_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rate(2.0)
    assert [rate.wait("ann", 10.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert rate.wait("bob", 10.0) == 0.0 and rate.wait("ann", 10.25) == 0.25
    assert rate.wait("ann", 10.5) == 0.0 and rate.wait("ann", 1e9) == rate.wait("ann", 1e9) == 0.0
    assert rate.wait("ann", 1e9) == 0.5 and all(Rate(0.0).wait("ann", 0.0) == 0.0 for _ in range(100))
    monkeypatch.setattr(security, "CLIENTS", 2)
    for client in ("ann", "bob", "carl"):
        rate.wait(client, 1e9)
    assert len(rate._left) == 2


def test_a_busy_port_is_an_error_before_the_run_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: object
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        text = refused(capsys, command, "--run", tmp_path / "none", "--port", port)
    assert f"port {port}" in text and f"--port {port % 65535 + 1}" in text


def test_runs_and_addresses_that_cannot_be_served(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: object
) -> None:
    run = copy_of(tiny_run, tmp_path)
    options = ("--port", free_port())
    assert "there is no run" in refused(capsys, command, "--run", tmp_path / "none", *options)
    assert not (tmp_path / "none").exists()
    with Run(run).locked():
        text = refused(capsys, command, "--run", run, *options)
    assert f"in use by process {os.getpid()}" in text
    text = refused(capsys, command, "--run", run, *options, "--host", "0.0.0.0")
    assert "--keys" in text and "--insecure" in text
    text = refused(capsys, command, "--run", run, *options, "--host", "192.0.2.1", "--insecure")
    assert "192.0.2.1" in text and "--host 127.0.0.1" in text


def test_stores_that_do_not_belong_to_the_run(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: object
) -> None:
    run, store = copy_of(tiny_run, tmp_path), tmp_path / "store.sqlite"
    options = ("--run", run, "--port", free_port(), "--store", store)
    with ServerProcess(run, "--store", store) as server:
        text = refused(capsys, command, *options)
        assert "is in use by another cemg-serve" in text and "--store" in text
        assert server.stop() == 0
    with closing(sqlite3.connect(store)) as database, database:
        database.execute("UPDATE cemg_meta SET value = 'other' WHERE name = 'catalog'")
    assert "belongs to another catalog" in refused(capsys, command, *options)
    with closing(sqlite3.connect(store)) as database, database:
        database.execute("UPDATE cemg_meta SET value = '999' WHERE name = 'schema'")
    text = refused(capsys, command, *options)
    assert "newer version" in text and "pip install --upgrade cemg" in text
    store.write_bytes(b"not a database" * 100)
    refused(capsys, command, *options)
    with ServerProcess(run, "--store", tmp_path / "another.sqlite") as server:  # the fix
        assert recommend(server).status_code == 200


def test_it_starts_again_on_the_port_of_a_killed_process(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    with ServerProcess(run) as server:
        server.json("GET", "/v1/catalog")
        server.send(signal.SIGKILL)
        server.wait()
        bind("127.0.0.1", server.port).close()
