"""The item memory on synthetic data with Zipf counts: memory use, build time, latency of queries and events.

python bench/memory.py [--items 12000 1000000] [--events-per-item 10] [--json PATH] [--plot PATH]

A process builds the memory and saves it; this process loads it by memory map. A case has the time of one
query (a history of 20 items), or of one event. The peak of the build includes libraries and input; that of
loading and queries is above what this process had before.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, apply_options, make_parser, peak_memory_mib, reset_peak_memory

from cemg.memory import MEMORY_FILE, Constants, Memory
from cemg.memory.build import build_memory
from cemg.memory.rows import item_factors

MEAN_LENGTH = 10  # events per user, geometric
WORDS, VOCABULARY = 8, 50_000  # words per text; different words
QUERY_ITEMS, QUERIES = 20, 64


def draw_sequences(items: int, events: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sequences with about ``events`` events in total; the item of rank r has the weight 1 / (r + 10)."""
    weights = np.cumsum(1 / (np.arange(items) + 10))
    drawn = np.searchsorted(weights, rng.random(events) * weights[-1]).astype(np.int32)
    lengths = rng.geometric(1 / MEAN_LENGTH, events // MEAN_LENGTH)
    ends = np.cumsum(lengths)
    return np.split(drawn, ends[ends < events])


def draw_texts(items: int, rng: np.random.Generator) -> list[str]:
    """Texts of WORDS words; word of rank r has the weight 1 / (r + 10)."""
    weights = np.cumsum(1 / (np.arange(VOCABULARY) + 10))
    words = np.searchsorted(weights, rng.random((items, WORDS)) * weights[-1])
    return [" ".join(f"w{word}" for word in row) for row in words.tolist()]


def build(items: int, events: int, folder: str) -> dict[str, float]:
    """Builds and saves a memory. Returns seconds, and the peak of this process without and with the build."""
    rng = np.random.default_rng(0)
    sequences, texts = draw_sequences(items, events, rng), draw_texts(items, rng)
    reset_peak_memory()
    before, begun = peak_memory_mib(), time.monotonic()
    build_memory(sequences, texts, constants=Constants(scale=1.0)).save(Path(folder))
    return {
        "build_seconds": round(time.monotonic() - begun, 1), "build_peak_mib": round(peak_memory_mib()),
        "build_input_mib": round(before),
    }  # fmt: skip


def scores_by_dictionary(memory: Memory, history: np.ndarray) -> dict[int, float]:
    """The scores of the first items of the memory's rows, summed one by one."""
    use, factors, total = memory.constants, item_factors(memory.counts, memory.constants.exponent), {}
    for recency, row in enumerate(history[::-1].tolist()):
        for item, value in zip(
            *memory.transitions.base.row(row, memory.config.transition_items), strict=True
        ):
            term = use.decay**recency * factors[row] * float(value) * factors[item]
            total[int(item)] = total.get(int(item), 0.0) + term
        if memory.similar is not None:
            for item, value in zip(*memory.similar.base.row(row, memory.config.similar_items), strict=True):
                term = use.scale * use.text_weight * use.text_decay**recency * float(value)
                total[int(item)] = total.get(int(item), 0.0) + term
    return total


def check(memory: Memory, histories: list[np.ndarray]) -> None:
    """AssertionError if scores differ from the sums of `scores_by_dictionary`."""
    for history in histories:
        items, scores = memory.scores(history)
        expected = scores_by_dictionary(memory, history)
        assert items.tolist() == sorted(expected)
        np.testing.assert_allclose(scores, [expected[item] for item in items.tolist()], rtol=1e-9)


def run(report: Report, items: int, events: int) -> None:
    """Adds the rows of one size."""
    with tempfile.TemporaryDirectory() as folder:
        with get_context("spawn").Pool(1) as pool:
            facts: dict[str, Any] = pool.apply(build, (items, events, folder))
        reset_peak_memory()
        before = peak_memory_mib()
        memory = Memory.load(Path(folder))
        histories = [s[:QUERY_ITEMS] for s in draw_sequences(items, 400 * QUERIES, np.random.default_rng(1))]
        histories = [history for history in histories if len(history) == QUERY_ITEMS][:QUERIES]
        check(memory, histories[:4])
        for history in histories:
            memory.prior([history])
        facts |= {
            "file_mib": round((Path(folder) / MEMORY_FILE).stat().st_size / 2**20),
            "loaded_mib": round(peak_memory_mib() - before),
            "transitions": len(memory.transitions.base.items),
        }  # fmt: skip
        print(f"items {items:,}, events {events:,}: {facts}", flush=True)
        name, turn = f"N{items:.0e}", itertools.cycle(histories)
        equal = "sums by a dictionary"
        report.case(f"{name} query", {"memory": lambda: memory.prior([next(turn)])}, {}, equal, **facts)
        added = itertools.cycle(np.random.default_rng(2).integers(0, items, 1000).tolist())
        known = [history.tolist() for history in histories]
        order = itertools.cycle(known)
        report.case(f"{name} event", {"memory": lambda: memory.observe(next(order), next(added))}, {}, equal)


def main() -> None:
    parser = make_parser(__doc__, rounds=100)
    parser.add_argument("--items", type=int, nargs="+", default=[12_000, 1_000_000], help="catalog sizes")
    parser.add_argument("--events-per-item", type=int, default=10, help="training events per item")
    options = parser.parse_args()
    report = Report("memory", options, apply_options(options))
    for items in options.items:
        run(report, items, items * options.events_per_item)
    report.finish()


if __name__ == "__main__":
    main()
