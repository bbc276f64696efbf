"""``record_timings``: seconds per stage of a search."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cemg.decoding import Decoder, record_timings, timings
from cemg.decoding.graphs import GraphCache
from cemg.decoding.timings import STAGES, Timings, add_seconds, recording, timed_stage

from .conftest import FAMILIES, START, step_by_step


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_of_a_search_takes_time_and_the_list_is_the_same(bench, family, backend):
    made = bench(family)
    prompts = made.prompts([9, 4])
    decoder = Decoder(made.model, made.catalog, START, backend=backend)
    plain = decoder.decode(*prompts, 6)
    with record_timings() as recorded:
        found = decoder.decode(*prompts, 6)
    assert torch.equal(found.items, plain.items) and torch.equal(found.scores, plain.scores)
    assert recorded.seconds.keys() == set(STAGES)
    assert all(seconds > 0 for seconds in recorded.seconds.values())
    assert sum(recorded.seconds.values()) < recorded.total
    assert recorded.native_events == []


def test_an_exact_search_is_recorded_too(bench):
    made = bench("gpt2", 100)
    decoder = Decoder(made.model, made.catalog, START)
    with record_timings() as recorded, step_by_step():
        decoder.decode_exact(*made.prompts([3, 5, 7, 2]), 4, 4)
    assert all(seconds > 0 for seconds in recorded.seconds.values())
    assert recorded.native_events


def test_a_search_outside_the_block_or_in_another_thread_is_not_recorded(bench):
    made = bench("t5")
    decoder = Decoder(made.model, made.catalog, START)

    def search() -> bool:
        decoder.decode(*made.prompts([4]), 5)
        return recording()

    with record_timings() as recorded, ThreadPoolExecutor(1) as pool:
        assert recording() and not pool.submit(search).result()
    search()
    assert not recording() and sum(recorded.seconds.values()) == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, set by hand."""
    now = [0.0]
    monkeypatch.setattr(timings, "_now", lambda: now[0])
    return now


def test_the_time_of_an_inner_stage_counts_once(clock):
    with record_timings() as recorded:
        clock[0] = 1.0
        with timed_stage("prefill"):
            clock[0] = 3.0
            with timed_stage("decode_steps"):
                clock[0] = 7.0
            clock[0] = 8.0
        clock[0] = 10.0
    assert recorded.seconds == {"prefill": 3.0, "decode_steps": 4.0, "selection": 0.0}
    assert recorded.total == 10.0


def test_an_error_ends_its_stage_and_the_block(clock):
    with pytest.raises(KeyError), record_timings() as recorded, timed_stage("selection"):
        clock[0] = 2.0
        raise KeyError
    assert recorded.seconds["selection"] == recorded.total == 2.0
    assert not recording()


def test_an_outer_block_includes_the_searches_of_an_inner_one(clock):
    with record_timings() as outer:
        with record_timings() as inner:
            add_seconds({"prefill": 1.0})
        add_seconds({"selection": 2.0})
    assert (inner.seconds["prefill"], inner.seconds["selection"]) == (1.0, 0.0)
    assert (outer.seconds["prefill"], outer.seconds["selection"]) == (1.0, 2.0)


def test_outside_a_block_stages_and_seconds_go_nowhere(clock):
    with timed_stage("prefill"):
        clock[0] = 1.0
    add_seconds({"prefill": 1.0})
    assert Timings().seconds == dict.fromkeys(STAGES, 0.0)


def test_recorded_searches_run_without_a_cuda_graph(bench):
    made = bench("gpt2")
    decoder = Decoder(made.model, made.catalog, START, backend="torch", graphs=True)

    def no_capture(*_: object) -> None:
        raise AssertionError("a graph was recorded")

    decoder.graphs = GraphCache(pad_left=True, device=torch.device("cpu"), capture=no_capture)
    with record_timings() as recorded:
        decoder.decode(*made.prompts([4, 2]), 5)
    assert recorded.seconds["decode_steps"] > 0
