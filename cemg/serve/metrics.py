"""What the service measures of itself, for Prometheus, and the log and the names of its requests."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cemg.errors import UserError
from cemg.serve.interface import Status
from cemg.serve.problems import draining, problem
from cemg.serve.service import Service

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # a client may invent others
SLOT = 5.0  # seconds of a point of the charts
SLOTS = 60  # points of the charts
SHORTEST, PER_OCTAVE, BINS = 1e-5, 8, 192  # bins of times: from 10 us to 160 s, each 9 % wide
TIMED = "/v1/recommend"  # the endpoint whose times are in the charts
QUANTILES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}

log = logging.getLogger("cemg.serve.requests")


@dataclass(slots=True)
class Slot:
    """Requests of some seconds.

    Attributes:
        number: The start of the slot, in units of SLOT seconds.
        requests: Number of requests for endpoints below /v1, other than the status.
        errors: How many of them failed with a status of 500 or more.
        bins: Number of times of TIMED per bin.
    """

    number: int
    requests: int = 0
    errors: int = 0
    bins: list[int] = field(default_factory=lambda: [0] * BINS)

    def quantiles(self) -> dict[str, float | None]:
        """Quantiles of the times, in milliseconds, to the width of a bin; None without a request."""
        total = sum(self.bins)
        if not total:
            return dict.fromkeys(QUANTILES)
        return {name: _quantile(self.bins, share * total) for name, share in QUANTILES.items()}


def _quantile(bins: list[int], count: float) -> float:
    seen = 0
    for place, number in enumerate(bins):
        seen += number
        if number and seen >= count:
            return 1000 * SHORTEST * 2 ** ((place + 0.5) / PER_OCTAVE)
    return math.inf


class Recent:
    """Requests of the last minutes, in a ring of slots whose size does not depend on the load."""

    def __init__(self) -> None:
        self._slots: deque[Slot] = deque(maxlen=SLOTS)
        self._lock = threading.Lock()

    def observe(self, path: str, status: int, seconds: float, *, now: float | None = None) -> None:
        """Count a request."""
        if not path.startswith("/v1/") or path == "/v1/status":
            return
        with self._lock:
            slot = self._slot(time.time() if now is None else now)
            slot.requests += 1
            slot.errors += status >= 500
            if path == TIMED:
                place = int(math.log2(max(seconds, SHORTEST) / SHORTEST) * PER_OCTAVE)
                slot.bins[min(place, BINS - 1)] += 1

    def _slot(self, now: float) -> Slot:
        number = int(now // SLOT)
        while self._slots and self._slots[-1].number > number + SLOTS:  # the clock was far ahead
            self._slots.pop()
        if not self._slots or self._slots[-1].number < number:  # a clock that was set back adds to the last
            self._slots.append(Slot(number))
        return self._slots[-1]

    def series(self, *, now: float | None = None) -> list[Slot]:
        """The last SLOTS slots up to now, oldest first; those without a request are empty."""
        last = int((time.time() if now is None else now) // SLOT)
        with self._lock:
            kept = {
                one.number: Slot(one.number, one.requests, one.errors, list(one.bins)) for one in self._slots
            }
        return [kept.get(number) or Slot(number) for number in range(last - SLOTS + 1, last + 1)]

    @staticmethod
    def total(slots: list[Slot]) -> Slot:
        """The sum of slots."""
        bins = [sum(part) for part in zip(*(one.bins for one in slots), strict=True)]
        return Slot(0, sum(one.requests for one in slots), sum(one.errors for one in slots), bins)


class Metrics:
    """Counts and times of requests, and figures of the service."""

    def __init__(self, service: Service) -> None:
        self.registry, self.recent = CollectorRegistry(), Recent()
        labels = ("method", "path", "status")
        self._requests = Counter("cemg_requests", "Requests", labels, registry=self.registry)
        self._seconds = Histogram(
            "cemg_request_seconds", "Time of a request", ("method", "path"), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Figures(service))

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request and write a line of the log, without keys and bodies."""
        path = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(method, path).observe(seconds)
        self.recent.observe(path, status, seconds)
        if log.isEnabledFor(logging.INFO):
            entry = {
                "request_id": scope["state"]["id"], "method": method, "path": path, "status": status,
                "ms": round(1000 * seconds, 2),
            }  # fmt: skip
            log.info(json.dumps(entry))

    def page(self) -> tuple[bytes, int, None, str]:
        """Body, status, headers and media type of /metrics."""
        return generate_latest(self.registry), 200, None, CONTENT_TYPE_LATEST


class Observed:
    """Names, counts, times and logs every request. While the service drains, it refuses new ones under /v1.

    Args:
        app: The application.
        metrics: Counts the requests.
        status: The state of the service.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, status: Status) -> None:
        self.app, self.metrics, self.status = app, metrics, status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = name if name.isprintable() and 0 < len(name) <= 64 else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = name
        begun, status = time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode("latin-1"))]
            await send(message)

        self.status.requests += 1
        try:
            if self.status.draining and scope["path"].startswith("/v1/"):
                await draining()(scope, receive, named)
            else:
                await self.app(scope, receive, named)
        except Exception:
            requests = logging.getLogger("cemg.serve")
            requests.exception("request %s (%s %.200r) failed", name, scope["method"], scope["path"])
            if not status:
                await problem(500, "the server failed; its log says why")(scope, receive, named)
        finally:
            self.status.requests -= 1
            self.metrics.observe(scope, status, time.perf_counter() - begun)


class _Figures(Collector):
    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """Read the figures at each scrape."""
        model, sizes = self.service.model, dict[str, int]()
        with suppress(UserError):  # the store cannot be reached: the other figures say more than none
            sizes = self.service.sizes()
        gauges: dict[str, tuple[str, float]] = {
            "cemg_waiting_requests": ("Requests that wait for a search", model.waiting),
            **{f"cemg_{name}": (name.replace("_", " "), value) for name, value in sizes.items()},
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(name, about, value=float(value))
        counters: dict[str, tuple[str, float]] = {
            "cemg_searches": ("Searches, each for a batch of requests", model.figures.searches),
            "cemg_searched_requests": ("Requests that were searched", model.figures.queries),
            "cemg_late_requests": ("Requests that waited until their deadline", model.figures.late),
            "cemg_cancelled_requests": ("Requests whose client had gone", model.figures.cancelled),
        }
        shadow = self.service.shadows.current
        if shadow is not None:
            done = shadow.compared
            counters |= {
                "cemg_shadow_requests": ("Requests that the shadow was compared on", done.requests),
                "cemg_shadow_overlap": ("Sum of the overlaps of its lists with the answers", done.overlaps),
                "cemg_shadow_left_out_requests": ("Sampled requests beyond its queue", done.left_out),
                "cemg_shadow_failed_requests": ("Requests that it could not search", done.failed),
            }
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(name, about, value=float(value))
