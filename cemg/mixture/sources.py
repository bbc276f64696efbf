"""Sources of a mixture: experts that give a sparse distribution over items for a history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from cemg.memory import Memory

MASSES = 1000  # items per source and history, at most
# names of sources: the item memory, a dense model, and the generator's item softmax
MEMORY, DENSE, SOFTMAX = "memory", "dense", "softmax"
POPULARITY = "popularity"  # ranks an empty history


@dataclass(frozen=True, slots=True)
class Masses:
    """The distribution of one source for one history.

    Attributes:
        items: Item rows, [Z] int64; empty if the source says nothing about the history.
        mass: Masses above zero, [Z] float64, in the order of ``items``.
    """

    items: np.ndarray
    mass: np.ndarray

    def sharpened(self, power: float) -> np.ndarray:
        """Return the masses to ``power``, normalized, [Z] float64."""
        if not len(self.mass):
            return self.mass
        raised = (self.mass / self.mass.max()) ** power
        normalized: np.ndarray = raised / raised.sum()
        return normalized


NOTHING = Masses(np.zeros(0, np.int64), np.zeros(0))


class Source(Protocol):
    """An expert other than the generator."""

    @property
    def name(self) -> str:
        """Its name in the gate."""
        ...

    def __call__(self, histories: Sequence[np.ndarray], *, exclude_history: bool) -> list[Masses]:
        """Return a distribution per history of item rows, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class MemorySource:
    """The item memory as a source. It says nothing about a history that it connects with no item."""

    memory: Memory
    name: str = MEMORY

    def __call__(self, histories: Sequence[np.ndarray], *, exclude_history: bool) -> list[Masses]:
        """Return the scores of the memory as masses."""
        items, masses = self.memory.prior(
            histories, exclude_history=exclude_history, power=1.0, top=MASSES, popularity=False
        )
        return [Masses(rows, mass) for rows, mass in zip(items, masses, strict=True)]


class PriorModel(Protocol):
    """A model that gives the probabilities of its most probable items."""

    def prior(self, histories: Sequence[np.ndarray], top: int = ...) -> tuple[Tensor, Tensor]:
        """Return item rows and masses, [B, Z]."""
        ...


@dataclass(frozen=True, slots=True)
class DenseSource:
    """A model that scores every item, such as SASRec or BSARec, as a source: its most probable items."""

    model: PriorModel
    name: str = DENSE
    limit: int | None = None  # rows from here on are items that the search does not have
    items: int | None = None  # rows from here on have no embedding: they are left out of histories

    def __call__(self, histories: Sequence[np.ndarray], *, exclude_history: bool) -> list[Masses]:
        """Return the probabilities of the MASSES most probable items."""
        if self.items is None:
            read = list(histories)
        else:
            read = [history[np.asarray(history) < self.items] for history in histories]
        known = [row for row, history in enumerate(read) if len(history)]
        found = [NOTHING] * len(histories)
        if not known:
            return found
        items, masses = self.model.prior([read[row] for row in known], MASSES)
        for row, rows, mass in zip(known, items.cpu().numpy(), masses.cpu().numpy(), strict=True):
            new = mass > 0
            if exclude_history:
                new &= np.isin(rows, histories[row], invert=True)
            found[row] = _within(rows[new].astype(np.int64), mass[new].astype(np.float64), self.limit)
        return found


def _within(rows: np.ndarray, mass: np.ndarray, limit: int | None) -> Masses:
    if limit is None or not len(rows) or rows.max() < limit:
        return Masses(rows, mass)
    return Masses(rows[rows < limit], mass[rows < limit])
