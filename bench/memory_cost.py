"""What an item memory costs a search: ``python bench/latency.py --memory``.

A search with a memory asks it for a prior, sorts and sums the prior's masses over the trie, and mixes them
into every step. The search alone and the search with the memory take turns, as do the two parts before the
search. The memory has synthetic transitions and texts of up to 12,101 items, which include the history's; in
a larger catalog they are spread over the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cells import ITEMS, Cell
from engines import Workload
from harness import Report, Times, format_columns, measure

from cemg.decoding import Decoder, Recommendations
from cemg.memory import Memory
from cemg.memory.build import build_memory
from cemg.memory.rows import Rows
from cemg_kernels import ItemPrior

WEIGHT = 0.6  # of the prior
EVENTS, LENGTH = 198_500, 9  # of the training sequences: about as many as in Amazon Beauty
WORDS, TEXT = 5_000, 12  # of the texts: different words, and words of an item
TOLERANCE = 1e-4  # of a score
SEARCH, WITH_MEMORY, QUERY, TENSORS = "search", "with memory", "memory query", "sorting and sums"


def memory_grid(models: list[str]) -> list[Cell]:
    """One user and eight, then one user in catalogs of 1e4 to 1e7 items."""
    return [
        cell
        for model in models
        for cell in (
            *(Cell(model, batch, 50) for batch in (1, 8)),
            *(Cell(model, 1, 50, items=items) for items in (10**4, 10**5, 10**6, 10**7)),
        )
    ]


def synthetic_memory(items: int, seed: int = 0) -> Memory:
    """A memory of items that are popular by Zipf's law, and of texts whose words are."""
    rng = np.random.default_rng(seed)
    events = rng.permutation(items)[rng.zipf(1.3, EVENTS) % items]
    events[:items] = np.arange(items)  # every item occurs
    words = np.minimum(rng.zipf(1.2, (items, TEXT)), WORDS)
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    return build_memory(np.split(events, range(LENGTH, EVENTS, LENGTH)), texts)


def spread(memory: Memory, rows: np.ndarray, items: int) -> Memory:
    """The same memory in a catalog of ``items`` items, at the ascending ``rows``."""

    def place(matrix: Rows) -> Rows:
        counts = np.zeros(items, dtype=np.int64)
        counts[rows] = np.diff(matrix.starts)
        starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
        return Rows(starts, rows[matrix.items].astype(np.int32), matrix.values)

    counts = np.zeros(items, dtype=np.int64)
    counts[rows] = memory.counts
    similar = None if memory.similar is None else place(memory.similar)
    return Memory(memory.config, memory.constants, counts, place(memory.transitions), similar, memory.catalog)


class MemoryCase:
    """A cell's search, alone and with a memory."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.workload = cell, Workload(cell)
        self.decoder = self.decoder_of(None)
        self.histories = list(self.workload.rows.numpy())
        size = min(cell.items, ITEMS)
        rng = np.random.default_rng(0)
        others = np.setdiff1d(rng.choice(cell.items, min(2 * size, cell.items), False), self.histories)
        known = np.unique(self.histories)
        rows = np.sort(np.concatenate((known, rng.permutation(others)[: size - len(known)])))
        self.memory = spread(synthetic_memory(len(rows)), rows, cell.items)

    def decoder_of(self, backend: str | None) -> Decoder:
        work = self.workload
        return Decoder(work.model, work.catalog, work.first_token, self.cell.normalize, backend=backend)

    def prior(self) -> ItemPrior:
        return ItemPrior(*self.memory.prior(self.histories))

    def search(self, prior: ItemPrior | None = None, decoder: Decoder | None = None) -> Recommendations:
        found: Recommendations = (decoder or self.decoder).decode(
            self.workload.ids, self.workload.mask, self.cell.beams, prior=prior, prior_weight=WEIGHT
        )
        return found

    def compare(self) -> str:
        """Compares a search with the memory with one in PyTorch; returns how closely they agree.

        Raises SystemExit if they do not.
        """
        prior = self.prior()
        ours, reference = self.search(prior), self.search(prior, self.decoder_of("torch"))
        worst = float((ours.scores - reference.scores).abs().max())
        if not worst <= TOLERANCE:
            raise SystemExit(
                f"scores differ by {worst:.1e} from a search in PyTorch; run pytest tests/decoding"
            )
        return f"a search in PyTorch: scores within {TOLERANCE:.0e} (worst {worst:.0e})"

    def times(self, rounds: int, seconds: float) -> dict[str, Times]:
        prior, trie, device = self.prior(), self.workload.catalog.trie, torch.device(self.cell.device)
        trie = trie.to(device)
        work = {
            SEARCH: self.search, WITH_MEMORY: lambda: self.search(self.prior()), QUERY: self.prior,
            TENSORS: lambda: prior.on(trie, WEIGHT),
        }  # fmt: skip
        return measure(work, device, rounds, seconds)


def memory_cost(times: dict[str, Times]) -> float:
    """The share by which the memory lengthens a search: the median over the rounds."""
    pairs = zip(times[WITH_MEMORY].samples, times[SEARCH].samples, strict=False)
    return float(np.median([longer / alone - 1 for longer, alone in pairs]))


def add_case(report: Report, cell: Cell) -> dict[str, Any]:
    """Measures a cell and adds its row."""
    case = MemoryCase(cell)
    equal = case.compare()
    entries = float(case.prior().counts.mean())
    times = case.times(report.options.rounds, report.options.seconds)
    (row,) = report.add(
        cell.name(), WITH_MEMORY, times[WITH_MEMORY], {SEARCH: times[SEARCH]}, equal,
        cost=memory_cost(times), query_ms=times[QUERY].p50, tensors_ms=times[TENSORS].p50, entries=entries,
        normalize=cell.normalize, dtype=cell.dtype, weights="random",
    )  # fmt: skip
    report.write()
    return row


def run_memory(report: Report, cells: list[Cell]) -> None:
    """Measures the cells and prints the table."""
    lines = [("case", "alone ms", "with memory", "cost", "query ms", "sorting ms", "items with mass")]
    for cell in cells:
        print(f"{cell.name()} ...", flush=True)
        row = add_case(report, cell)
        lines.append((
            row["case"], f"{row['peer_p50_ms']:.2f}", f"{row['p50_ms']:.2f}", f"{row['cost']:+.1%}",
            f"{row['query_ms']:.2f}", f"{row['tensors_ms']:.2f}", f"{row['entries']:.0f}",
        ))  # fmt: skip
    print(format_columns(lines))
    print(f"rows in {report.options.json}")
