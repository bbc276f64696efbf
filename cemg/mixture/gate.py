"""The gate: the weights of the experts of a mixture, from how confident each source is about a history.

B histories, S sources, E = 1 + S experts (the generator first), F features. With features x, standardized:

    w = softmax(bias + x A),  P = w_0 P_generator + sum_s w_s P_s^(power_s) / Z_s

A source that says nothing about a history has weight 0 there, and the other weights are scaled to sum to 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from cemg.errors import DamagedError
from cemg.mixture.sources import DENSE, MEMORY, POPULARITY, SOFTMAX, Masses, Source
from cemg.storage import files
from cemg.storage.read import RESTORE, STRICT, check_signature, read_json, signed

GATE_FILE = "gate.json"
FORMAT = 1  # of the file
PER_SOURCE = ("largest", "entropy", "items")  # features of each source
COMMON = ("length", "rare", "newest")  # features of the history
RARE = 5  # a history item is rare if it has at most this many training events
MAX_WEIGHT = 1 - 1e-9  # of a prior: the generator has a share, but too small to change the order of others


@dataclass(frozen=True, slots=True)
class Mixed:
    """The prior of a search, before it meets a trie: per history item rows, masses, and the weight.

    ``parts`` has the addends of the masses by the name of their source, per history.
    """

    items: list[np.ndarray]
    mass: list[np.ndarray]
    weight: np.ndarray
    parts: list[dict[str, Masses]]

    def fractions(self, history: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return how much of the mass of item rows [n] is from each source; 0 for items without mass.

        An item filter scales all masses by one factor, so it does not change these fractions.
        """
        masses = {name: _masses_of(part, rows) for name, part in self.parts[history].items()}
        total = sum(masses.values(), np.zeros(len(rows)))
        return {name: mass / np.where(total > 0, total, 1.0) for name, mass in masses.items()}


@dataclass(frozen=True, slots=True)
class Gate:
    """Fitted weights of the experts.

    Attributes:
        sources: Names of the sources, S.
        powers: Power of each source's masses, S.
        constant: Weights of the experts if they are the same for every history, E.
        constant_powers: The powers that were fitted with ``constant``, S.
        bias: Logits of the experts for average features, E.
        slopes: A, F x E: one row per feature (see ``feature_names``).
        means: Means of the features, F.
        scales: Standard deviations of the features, F.
        memory: Digest of the memory that the gate was fitted with.
        repeats: Whether sources give mass to items of the history; not where users do not return to items.
        fit: Facts about the fit, for reports.
        format: Format of the file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sources: list[str]
    powers: list[float]
    constant: list[float]
    bias: list[float]
    slopes: list[list[float]]
    means: list[float]
    scales: list[float]
    memory: str
    repeats: bool = True
    fit: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    sha256: str | None = None

    def weights(self, features: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Return the weights of the experts, [B, E] float64.

        Args:
            features: [B, F], see ``features_of``.
            present: [B, S] bool, whether each source says something about the history.
        """
        logits = np.asarray(self.bias) + ((features - self.means) / self.scales) @ np.asarray(self.slopes)
        return normalized(np.exp(logits - logits.max(1, keepdims=True)), present)

    def constant_weights(self, present: np.ndarray) -> np.ndarray:
        """Return the same weights for every history, [B, E], but 0 for sources that say nothing."""
        return normalized(np.tile(np.asarray(self.constant), (len(present), 1)), present)

    def save(self, folder: Path | str) -> None:
        """Write ``gate.json``, signed."""
        record = {name: value for name, value in dataclasses.asdict(self).items() if name != "sha256"}
        files.write_json(Path(folder) / GATE_FILE, signed(record))

    @classmethod
    def load(cls, path: Path | str, *, fix: str = RESTORE) -> Gate:
        """Read what ``save`` wrote. Raises DamagedError if it is missing, altered or incomplete."""
        path = Path(path)
        record = read_json(path, dict[str, Any], fix=fix)
        check_signature(record, name=str(path), fix=fix)
        gate = read_json(path, cls, fix=fix)
        experts, width = 1 + len(gate.sources), len(feature_names(gate.sources))
        sizes = (len(gate.constant), len(gate.bias), *{len(row) for row in gate.slopes})
        if set(sizes) != {experts} or {len(gate.slopes), len(gate.means), len(gate.scales)} != {width}:
            raise DamagedError(f"{path} is damaged", cause="its numbers do not fit its sources", fix=fix)
        problem = gate._problem()
        if problem is not None:
            raise DamagedError(f"{path} cannot be used", cause=problem, fix=fix)
        return gate

    def _problem(self) -> str | None:
        """Why the gate cannot weigh experts; None if it can."""
        if self.format != FORMAT:
            return f"it has format {self.format}; this version reads format {FORMAT}"
        known = (MEMORY, DENSE, SOFTMAX)
        if not self.sources or self.sources != [name for name in known if name in self.sources]:
            return f"its sources are {self.sources}, not some of {', '.join(known)}, in this order"
        numbers = np.array([*self.constant, *self.bias, *self.means, *self.scales, *self.powers])
        if (
            len(self.powers) != len(self.sources)
            or not np.isfinite([*numbers, *sum(self.slopes, list[float]())]).all()
        ):
            return "it has too few powers, or numbers that are not finite"
        if min(self.constant) < 0 or not sum(self.constant) > 0 or min(*self.powers, *self.scales) <= 0:
            return "a weight is negative, or a power or scale is not positive"
        return None


@dataclass(frozen=True, slots=True)
class Experts:
    """A gate with its sources.

    Attributes:
        gate: The weights.
        sources: The sources, in the order of ``gate.sources``.
        counts: Training events of each item, [N].
    """

    gate: Gate
    sources: Sequence[Source]
    counts: np.ndarray

    def prior(
        self, histories: Sequence[Sequence[int] | np.ndarray], *, constant: bool = False,
        exclude_history: bool = False,
    ) -> Mixed:  # fmt: skip
        """Average the sources to one prior per history. An empty history gets popularity.

        The weight of a prior is at most MAX_WEIGHT: the generator ranks the items that no source knows, below
        all others, so that a list is full.

        Args:
            histories: B histories of item rows, oldest first.
            constant: Whether every history has the same weights.
            exclude_history: Whether the items of the history have no mass, also where the gate has repeats.
        """
        rows = [np.asarray(history, dtype=np.int64) for history in histories]
        exclude = exclude_history or not self.gate.repeats
        found = [source(rows, exclude_history=exclude) for source in self.sources]
        present = np.array([[len(part.items) > 0 for part in own] for own in found], dtype=bool).T
        if constant:
            weights = self.gate.constant_weights(present)
        else:
            weights = self.gate.weights(features_of(rows, found, self.counts), present)
        parts = [
            _weighted([own[row] for own in found], self.gate.powers, weights[row, 1:])
            for row in range(len(rows))
        ]
        share = np.minimum(1 - weights[:, 0], MAX_WEIGHT)
        named = [
            {self.gate.sources[number]: part for number, part in own.items()} if len(history) else
            {POPULARITY: Masses(np.flatnonzero(self.counts), self.counts[self.counts > 0].astype(np.float64))}
            for own, history in zip(parts, rows, strict=True)
        ]  # fmt: skip
        share[[not len(history) for history in rows]] = MAX_WEIGHT
        summed = [_summed([*own.values()]) for own in named]
        return Mixed([items for items, _ in summed], [mass for _, mass in summed], share, named)


def normalized(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return weights [B, E] that are 0 for sources without items and sum to 1."""
    allowed = np.concatenate([np.ones((len(present), 1)), present], axis=1) * weights
    total = allowed.sum(1, keepdims=True)
    generator = np.zeros_like(allowed)
    generator[:, 0] = 1.0  # where nothing else has a weight
    shares: np.ndarray = np.where(total > 0, allowed / np.where(total > 0, total, 1.0), generator)
    return shares


def averaged(
    parts: Sequence[Masses], powers: Sequence[float], weights: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return item rows, each once, and the average of the sources' masses; the weights need not sum to 1."""
    return _summed([*_weighted(parts, powers, weights).values()])


def _weighted(
    parts: Sequence[Masses], powers: Sequence[float], weights: Sequence[float] | np.ndarray
) -> dict[int, Masses]:
    """Return the addends of the average by the number of their source."""
    given = enumerate(zip(parts, powers, weights, strict=True))
    return {
        number: Masses(part.items, weight * part.sharpened(power))
        for number, (part, power, weight) in given
        if len(part.items) and weight > 0
    }


def _summed(parts: Sequence[Masses]) -> tuple[np.ndarray, np.ndarray]:
    if len(parts) == 1:
        return parts[0].items, parts[0].mass
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0)
    items, position = np.unique(np.concatenate([part.items for part in parts]), return_inverse=True)
    return items, np.bincount(position, np.concatenate([part.mass for part in parts]), len(items))


def _masses_of(part: Masses, rows: np.ndarray) -> np.ndarray:
    """Return the masses of item rows, [n]; 0 for those that the source does not have."""
    order = np.argsort(part.items, kind="stable")
    place = order[np.minimum(np.searchsorted(part.items, rows, sorter=order), len(order) - 1)]
    masses: np.ndarray = np.where(part.items[place] == rows, part.mass[place], 0.0)
    return masses


def feature_names(sources: Sequence[str]) -> list[str]:
    """Return the names of the features, F."""
    return [f"{source}.{name}" for source in sources for name in PER_SOURCE] + list(COMMON)


def features_of(
    histories: Sequence[np.ndarray], found: Sequence[Sequence[Masses]], counts: np.ndarray
) -> np.ndarray:
    """Return the features of histories, [B, F] float64. Nothing of a target is in them.

    Per source: the logarithm of the largest mass, the entropy, and the logarithm of the number of items. Of
    the history: the logarithm of its length, the share of rare items, and the logarithm of the number of
    training events of its newest item.

    Args:
        histories: B histories of item rows, oldest first.
        found: The masses of each source, S lists of B.
        counts: Training events of each item, [N].
    """
    columns = [[_confidence(part) for part in own] for own in found]
    common = [_about(history, counts) for history in histories]
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in (*columns, common)], axis=1)


def _confidence(part: Masses) -> tuple[float, float, float]:
    if not len(part.mass):
        return 0.0, 0.0, 0.0
    mass = part.mass / part.mass.sum()
    log = np.log(mass)
    return float(log.max()), float(-(mass @ log)), float(np.log(len(mass)))


def _about(history: np.ndarray, counts: np.ndarray) -> tuple[float, float, float]:
    if not len(history):
        return 0.0, 1.0, 0.0
    known = counts[history[history < len(counts)]]
    if not len(known):
        return float(np.log1p(len(history))), 1.0, 0.0
    return float(np.log1p(len(history))), float((known <= RARE).mean()), float(np.log1p(known[-1]))
