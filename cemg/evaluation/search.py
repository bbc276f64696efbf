"""How good the search is: its error against the exact ranking, what its certificate proves, its yardstick.

Two scores within TIE are one score: results that swap places there are the same result.
B users of a batch, W beams, N items.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cemg.data.dataset import Split
from cemg.decoding import Decoder, Recommendations, TransformersDecoder, score_all
from cemg.evaluation.protocol import Evaluation, Rank, evaluate
from cemg.generator import Prompter
from cemg.tokenizer import Catalog

TIE = 1e-4  # float32 sums of log-probabilities, added up in another order, differ by less
DEPTHS = (10, 20)
WIDTHS = (10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class Search:
    """A trained run's search and the users it is examined on; ``users`` as for ``evaluate``."""

    decoder: Decoder
    prompter: Prompter
    split: Split
    part: str
    users: np.ndarray | None
    beams: int
    batch_size: int

    @property
    def width(self) -> int:
        return min(self.beams, len(self.decoder.catalog))

    def prompts(self, histories: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompts and masks [B, S] of the histories, in their order."""
        for first in range(0, len(histories), self.batch_size):
            yield self.prompter.batch(histories[first : first + self.batch_size])

    def examined(self) -> list[np.ndarray]:
        """The histories of the users, short ones first."""
        histories = self.split.histories(self.part)
        rows = range(len(histories)) if self.users is None else self.users.tolist()
        return sorted((histories[row] for row in rows), key=len)

    def evaluate(self, rank: Rank, *, max_list: int | None = None) -> Evaluation:
        return evaluate(rank, self.split, part=self.part, users=self.users, max_list=max_list)


class Recorder:
    """A ranker that keeps its lists and the seconds they took."""

    def __init__(self, search: Search, decoder: Decoder | TransformersDecoder) -> None:
        self.search, self.decoder = search, decoder
        self.found: list[Recommendations] = []
        self.seconds = 0.0

    def __call__(self, histories: list[np.ndarray], top: int) -> Tensor:
        lists = []
        for ids, mask in self.search.prompts(histories):
            if not self.found:  # what a first call allocates is not timed
                self.decoder.decode(ids[:1], mask[:1], self.search.width)
            started = time.perf_counter()
            self.found.append(self.decoder.decode(ids, mask, self.search.width))
            self.seconds += time.perf_counter() - started
            lists.append(self.found[-1].items)
        return torch.cat(lists)[:, :top]


class ExactRanker:
    """Ranks by the scores of all items, and compares the beam's lists, given in the same order, with them."""

    def __init__(self, search: Search, found: Sequence[Recommendations]) -> None:
        self.search, self.found = search, iter(found)
        self.errors: list[dict[str, Tensor]] = []
        self.seconds = 0.0

    def __call__(self, histories: list[np.ndarray], top: int) -> Tensor:
        lists = []
        for ids, mask in self.search.prompts(histories):
            started = time.perf_counter()
            scores = score_all(self.search.decoder, ids, mask)
            self.seconds += time.perf_counter() - started
            self.errors.append(beam_error(next(self.found), scores))
            lists.append(best_rows(scores, self.search.decoder.catalog, top))
        return torch.cat(lists)


def best_rows(scores: Tensor, catalog: Catalog, top: int) -> Tensor:
    """The ``top`` catalog rows by scores [B, N], best first; the items of one semantic ID in their order."""
    if catalog.shared is None:
        return scores.topk(min(top, scores.shape[1])).indices
    members = catalog.shared.members
    return members[scores[:, members].sort(dim=1, descending=True, stable=True).indices[:, :top]]


def beam_error(found: Recommendations, scores: Tensor) -> dict[str, Tensor]:
    """How far lists [B, W] are from the ranking by exact ``scores`` [B, N]; each figure [B].

    ``equal@k``: the first k are the true first k in their order, up to ties; ``overlap@k``: the share of the
    true first k among them; ``certified`` results, and how many of them are ``wrong``: not of the score that
    stands at their place of the exact ranking; ``score``: the largest error of a score.
    """
    depth = max(found.items.shape[1], min(max(DEPTHS), scores.shape[1]))
    found = found.padded(depth)
    none = found.items < 0
    mine = scores.gather(1, found.items.clamp_min(0)).masked_fill(none, float("-inf"))  # [B, depth]
    best = scores.topk(depth).values
    right = (mine - best).abs() <= TIE
    figures: dict[str, Tensor] = {}
    for k in DEPTHS:
        first = min(k, scores.shape[1])
        figures[f"equal@{k}"] = right[:, :first].all(1)
        figures[f"overlap@{k}"] = (mine[:, :first] >= best[:, first - 1, None] - TIE).sum(1) / first
    lead = torch.arange(depth) < found.certified[:, None]
    figures["certified"], figures["wrong"] = found.certified, (lead & ~right).sum(1)
    return figures | {"score": (found.scores - mine).abs().masked_fill(none, 0).amax(1)}


def exact_study(search: Search) -> dict[str, Any]:
    """The metrics of the exact ranking, the beam's error as numbers, and whether its certificate holds."""
    beam = Recorder(search, search.decoder)
    found = search.evaluate(beam, max_list=search.width)
    exact = ExactRanker(search, beam.found)
    ranked = search.evaluate(exact)
    each = {name: torch.cat([error[name] for error in exact.errors]) for name in exact.errors[0]}
    means = {name: round(float(each[name].double().mean()), 6) for name in each if "@" in name}
    return {
        "users": len(found.users), "beams": search.width,
        "seconds": round(exact.seconds, 2), "beam_seconds": round(beam.seconds, 2),
        "metrics": ranked.metrics, "metrics_history_removed": ranked.metrics_history_removed,
        "beam_metrics": found.metrics, "beam_metrics_history_removed": found.metrics_history_removed,
        **means, "certified": float(each["certified"].double().mean()),
        "certified_wrong": int(each["wrong"].sum()), "worst_score_difference": float(each["score"].max()),
    }  # fmt: skip


def certificate_study(search: Search, widths: Sequence[int] = WIDTHS) -> list[dict[str, float]]:
    """For each number of beams: the mean share of the first ten, and of the whole list, that is proven."""
    histories, rows = search.examined(), []
    for width in widths:
        proven, length, seconds = [], [], 0.0
        for ids, mask in search.prompts(histories):
            started = time.perf_counter()
            found = search.decoder.decode(ids, mask, width)
            seconds += time.perf_counter() - started
            proven.append(found.certified)
            length.append((found.items >= 0).sum(1))
        certified, whole = torch.cat(proven).double(), torch.cat(length)
        ten = whole.clamp_max(10)
        rows.append({
            "beams": width, "users": len(certified), "seconds": round(seconds, 2),
            "first_ten": float((certified.minimum(ten) / ten).mean()),
            "whole_list": float((certified / whole).mean()),
        })  # fmt: skip
    return rows


def list_differences(mine: Recommendations, other: Recommendations) -> tuple[Tensor, Tensor]:
    """The largest difference [B] of an item's two scores, and whether the lists [B, W] differ beyond ties.

    They differ where an item has two scores, or is missing in one list though it beats that list's last.
    """
    same = (mine.items[:, :, None] == other.items[:, None]) & (mine.items >= 0)[:, :, None]  # [B, W, W]
    apart = (mine.scores[:, :, None] - other.scores[:, None]).abs().masked_fill(~same, 0).amax((1, 2))
    missing = _missing(mine, other, same.any(2)) | _missing(other, mine, same.any(1))
    return apart, missing | (apart > TIE)


def _missing(mine: Recommendations, other: Recommendations, shared: Tensor) -> Tensor:
    return (~shared & (mine.items >= 0) & (mine.scores > other.scores[:, -1:] + TIE)).any(1)


def engine_study(search: Search, yardstick: TransformersDecoder) -> dict[str, Any]:
    """The engine and ``generate()`` on the same users: metrics, seconds, and where their lists differ."""
    ours, theirs = Recorder(search, search.decoder), Recorder(search, yardstick)
    scored = {"cemg": search.evaluate(ours, max_list=search.width)}
    scored["transformers"] = search.evaluate(theirs, max_list=search.width)
    pairs = [list_differences(a, b) for a, b in zip(ours.found, theirs.found, strict=True)]
    apart, differ = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    seconds = {"cemg": ours.seconds, "transformers": theirs.seconds}
    engines = {
        name: {"seconds": round(seconds[name], 2), "metrics": found.metrics} for name, found in scored.items()
    }
    return {
        "users": len(apart), "beams": search.width, "engines": engines,
        "times_as_fast": round(theirs.seconds / ours.seconds, 2),
        "worst_score_difference": float(apart.max()), "users_that_differ": int(differ.sum()),
    }  # fmt: skip
