"""What the service measures of itself, for Prometheus, and the log of its requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cemg.serve.service import Service

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

log = logging.getLogger("cemg.serve.requests")


class Metrics:
    """Counts and times of requests, and figures of the service."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self._requests = Counter("cemg_requests", "Requests", labels, registry=self.registry)
        self._seconds = Histogram(
            "cemg_request_seconds", "Time of a request", ("method", "path"), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Figures(service))

    def observe(self, request: Request, path: str, status: int, seconds: float) -> None:
        """Count a request and write a line of the log, without keys and bodies."""
        self._requests.labels(request.method, path, str(status)).inc()
        self._seconds.labels(request.method, path).observe(seconds)
        if log.isEnabledFor(logging.INFO):
            entry = {
                "request_id": request.state.id, "method": request.method, "path": path, "status": status,
                "ms": round(1000 * seconds, 2),
            }  # fmt: skip
            log.info(json.dumps(entry))

    def page(self) -> tuple[bytes, int, None, str]:
        """Body, status, headers and media type of /metrics."""
        return generate_latest(self.registry), 200, None, CONTENT_TYPE_LATEST


class _Figures(Collector):
    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """Read the figures when they are asked for."""
        model, sizes = self.service.model, self.service.sizes()
        gauges = {
            "cemg_waiting_requests": ("Requests that wait for a search", model.waiting),
            **{f"cemg_{name}": (name.replace("_", " "), value) for name, value in sizes.items()},
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(name, about, value=float(value))
        counters = {
            "cemg_searches": ("Searches, each for a batch of requests", model.figures.searches),
            "cemg_searched_requests": ("Requests that were searched", model.figures.queries),
            "cemg_late_requests": ("Requests that waited until their deadline", model.figures.late),
            "cemg_cancelled_requests": ("Requests whose client had gone", model.figures.cancelled),
        }
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(name, about, value=float(value))
