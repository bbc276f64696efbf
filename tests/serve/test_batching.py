"""Requests that wait together share a search; changes come before the next one; nothing waits for ever."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from cemg.serve.batching import FullError, LateError, ModelThread, StoppedError
from cemg.serve.engine import Answer, Query


class Fake:
    """An engine that answers with the history, and can be held."""

    def __init__(self) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.version = 0

    def recommend(self, queries: list[Query]) -> list[Answer]:
        self.started.set()
        assert self.gate.wait(10)
        assert len({query.group for query in queries}) == 1
        self.batches.append(len(queries))
        if any("wrong" in query.history for query in queries):
            raise ValueError("wrong")
        return [
            Answer([*query.history], [0.0], [None], 0, "generator", self.version, "model", [])
            for query in queries
        ]


@pytest.fixture
def fake() -> Fake:
    return Fake()


def thread(fake: Any, **options: Any) -> ModelThread:
    return ModelThread(fake, **options)


def hold(model: ModelThread, fake: Fake) -> Any:
    """Start a search that ends when the gate opens, and return its future."""
    fake.gate.clear()
    first = model.search(Query(("first",)), timeout=10)
    assert fake.started.wait(10)
    return first


def test_an_idle_thread_searches_at_once_and_waiting_requests_share_a_search(fake: Fake) -> None:
    model = thread(fake)
    first = hold(model, fake)
    waiting = [model.search(Query((str(n),)), timeout=10) for n in range(10)]
    fake.gate.set()
    assert [future.result(10).items for future in waiting] == [[str(n)] for n in range(10)]
    assert first.result(10).items == ["first"] and fake.batches == [1, 10]
    assert model.figures.queries == 11 and model.figures.searches == 2
    model.stop()


def test_only_requests_of_a_kind_share_a_search_and_none_overtakes_its_kind(fake: Fake) -> None:
    model = thread(fake, max_batch=3)
    hold(model, fake)
    order: list[str] = []
    futures = []
    for n in range(8):
        future = model.search(Query((str(n),), exact=n % 2 == 1), timeout=10)
        future.add_done_callback(lambda done: order.append(done.result().items[0]))
        futures.append(future)
    fake.gate.set()
    for future in futures:
        future.result(10)
    model.stop()
    assert fake.batches[0] == 1 and sum(fake.batches) == 9 and max(fake.batches) <= 3
    for kind in (0, 1):
        own = [int(n) for n in order if int(n) % 2 == kind]
        assert own == sorted(own)


def test_a_change_is_applied_before_the_next_search(fake: Fake) -> None:
    model = thread(fake)
    hold(model, fake)
    before = model.search(Query(("a",)), timeout=10)

    def change(engine: Any) -> int:
        engine.version = 7
        return 3

    changed = model.change(change)
    fake.gate.set()
    assert changed.result(10) == 3 and before.result(10).catalog_version == 7
    with pytest.raises(ZeroDivisionError):
        model.change(lambda engine: 1 // 0).result(10)
    assert model.search(Query(("b",)), timeout=10).result(10).items == ["b"]  # the thread lives on
    model.stop()


def test_late_cancelled_and_too_many_requests_are_not_searched(fake: Fake) -> None:
    model = thread(fake, max_queue=2)
    hold(model, fake)
    late = model.search(Query(("late",)), timeout=0.0)
    cancelled = model.search(Query(("cancelled",)), timeout=10)
    with pytest.raises(FullError, match="2 requests wait already"):
        model.search(Query(("third",)), timeout=10)
    assert cancelled.cancel()
    time.sleep(0.01)
    fake.gate.set()
    with pytest.raises(LateError):
        late.result(10)
    assert model.search(Query(("next",)), timeout=10).result(10).items == ["next"]
    assert fake.batches == [1, 1] and model.figures.late == 1 and model.figures.cancelled == 1
    model.stop()


def test_one_request_at_fault_does_not_fail_the_others(fake: Fake) -> None:
    model = thread(fake)
    hold(model, fake)
    futures = [model.search(Query((name,)), timeout=10) for name in ("a", "wrong", "b")]
    fake.gate.set()
    assert futures[0].result(10).items == ["a"] and futures[2].result(10).items == ["b"]
    with pytest.raises(ValueError, match="wrong"):
        futures[1].result(10)
    model.stop()


def test_stopping_finishes_what_is_queued_or_fails_it_in_time(fake: Fake) -> None:
    model = thread(fake)
    first = hold(model, fake)
    second = model.search(Query(("second",)), timeout=10)
    threading.Timer(0.05, fake.gate.set).start()
    model.stop(timeout=10)
    assert first.result(0).items == ["first"] and second.result(0).items == ["second"]
    for call in (lambda: model.search(Query(()), timeout=1), lambda: model.change(lambda engine: None)):
        with pytest.raises(StoppedError):
            call()
    held = Fake()
    stuck = thread(held)
    hold(stuck, held)
    queued = stuck.search(Query(("queued",)), timeout=10)
    stuck.stop(timeout=0.05)
    with pytest.raises(StoppedError):
        queued.result(0)
    held.gate.set()
