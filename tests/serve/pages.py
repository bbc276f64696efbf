"""A service for the tests of its page, and the page in a browser."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

MARKUP = "<img src=x onerror=document.title='run'><b>bold</b>"
WAIT = 60.0  # seconds until something must have happened, also on a busy machine
web = httpx.Client(timeout=WAIT)


@contextmanager
def serving(run: Path, *options: object) -> Iterator[str]:
    """The address of a process that serves a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from cemg.commands.serve import main; main()"
    words = [sys.executable, "-c", code, "--run", str(run), "--port", str(port), *map(str, options)]
    with (run / "serve.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address) or process.poll() is not None, seconds=120)
        assert process.poll() is None, (run / "serve.log").read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def answers(address: str) -> bool:
    try:
        return web.get(f"{address}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(check: Callable[[], Any], *, seconds: float = WAIT) -> Any:
    end = time.monotonic() + seconds
    while not (found := tried(check)):
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.1)
    return found


def tried(check: Callable[[], Any]) -> Any:
    """The result of a check; None if the page replaced an element meanwhile."""
    try:
        return check()
    except Exception as error:
        if type(error).__name__ != "StaleElementReferenceException":
            raise
        return None


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, place: str, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/#/{place}")

    def all(self, selector: str) -> list[Any]:
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def one(self, selector: str, text: str = "") -> Any:
        """The first visible element with a text, once there is one."""
        return wait_for(
            lambda: next(
                (one for one in self.all(selector) if text in (one.text or one.accessible_name)), None
            )
        )

    def click(self, selector: str, text: str = "") -> None:
        wait_for(lambda: self.one(selector, text).click() or True)

    def type(self, selector: str, *keys: str) -> None:
        self.one(selector).send_keys(*keys)

    def text(self) -> str:
        return str(self.one("main").text)

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        script = "return [document.documentElement.scrollWidth, innerWidth]"
        content, window = self.driver.execute_script(script)
        return bool(content <= window)

    def pictures(self) -> bool:
        """Whether all pictures are drawn."""
        script = (
            "return [...document.querySelectorAll('main img.picture')].every((one) => one.naturalWidth > 0)"
        )
        return bool(self.driver.execute_script(script))
