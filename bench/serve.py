"""Latency of cemg-serve under an open load on loopback, beside a server of ``generate()`` with a Python trie.

python bench/serve.py --run runs/demo [--rates 5 20 80] [--seconds 10] [--threads 1] [--p99 500]
    [--additions N] [--vllm PYTHON] [--no-peers] [--json PATH]

Arrival times are drawn before a load starts (Poisson), and a latency counts from the intended arrival, so a
server that stalls cannot hide it. One server runs at a time. Requests are the histories of the run's test
users. "search alone" is the time of the same search in this process: one after the other, and once per mean
gap of a rate, since a processor that was idle is slower. With --p99, the rate of each server is raised by
40 % at a time until the p99 is above that limit. "start" is the time until cemg-serve is ready. With
--additions, items with a title are added one after the other while no other request is sent; the time is that
from the request to the answer that the item is active.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import commit, format_columns, machine

from cemg.recommender import Recommender

CONNECTIONS = 64
TOP = 10
STEP = 1.4  # from one rate to the next of `highest_rate`
WARM, SEARCHES = 5, 100  # searches of "search alone"
PEER = """
import json, sys, threading
import torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from cemg.recommender import Recommender

torch.set_num_threads(int(sys.argv[3]))
recommender, lock = Recommender.from_run(sys.argv[1], engine=sys.argv[4]), threading.Lock()
beams = recommender.artifacts.config.decoding.beams
app = FastAPI()

class Body(BaseModel):
    history: list[str]
    limit: int = 10

@app.get("/health/ready")
def ready():
    return {}

@app.post("/v1/recommend")
def recommend(body: Body):
    with lock:
        found = recommender.recommend([body.history], top=body.limit, beams=beams)
    return {"items": found.ids[0], "scores": found.scores[0].tolist()}

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


@dataclass(frozen=True, slots=True)
class Load:
    """The outcome of one load."""

    rate: float  # requests per second that were offered
    milliseconds: np.ndarray  # of the answered requests, from the intended arrival
    refused: int  # 503
    failed: int  # other statuses, or a closed connection

    def row(self, server: str) -> dict[str, Any]:
        found = {"server": server, "offered_per_s": self.rate, "requests": self.count}
        if len(self.milliseconds):
            named = zip(("p50", "p95", "p99"), np.quantile(self.milliseconds, (0.5, 0.95, 0.99)), strict=True)
            found |= {f"{name}_ms": round(float(value), 2) for name, value in named}
        return found | {"refused_share": round(self.refused / self.count, 4), "failed": self.failed}

    @property
    def count(self) -> int:
        return len(self.milliseconds) + self.refused + self.failed


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[float]:
    """A server, once it is ready; yields the seconds that this took."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 300
            while time.monotonic() < until and process.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
            else:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            yield time.monotonic() - begun
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def offer(port: int, bodies: Sequence[bytes], rate: float, seconds: float, seed: int) -> Load:
    """Send requests at drawn times, whether or not earlier ones were answered."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=max(int(rate * seconds), 1))
    arrivals = np.cumsum(gaps)
    free: asyncio.Queue[Any] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", port))
    outcome: list[tuple[int, float]] = []
    start = time.perf_counter() + 0.2

    async def send(number: int) -> None:
        due = start + arrivals[number]
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        connection = await free.get()
        try:
            status = await request(*connection, bodies[number % len(bodies)])
        except (OSError, asyncio.IncompleteReadError, ValueError):
            status = 0
            connection = await asyncio.open_connection("127.0.0.1", port)
        free.put_nowait(connection)
        outcome.append((status, 1000 * (time.perf_counter() - due)))

    await asyncio.gather(*(send(number) for number in range(len(arrivals))))
    while not free.empty():
        free.get_nowait()[1].close()
    answered = np.array([taken for status, taken in outcome if status == 200])
    refused = sum(status in (429, 503) for status, _ in outcome)
    return Load(rate, answered, refused, len(outcome) - len(answered) - refused)


def highest_rate(port: int, bodies: Sequence[bytes], limit: float, seconds: float) -> float:
    """The highest rate of a series whose p99 is within ``limit`` ms, without a failure; 0 for none."""
    rate, best = 1.0, 0.0
    while True:
        load = asyncio.run(offer(port, bodies, rate, max(seconds, 20 / rate), 0))
        if load.refused or load.failed or np.quantile(load.milliseconds, 0.99) > limit:
            return best
        best, rate = rate, STEP * rate


def addition(port: int, number: int) -> float:
    """Add an item with a title over HTTP; return the milliseconds until it is active."""
    address = f"http://127.0.0.1:{port}/v1/items/added-{number}"
    body = json.dumps({"title": f"Sturdy rudder {number}"}).encode()
    headers = {"Content-Type": "application/json"}
    begun = time.perf_counter()
    urllib.request.urlopen(urllib.request.Request(address, body, headers, method="PUT"), timeout=60).close()
    while True:
        with urllib.request.urlopen(address, timeout=60) as answer:
            if json.load(answer)["state"] == "active":
                return 1000 * (time.perf_counter() - begun)
        time.sleep(0.005)


async def request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> int:
    """One POST on an open connection; returns the status."""
    head = (
        "POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(answer.partition("content-length:")[2].partition("\r\n")[0])
    await reader.readexactly(length)
    return int(answer.split(" ", 2)[1])


def search_alone(
    run: Path, histories: Sequence[list[str]], *, engine: str, gaps: Sequence[float]
) -> list[float]:
    """Median milliseconds of a search in this process, for each pause in seconds before a search."""
    recommender = Recommender.from_run(run, engine=engine)
    beams, medians = recommender.artifacts.config.decoding.beams, []
    repeats = recommender.artifacts.has_gate() and recommender.artifacts.load_gate().repeats
    for gap in gaps:
        taken: list[float] = []
        for number in range(WARM + SEARCHES):
            time.sleep(gap)
            begun = time.perf_counter()
            recommender.recommend(
                [histories[number % len(histories)]], top=TOP, beams=beams,
                exclude_history=engine == "cemg" and not repeats,
            )  # fmt: skip
            taken.append(1000 * (time.perf_counter() - begun))
        medians.append(float(np.median(taken[WARM:])))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[5.0, 20.0, 80.0], help="requests per second"
    )
    parser.add_argument("--peer-rates", type=float, nargs="*", default=[2.0, 5.0], help="those of the peer")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a load")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each search")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--p99", type=float, help="limit in ms: also find the highest rate within it")
    parser.add_argument("--additions", type=int, default=0, help="number of items to add to cemg-serve")
    parser.add_argument("--no-peers", action="store_true", help="only cemg-serve")
    parser.add_argument(
        "--vllm", metavar="PYTHON",
        help="interpreter with vLLM and CEMG: also load a server that searches by vLLM (decoder-only runs)",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Recommender.from_run(options.run).artifacts.load_data()
    histories = [[data.item_ids[row] for row in items] for items in data.split().histories("test")[:500]]
    bodies = [json.dumps({"history": history, "limit": TOP}).encode() for history in histories]
    rows: list[dict[str, Any]] = []
    alone = [("cemg", options.rates), ("transformers", options.peer_rates)]
    for engine, rates in alone[:1] if options.no_peers else alone:
        paces = [0.0, *(1 / rate for rate in rates)]
        medians = search_alone(options.run, histories, engine=engine, gaps=paces)
        for rate, median in zip(("", *rates), medians, strict=True):
            name = f"search alone, {engine}"
            rows.append({"server": name, "p50_ms": round(median, 2), "offered_per_s": rate})
            print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(options.run, copy, ignore=shutil.ignore_patterns("serve", "report", "results"))
        port = free_port()
        own = ["-c", "from cemg.commands.serve import main; main()", "--run", str(copy), "--port", str(port)]
        own += ["--threads", str(options.threads)]
        servers = {
            "cemg-serve": ([sys.executable, *own], options.rates),
        }
        peers = [] if options.no_peers else [("FastAPI + generate()", sys.executable, "transformers")]
        if options.vllm:
            peers.append(("FastAPI + vLLM with the trie", options.vllm, "vllm"))
        for name, python, engine in peers:
            peer = [python, "-c", PEER, str(copy), str(port), str(options.threads), engine]
            servers[name] = (peer, options.peer_rates)
        for name, (command, rates) in servers.items():
            with running(command, port) as seconds:
                rows.append({"server": name, "start_s": round(seconds, 2)})
                print(rows[-1], flush=True)
                asyncio.run(offer(port, bodies, min(rates, default=1.0), 3.0, 1))  # warm up
                for rate in rates:
                    load = asyncio.run(offer(port, bodies, rate, options.seconds, 0))
                    rows.append(load.row(name))
                    print(rows[-1], flush=True)
                if options.p99:
                    best = highest_rate(port, bodies, options.p99, options.seconds)
                    rows.append({"server": name, "p99_limit_ms": options.p99, "highest_rate": round(best, 2)})
                    print(rows[-1], flush=True)
                if name == "cemg-serve" and options.additions:
                    taken = [addition(port, number) for number in range(options.additions)]
                    median, longest = float(np.median(taken)), max(taken)
                    rows.append({"server": name, "additions": options.additions,
                                 "p50_ms": round(median, 1), "max_ms": round(longest, 1)})  # fmt: skip
                    print(rows[-1], flush=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    print(format_columns([names, *([str(row.get(name, "")) for name in names] for row in rows)]))
    if options.json:
        about = {"machine": machine(torch.device("cpu")), "commit": commit(), "run": options.run.name}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
