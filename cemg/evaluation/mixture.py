"""Searches with a memory: the candidates that a gate is fitted on, and the mixture as a ranker.

B histories per batch, W beams, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.artifacts import RunArtifacts
from cemg.data.dataset import Split
from cemg.decoding import Decoder, Recommendations
from cemg.evaluation.protocol import Rank
from cemg.generator import Prompter, Vocabulary
from cemg.mixture import Experts, Gate, Masses, Source
from cemg.mixture.fitting import POWERS, Candidates
from cemg.mixture.gate import averaged, features_of
from cemg.progress import track
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, ItemPrior, RequestFilter

SEARCHED = 1.3, 0.5  # power and weight of the sources in the search that finds candidates
TINY = 1e-6  # smallest share of the generator in a mixed score that its float32 digits resolve


@dataclass(frozen=True, slots=True)
class Mixture:
    """A generator and its sources, for searches.

    Attributes:
        decoder: The search; item rows are those of its catalog.
        prompter: Builds the prompts.
        sources: The other experts.
        counts: Training events of each item.
        batch_size: Histories per search.
    """

    decoder: Decoder
    prompter: Prompter
    sources: Sequence[Source]
    counts: np.ndarray
    batch_size: int

    def search(
        self, histories: Sequence[np.ndarray], prior: ItemPrior | None, weight: float | np.ndarray, *,
        beams: int, exclude_history: bool, allowed: ItemFilter | None = None,
    ) -> Recommendations:  # fmt: skip
        """Search for a batch of histories."""
        width = min(beams, len(self.decoder.catalog))
        filter: ItemFilter | RequestFilter | None = allowed
        if exclude_history:
            own = RequestFilter.excluding(self.decoder.trie, [history.tolist() for history in histories])
            filter = own if allowed is None else own & allowed
        prompts = self.prompter.batch(list(histories))
        if prior is None:
            return self.decoder.decode(*prompts, width, filter=filter)
        weights = weight.tolist() if isinstance(weight, np.ndarray) else weight
        return self.decoder.decode(*prompts, width, filter=filter, prior=prior, prior_weight=weights)


def open_mixture(
    artifacts: RunArtifacts, model: PreTrainedModel, vocabulary: Vocabulary, catalog: Catalog,
    sources: Sequence[Source], split: Split,
) -> Mixture:  # fmt: skip
    """Prepare searches of a run's generator with other experts."""
    return Mixture(
        decoder=Decoder(model, catalog, vocabulary.code_token_start, artifacts.normalize()),
        prompter=artifacts.prompter(model, vocabulary, catalog),
        sources=sources,
        counts=split.train_counts(len(catalog)),
        batch_size=artifacts.config.decoding.batch_size,
    )


def mixture_ranker(
    mixture: Mixture, gate: Gate, *, beams: int, constant: bool = False, exclude_history: bool = False,
    removed: Sequence[int] = (),
) -> Rank:  # fmt: skip
    """Build a ranker that searches by the mixture.

    Args:
        mixture: The generator and its sources.
        gate: The weights of the experts.
        beams: Beams per history, and the largest length of a list.
        constant: Whether every history has the same weights.
        exclude_history: Whether the search excludes the items of each history.
        removed: Catalog rows that are never listed.
    """
    experts, allowed = Experts(gate, mixture.sources, mixture.counts), None
    if removed:
        mask = torch.ones(len(mixture.decoder.catalog), dtype=torch.bool)
        mask[list(removed)] = False
        allowed = ItemFilter.from_mask(mixture.decoder.catalog.trie, mask).to(mixture.decoder.trie.device)

    def rank(histories: list[np.ndarray], top: int) -> Tensor:
        lists = []
        for start in range(0, len(histories), mixture.batch_size):
            batch = histories[start : start + mixture.batch_size]
            mixed = experts.prior(batch, exclude_history=exclude_history, constant=constant)
            prior = ItemPrior(mixed.items, mixed.mass)
            found = mixture.search(
                batch, prior, mixed.weight, beams=beams, exclude_history=exclude_history, allowed=allowed
            )
            lists.append(found.items)
        return torch.cat(lists)[:, :top]

    return rank


def find_candidates(
    mixture: Mixture, histories: Sequence[np.ndarray], targets: np.ndarray, *, beams: int,
    exclude_history: bool,
) -> Candidates | None:  # fmt: skip
    """Search twice for each history, without a prior and with the average of the sources.

    The generator's probability of an item that only the second search found is what remains of its score
    without the prior's share. None if no search found a target.
    """
    rows: list[dict[str, np.ndarray]] = []
    features, present = [], []
    order = np.argsort([len(history) for history in histories], kind="stable")
    starts = range(0, len(order), mixture.batch_size)
    for start in track(list(starts), "gate"):
        at = order[start : start + mixture.batch_size]
        batch = [histories[row] for row in at]
        found = [source(batch, exclude_history=exclude_history) for source in mixture.sources]
        power, weight = SEARCHED
        averages = [_average([own[row] for own in found], power) for row in range(len(batch))]
        prior = ItemPrior([items for items, _ in averages], [mass for _, mass in averages])
        searched = [
            mixture.search(batch, None, 0.0, beams=beams, exclude_history=exclude_history),
            mixture.search(batch, prior, weight, beams=beams, exclude_history=exclude_history),
        ]
        about = features_of(batch, found, mixture.counts)
        for row, user in enumerate(at):
            items, generator = _generator_scores(searched, averages[row], row, weight)
            if targets[user] not in items:
                continue
            parts = [own[row] for own in found]
            rows.append(_candidates(items, generator, parts, int(targets[user])))
            features.append(about[row])
            present.append([len(part.items) > 0 for part in parts])
    if not rows:
        return None
    return _padded(rows, np.array(features), np.array(present, dtype=bool), users=len(histories))


def _average(parts: Sequence[Masses], power: float) -> tuple[np.ndarray, np.ndarray]:
    present = sum(len(part.items) > 0 for part in parts)
    return averaged(parts, [power] * len(parts), [1 / max(present, 1)] * len(parts))


def _generator_scores(
    searched: Sequence[Recommendations], prior: tuple[np.ndarray, np.ndarray], row: int, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the items of both searches for one history, and the generator's log-probabilities."""
    plain, mixed = ((found.items[row].numpy(), found.scores[row].double().numpy()) for found in searched)
    first, scores = plain[0][plain[0] >= 0], plain[1][plain[0] >= 0]
    new = (mixed[0] >= 0) & ~np.isin(mixed[0], first)
    more, mixture = mixed[0][new], np.exp(mixed[1][new])
    mass = dict(zip(prior[0].tolist(), prior[1].tolist(), strict=True))
    share = weight * np.array([mass.get(item, 0.0) for item in more.tolist()])
    used = weight if len(prior[0]) else 0.0
    remaining = np.maximum(mixture - share, TINY * mixture) / (1 - used)
    return np.concatenate((first, more)), np.concatenate((scores, np.log(remaining)))


def _candidates(
    items: np.ndarray, generator: np.ndarray, parts: Sequence[Masses], target: int
) -> dict[str, np.ndarray]:
    masses, totals = [], []
    for part in parts:
        largest = part.mass.max(initial=1e-300)
        known = dict(zip(part.items.tolist(), (part.mass / largest).tolist(), strict=True))
        with np.errstate(divide="ignore"):
            masses.append(np.log([known.get(item, 0.0) for item in items.tolist()]))
            totals.append([np.log(((part.mass / largest) ** power).sum()) for power in POWERS])
    return {
        "generator": generator, "masses": np.stack(masses, 1), "totals": np.array(totals),
        "target": np.flatnonzero(items == target)[:1],
    }  # fmt: skip


def _padded(
    rows: Sequence[dict[str, np.ndarray]], features: np.ndarray, present: np.ndarray, *, users: int
) -> Candidates:
    pad = torch.nn.utils.rnn.pad_sequence

    def column(name: str) -> list[Tensor]:
        return [torch.from_numpy(row[name]).float() for row in rows]

    infinity = float("-inf")
    return Candidates(
        generator=pad(column("generator"), batch_first=True, padding_value=infinity),
        masses=pad(column("masses"), batch_first=True, padding_value=infinity),
        totals=torch.stack(column("totals")).nan_to_num(neginf=0.0),
        target=torch.cat(column("target")).long(),
        features=features,
        present=present,
        users=users,
    )
