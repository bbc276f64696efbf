"""Studies of the search: its error against the exact ranking, its certificate, and generate() as reference.

Two scores that differ by at most TIE count as equal, so results may swap their ranks there.
B users per batch, W beams, N items.
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

TIE = 1e-4  # float32 sums of log-probabilities differ by less when the order of summation changes
DEPTHS = (10, 20)
WIDTHS = (10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class Search:
    """The search of a trained run, and the users of a study; ``users`` as in ``evaluate``."""

    decoder: Decoder
    prompter: Prompter
    split: Split
    part: str
    users: np.ndarray | None
    beams: int
    batch_size: int

    @property
    def width(self) -> int:
        """Beams per user, at most one per item."""
        return min(self.beams, len(self.decoder.catalog))

    def prompts(self, histories: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over prompts and attention masks [B, S] of the histories, in order."""
        for start in range(0, len(histories), self.batch_size):
            yield self.prompter.batch(histories[start : start + self.batch_size])

    def histories(self) -> list[np.ndarray]:
        """The histories of the users, short ones first."""
        histories = self.split.histories(self.part)
        rows = range(len(histories)) if self.users is None else self.users.tolist()
        return sorted((histories[row] for row in rows), key=len)

    def evaluate(self, rank: Rank, *, max_list: int | None = None) -> Evaluation:
        """Evaluate a ranker on the users of the study."""
        return evaluate(rank, self.split, part=self.part, users=self.users, max_list=max_list)


class Recorder:
    """A ranker that records its lists and its decoding time in seconds."""

    def __init__(self, search: Search, decoder: Decoder | TransformersDecoder) -> None:
        self.search, self.decoder = search, decoder
        self.found: list[Recommendations] = []
        self.seconds = 0.0

    def __call__(self, histories: list[np.ndarray], top: int) -> Tensor:
        lists = []
        for ids, mask in self.search.prompts(histories):
            if not self.found:  # warm-up: the allocations of a first call are not timed
                self.decoder.decode(ids[:1], mask[:1], self.search.width)
            started = time.perf_counter()
            self.found.append(self.decoder.decode(ids, mask, self.search.width))
            self.seconds += time.perf_counter() - started
            lists.append(self.found[-1].items)
        return torch.cat(lists)[:, :top]


class ExactRanker:
    """Ranks by the exact scores of all items, and compares the lists of the beam search with that ranking.

    ``found`` are the lists of the beam search, in the order of the batches.
    """

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
    """Return the ``top`` catalog rows by scores [B, N], best first; [B, min(top, N)] int64.

    Items that share a semantic ID keep their order.
    """
    if catalog.shared is None:
        return scores.topk(min(top, scores.shape[1])).indices
    members = catalog.shared.members
    return members[scores[:, members].sort(dim=1, descending=True, stable=True).indices[:, :top]]


def beam_error(found: Recommendations, scores: Tensor) -> dict[str, Tensor]:
    """Compare lists [B, W] with the ranking by exact ``scores`` [B, N].

    Returns:
        One value per user, [B], for each of:

        - ``equal@k``: whether the first k are the exact first k in the same order, up to ties;
        - ``overlap@k``: the share of the exact first k among the first k;
        - ``certified``: the number of certified results;
        - ``wrong``: how many of them have another score than the exact ranking has at their rank;
        - ``score``: the largest error of a score.
    """
    depth = max(found.items.shape[1], min(max(DEPTHS), scores.shape[1]))
    found = found.padded(depth)
    empty = found.items < 0
    exact = scores.gather(1, found.items.clamp_min(0)).masked_fill(empty, float("-inf"))  # [B, depth]
    best = scores.topk(depth).values
    correct = (exact - best).abs() <= TIE
    errors: dict[str, Tensor] = {}
    for k in DEPTHS:
        first = min(k, scores.shape[1])
        errors[f"equal@{k}"] = correct[:, :first].all(1)
        errors[f"overlap@{k}"] = (exact[:, :first] >= best[:, first - 1, None] - TIE).sum(1) / first
    certified = torch.arange(depth) < found.certified[:, None]
    errors["certified"], errors["wrong"] = found.certified, (certified & ~correct).sum(1)
    return errors | {"score": (found.scores - exact).abs().masked_fill(empty, 0).amax(1)}


def exact_study(search: Search) -> dict[str, Any]:
    """Compute the metrics of the exact ranking, and the errors and wrong certificates of the beam search."""
    beam = Recorder(search, search.decoder)
    beam_evaluation = search.evaluate(beam, max_list=search.width)
    exact = ExactRanker(search, beam.found)
    evaluation = search.evaluate(exact)
    errors = {name: torch.cat([error[name] for error in exact.errors]) for name in exact.errors[0]}
    means = {name: round(float(errors[name].double().mean()), 6) for name in errors if "@" in name}
    return {
        "users": len(beam_evaluation.users), "beams": search.width,
        "seconds": round(exact.seconds, 2), "beam_seconds": round(beam.seconds, 2),
        "metrics": evaluation.metrics, "metrics_history_removed": evaluation.metrics_history_removed,
        "beam_metrics": beam_evaluation.metrics,
        "beam_metrics_history_removed": beam_evaluation.metrics_history_removed,
        **means, "certified": float(errors["certified"].double().mean()),
        "certified_wrong": int(errors["wrong"].sum()), "worst_score_difference": float(errors["score"].max()),
    }  # fmt: skip


def certificate_study(search: Search, widths: Sequence[int] = WIDTHS) -> list[dict[str, float]]:
    """Compute for each number of beams which share of the first ten, and of the whole list, is certified."""
    histories, rows = search.histories(), []
    for width in widths:
        certified_counts, list_lengths, seconds = [], [], 0.0
        for ids, mask in search.prompts(histories):
            started = time.perf_counter()
            found = search.decoder.decode(ids, mask, width)
            seconds += time.perf_counter() - started
            certified_counts.append(found.certified)
            list_lengths.append((found.items >= 0).sum(1))
        certified, lengths = torch.cat(certified_counts).double(), torch.cat(list_lengths)
        ten = lengths.clamp_max(10)
        rows.append({
            "beams": width, "users": len(certified), "seconds": round(seconds, 2),
            "first_ten": float((certified.minimum(ten) / ten).mean()),
            "whole_list": float((certified / lengths).mean()),
        })  # fmt: skip
    return rows


def list_differences(mine: Recommendations, other: Recommendations) -> tuple[Tensor, Tensor]:
    """Compare two searches of the same users.

    Lists differ where an item has different scores, or is missing in the other list although its score is
    higher than the last score there.

    Returns:
        The largest difference [B] of the two scores of an item, and whether lists differ beyond ties, [B].
    """
    same = (mine.items[:, :, None] == other.items[:, None]) & (mine.items >= 0)[:, :, None]  # [B, W, W]
    difference = (mine.scores[:, :, None] - other.scores[:, None]).abs().masked_fill(~same, 0).amax((1, 2))
    missing = _missing(mine, other, same.any(2)) | _missing(other, mine, same.any(1))
    return difference, missing | (difference > TIE)


def _missing(mine: Recommendations, other: Recommendations, shared: Tensor) -> Tensor:
    """Return whether each list has an item that the other lacks, [B]. ``shared`` [B, W]: items of both."""
    return (~shared & (mine.items >= 0) & (mine.scores > other.scores[:, -1:] + TIE)).any(1)


def engine_study(search: Search, reference: TransformersDecoder) -> dict[str, Any]:
    """Compare the engine with ``generate()`` on the same users: metrics, seconds and differing lists."""
    ours, theirs = Recorder(search, search.decoder), Recorder(search, reference)
    evaluations = {"cemg": search.evaluate(ours, max_list=search.width)}
    evaluations["transformers"] = search.evaluate(theirs, max_list=search.width)
    pairs = [list_differences(a, b) for a, b in zip(ours.found, theirs.found, strict=True)]
    differences, differ = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    seconds = {"cemg": ours.seconds, "transformers": theirs.seconds}
    engines = {
        name: {"seconds": round(seconds[name], 2), "metrics": evaluation.metrics}
        for name, evaluation in evaluations.items()
    }
    return {
        "users": len(differences), "beams": search.width, "engines": engines,
        "times_as_fast": round(theirs.seconds / ours.seconds, 2),
        "worst_score_difference": float(differences.max()), "users_that_differ": int(differ.sum()),
    }  # fmt: skip
