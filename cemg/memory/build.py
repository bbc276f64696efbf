"""Building an item memory from training sequences and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cemg.errors import UserError
from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.memory import Memory, ids_digest
from cemg.memory.rows import Rows, item_factors
from cemg.memory.similarity import most_similar, text_vectors
from cemg.memory.transitions import count_transitions, flatten


def build_memory(
    train: Sequence[np.ndarray],
    texts: Sequence[str | None],
    *,
    item_ids: Sequence[str | int] | None = None,
    config: MemoryConfig | None = None,
    constants: Constants | None = None,
) -> Memory:
    """Build a memory with given constants.

    Args:
        train: Training items (rows) of each user, oldest first.
        texts: Texts of the N items; without any, the memory has no text similarity.
        item_ids: Ids of the items, by default their rows.
        config: Settings.
        constants: Constants; ``scale`` is computed. None takes the default ones.

    Raises:
        UserError: There is no training interaction.
    """
    config, constants = config or MemoryConfig(), constants or Constants()
    items, _ = flatten(train)
    if not len(items):
        raise UserError(
            "there is no training interaction for the memory", fix="check the data: cemg-data stats"
        )
    counts = np.bincount(items, minlength=len(texts)).astype(np.int64)
    transitions = count_transitions(
        train, len(texts), window=config.window, step_decay=constants.step_decay, backward=constants.backward,
        exponent=constants.exponent,
    )  # fmt: skip
    vectors = text_vectors(texts) if config.text == "tfidf" else None
    similar = None if vectors is None else most_similar(vectors, config.similar_items)
    scale = transition_scale(transitions, counts, constants.exponent)
    catalog = ids_digest(range(len(texts)) if item_ids is None else item_ids)
    return Memory(config, dataclasses.replace(constants, scale=scale), counts, transitions, similar, catalog)


def transition_scale(transitions: Rows, counts: np.ndarray, exponent: float) -> float:
    """Return the median over items of the largest transition score from the item."""
    factors = item_factors(counts, exponent)
    best = np.zeros(len(transitions))
    filled = np.flatnonzero(np.diff(transitions.starts))
    first = transitions.starts[filled]  # rows are sorted by it
    best[filled] = factors[filled] * transitions.values[first] * factors[transitions.items[first]]
    return float(np.median(best))
