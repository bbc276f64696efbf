"""What an item memory costs a search: ``python bench/latency.py --memory``.

A search with a memory asks it for a prior, sorts and sums the prior's masses over the trie, and mixes them
into every step. The search alone and the search with the memory take turns, as do the two parts before the
search. The memory is synthetic: transitions between some 12,000 items, among them those of the histories, and
texts in the catalog of 12,101 items. Catalogs of other sizes have no texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cells import ITEMS, Cell
from engines import Workload
from harness import Report, Times, format_columns, measure

from cemg.decoding import Decoder, Recommendations
from cemg.memory import Memory, MemoryConfig
from cemg.memory.build import build_memory
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


def synthetic_memory(rows: np.ndarray, items: int, *, texts: bool, seed: int = 0) -> Memory:
    """A memory of a catalog of ``items`` items, of which ``rows`` occur in sequences, by Zipf's law.

    With ``texts``, so do the words of its texts.
    """
    rng = np.random.default_rng(seed)
    events = rng.permutation(rows)[rng.zipf(1.3, EVENTS) % len(rows)]
    events[: len(rows)] = rows  # each occurs
    train = np.split(events, range(LENGTH, EVENTS, LENGTH))
    if not texts:
        return build_memory(train, [None] * items, config=MemoryConfig(text="none"))
    words = np.minimum(rng.zipf(1.2, (items, TEXT)), WORDS)
    return build_memory(train, [" ".join(f"w{word}" for word in row) for row in words])


class MemoryCase:
    """A cell's search, alone and with a memory."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.workload = cell, Workload(cell)
        self.decoder = self.decoder_of(None)
        self.histories = list(self.workload.rows.numpy())
        others = torch.randint(0, cell.items, (ITEMS,), generator=torch.Generator().manual_seed(2))
        rows = torch.cat((self.workload.rows.flatten(), others)).unique().numpy()
        self.memory = synthetic_memory(rows, cell.items, texts=cell.items == ITEMS)

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
