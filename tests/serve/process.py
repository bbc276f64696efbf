"""``cemg-serve`` as a process on a real socket, for tests."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx

COMMAND = "from cemg.commands.serve import main; main()"
KEYS = {
    "read": "r" * 8 + "ead-key-1234",
    "write": "w" * 8 + "rite-key-1234",
    "admin": "a" * 8 + "dmin-key-1234",
}
PATIENCE = 120  # seconds; a start takes few, but the machine may be busy


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Forks:
    """A process that has the imports of the server and forks it, so that a start takes a second."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path()},
        )  # fmt: skip
        atexit.register(self._process.kill)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, log: Path, code: str, arguments: list[str]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(log), code, arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@cache
def _forks() -> _Forks:
    return _Forks()


class ServerProcess:
    """One process of ``cemg-serve``.

    Args:
        run: The folder of the run.
        options: Further options of the command.
        wait: Whether to wait until it is ready.
        command: The Python code that it runs.
    """

    def __init__(self, run: Path, *options: object, wait: bool = True, command: str = COMMAND) -> None:
        self.run, self.port = run, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = run / f"serve-{self.port}.log"
        words = ["--run", str(run), "--port", str(self.port), *map(str, options)]
        self.pid = _forks().start(self.log, command, words)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        if wait:
            try:
                self.wait_until_ready()
            except BaseException:
                self.stop(signal.SIGKILL)
                raise

    @property
    def runs(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.runs, self.log.read_text()
            try:
                if self.http.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def wait(self) -> int:
        """The exit code, once the process has ended; -9 after a kill."""
        eventually(lambda: not self.runs)
        code = Path(f"{self.log}.exit")
        return int(code.read_text()) if code.exists() else -signal.SIGKILL

    def send(self, sig: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, sig)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """End the process by a signal, and return its exit code."""
        self.send(sig)
        try:
            return self.wait()
        finally:
            self.send(signal.SIGKILL)
            self.http.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(signal.SIGKILL)

    def json(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON of an answer that has this status."""
        answer = self.http.request(method, path, json=body)
        assert answer.status_code == status, (method, path, body, answer.status_code, answer.text)
        return answer.json()

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def path() -> str:
    """The import path of this process, for its children."""
    return os.pathsep.join(part for part in sys.path if part)


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run, whose store is new."""
    shutil.copytree(run, folder / "run")
    shutil.rmtree(folder / "run" / "serve", ignore_errors=True)
    return folder / "run"


def eventually(check: Any, *, seconds: float = PATIENCE) -> Any:
    """The first true value of ``check()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def problem(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status and found["type"] == "about:blank" and found["title"]
    for word in words:
        assert word in json.dumps(found), found
    return dict(found)
