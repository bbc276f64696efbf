"""Choosing the constants of a memory on the validation users: the largest NDCG@10, by coordinate search.

U users, E entries. For each user, every (history item, candidate) pair of the transitions and of the text
similarity is an entry. Entries with the same user and candidate share a cell, so the scores under any
constants are two weighted sums over entries. Test items are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cemg.data.dataset import Split
from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.counting import transition_scale
from cemg.memory.rows import Rows, item_factors, joined
from cemg.progress import Log

USERS = 5_000  # validation users of a search, evenly spaced
CELLS = 20_000_000  # limit of the entries: bounds the memory of a search to some 600 MB
REPEATS = 0.01  # people come back, if at least this share of the training events repeats an item
CUTOFF = 10
GRID: dict[str, tuple[float, ...]] = {  # in the order of the search
    "decay": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "text_weight": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "exponent": (0.1, 0.2, 0.3, 0.4, 0.5),
    "text_decay": (0.5, 0.65, 0.8, 0.9),
}
REPEAT_GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
ROUNDS = 2
POWERS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5)
User = tuple[np.ndarray, int, np.ndarray]  # items that a query reads, newest first; target; whole history


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of one source of scores.

    Attributes:
        cells: [E] int32, cell of the entry.
        recency: [E] int32, of the history item.
        sources: [E] int32, the history item.
        values: [E] float32, T or C.
    """

    cells: np.ndarray
    recency: np.ndarray
    sources: np.ndarray
    values: np.ndarray


def repeat_share(train: Sequence[np.ndarray]) -> float:
    """Return the share of training events whose item the user has had before."""
    events = sum(map(len, train))
    return 1 - sum(len(np.unique(sequence)) for sequence in train) / max(events, 1)


class Validation:
    """Scores of validation users under given constants.

    Args:
        split: The split. Its test items are not read.
        transitions: T of the training sequences.
        similar: C, or None.
        config: Settings of the memory.
        keeps_history: Whether an item of the history may be recommended; if not, it has no rank.
    """

    def __init__(
        self, split: Split, transitions: Rows, similar: Rows | None, *, config: MemoryConfig,
        keeps_history: bool,
    ) -> None:  # fmt: skip
        num_items = len(transitions)
        self.counts = split.train_counts(num_items)
        self.transitions = transitions
        self._transitions: tuple[tuple[float, float], np.ndarray] | None = None
        self._text: tuple[float, np.ndarray] | None = None
        histories, targets = split.histories("valid"), split.targets("valid")
        chosen = np.unique(np.linspace(0, len(targets) - 1, min(USERS, len(targets))).astype(np.int64))
        users = [
            (histories[user][-config.history_items :][::-1], int(targets[user]), histories[user])
            for user in chosen
        ]
        users = _within(users, transitions, similar, config)
        self.ages = np.arange(max(len(items) for items, _, _ in users))  # recencies of history items
        sources = [(transitions, config.transition_items)]
        sources += [] if similar is None else [(similar, config.similar_items)]
        raw = [_entries_of(users, rows, top) for rows, top in sources]
        own = [np.stack((np.full(len(h), u), h)) for u, (h, _, _) in enumerate(users)]
        own_keys = _keys(np.concatenate(own, axis=1), num_items)
        keys = np.unique(np.concatenate([own_keys, *(_keys(pairs, num_items) for pairs, _ in raw)]))
        self.items, self.users = (keys % num_items).astype(np.int32), (keys // num_items).astype(np.int32)
        self.parts = [
            Entries(np.searchsorted(keys, _keys(pairs, num_items)).astype(np.int32), *others)
            for pairs, others in raw
        ]
        self.own = np.searchsorted(keys, own_keys)
        self.own_recency = np.concatenate([np.arange(len(h)) for h, _, _ in users])
        goals = np.array([user * num_items + target for user, (_, target, _) in enumerate(users)])
        self.target = np.minimum(np.searchsorted(keys, goals), len(keys) - 1)
        self.is_reachable = keys[self.target] == goals
        self.ranked = np.ones(len(keys), dtype=bool)
        if not keeps_history:  # the whole history, beyond the items that a query reads
            whole = [
                user * num_items + history.astype(np.int64) for user, (_, _, history) in enumerate(users)
            ]
            self.ranked = np.isin(keys, np.concatenate(whole), invert=True)

    def scores(self, constants: Constants) -> np.ndarray:
        """Return the score of every cell, float64; ``constants.scale`` is used as it is."""
        total = self._transition_part(constants.decay, constants.exponent)
        if len(self.parts) > 1 and constants.text_weight > 0:
            total = total + constants.scale * constants.text_weight * self._text_part(constants.text_decay)
        if constants.repeat_weight > 0:
            fading = constants.text_decay ** self.own_recency.astype(np.float64)
            own = np.bincount(self.own, fading, len(self.items))
            total = total + constants.scale * constants.repeat_weight * own
        scores: np.ndarray = total * self.ranked
        return scores

    def _transition_part(self, decay: float, exponent: float) -> np.ndarray:
        """The sum over transitions per cell. The last one is kept, for the search changes one constant."""
        if self._transitions is None or self._transitions[0] != (decay, exponent):
            factors = item_factors(self.counts, exponent)
            part = self.parts[0]
            weights = (decay**self.ages)[part.recency] * factors[part.sources] * part.values
            total = np.bincount(part.cells, weights, len(self.items)) * factors[self.items]
            self._transitions = ((decay, exponent), total)
        return self._transitions[1]

    def _text_part(self, decay: float) -> np.ndarray:
        """The sum over similar items per cell; the last one is kept."""
        if self._text is None or self._text[0] != decay:
            part = self.parts[1]
            weights = (decay**self.ages)[part.recency] * part.values
            self._text = (decay, np.bincount(part.cells, weights, len(self.items)))
        return self._text[1]

    def scaled(self, constants: Constants) -> Constants:
        """Return the constants with the scale that belongs to their exponent."""
        scale = transition_scale(self.transitions, self.counts, constants.exponent)
        return dataclasses.replace(constants, scale=scale)

    def ndcg(self, constants: Constants) -> float:
        """Return the mean NDCG@10 of the users. Equal scores count as half a rank."""
        scores = self.scores(self.scaled(constants))
        goal = np.where(self.is_reachable, scores[self.target], 0.0)
        above = np.bincount(self.users, scores > goal[self.users], len(goal))
        equal = np.bincount(self.users, scores == goal[self.users], len(goal)) - 1
        ranks = above + np.maximum(equal, 0) / 2
        gains = np.where((goal > 0) & (ranks < CUTOFF), 1 / np.log2(ranks + 2), 0.0)
        return float(gains.mean())

    def log_likelihood(self, constants: Constants, power: float) -> float:
        """Return the mean log-probability of the targets that have a score, under scores to a power."""
        scores = self.scores(self.scaled(constants))
        goal = np.where(self.is_reachable, scores[self.target], 0.0)
        largest = np.maximum.reduceat(scores, np.searchsorted(self.users, np.arange(len(goal))))
        largest = np.where(largest > 0, largest, 1.0)  # of users without any score, who are not counted
        mass = np.bincount(self.users, (scores / largest[self.users]) ** power, len(goal))
        known = goal > 0
        if not known.any():
            return 0.0
        return float(np.mean(power * np.log(goal[known] / largest[known]) - np.log(mass[known])))


def fit_constants(
    split: Split, transitions: Rows, similar: Rows | None, *, config: MemoryConfig, log: Log | None = None
) -> Constants:
    """Choose the constants for the validation users.

    If at least REPEATS of the training events repeat an item of the user, the repeat term is fitted and the
    history stays in the ranking; if not, both are left out.

    Args:
        split: The split.
        transitions: T of its training sequences.
        similar: C, or None.
        config: Settings of the memory.
        log: Receives ``memory/ndcg@10`` after each choice, and the chosen values.
    """
    repeats = repeat_share(split.train) >= REPEATS
    validation = Validation(split, transitions, similar, config=config, keeps_history=repeats)
    grid = {
        name: values for name, values in GRID.items() if similar is not None or not name.startswith("text")
    }
    if repeats:
        grid |= {"repeat_weight": REPEAT_GRID, "text_decay": GRID["text_decay"]}
    best = Constants() if similar is not None else Constants(text_weight=0.0)
    score = validation.ndcg(best)
    tried = {best}
    for step, (name, values) in enumerate(_rounds(grid)):
        for value in values:
            trial = dataclasses.replace(best, **{name: value})
            if trial in tried:
                continue
            tried.add(trial)
            found = validation.ndcg(trial)
            if found > score:
                best, score = trial, found
        if log is not None:
            log(step, {"memory/ndcg@10": score, f"memory/{name}": getattr(best, name)})
    power = max(POWERS, key=lambda power: validation.log_likelihood(best, power))
    return dataclasses.replace(validation.scaled(best), power=power)


def _rounds(grid: dict[str, tuple[float, ...]]) -> Iterator[tuple[str, tuple[float, ...]]]:
    for _ in range(ROUNDS):
        yield from grid.items()


def _within(users: list[User], transitions: Rows, similar: Rows | None, config: MemoryConfig) -> list[User]:
    """Every second user, as often as needed to stay below the limit of entries."""

    def entries(history: np.ndarray) -> int:
        count = int(np.minimum(np.diff(transitions.starts)[history], config.transition_items).sum())
        return count + (0 if similar is None else len(history) * config.similar_items)

    sizes = np.array([entries(history) for history, _, _ in users])
    while len(users) > 1 and sizes.sum() > CELLS:
        users, sizes = users[::2], sizes[::2]
    return users


def _entries_of(
    users: list[User], rows: Rows, top: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(user, item) pairs [2, E] of all entries, and the recency, source and value of each."""
    history = np.concatenate([items for items, _, _ in users])
    user = np.repeat(np.arange(len(users)), [len(items) for items, _, _ in users])
    recency = np.concatenate([np.arange(len(items), dtype=np.int32) for items, _, _ in users])
    items, values, lengths = joined([rows.row(item, top) for item in history.tolist()])
    pairs = np.stack((np.repeat(user, lengths), items))
    return pairs, (np.repeat(recency, lengths), np.repeat(history, lengths), values)


def _keys(pairs: np.ndarray, num_items: int) -> np.ndarray:
    keys: np.ndarray = pairs[0].astype(np.int64) * num_items + pairs[1]
    return keys
