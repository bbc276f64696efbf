"""Building an item memory from training sequences and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cemg.data.dataset import Dataset, Split
from cemg.errors import UserError
from cemg.memory.checks import check_sequences, check_texts
from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.counting import count_transitions, flatten, transition_scale
from cemg.memory.fit import fit_constants
from cemg.memory.memory import Memory, ids_digest
from cemg.memory.rows import Rows
from cemg.memory.similarity import Similarity, TextIndex
from cemg.progress import Log


def build_memory(
    train: Sequence[np.ndarray],
    texts: Sequence[str | None],
    *,
    item_ids: Sequence[str | int] | None = None,
    config: MemoryConfig | None = None,
    constants: Constants | None = None,
    index: TextIndex | None = None,
) -> Memory:
    """Build a memory with given constants.

    Args:
        train: Training items (rows) of each user, oldest first.
        texts: Texts of the N items; without any, the memory has no text similarity.
        item_ids: Ids of the items, by default their rows.
        config: Settings.
        constants: Constants; a ``scale`` of 0 is computed. None takes the default ones.
        index: Words and vectors of the texts; None fits them.

    Raises:
        UserError: There is no training interaction, a sequence has an item without a row, or ``item_ids`` has
            another length than ``texts``.
    """
    check_texts(texts)
    check_sequences(train, len(texts))
    if item_ids is not None and len(item_ids) != len(texts):
        raise UserError(f"there are {len(item_ids)} item ids but texts of {len(texts)} items")
    config, constants = config or MemoryConfig(), constants or Constants()
    counts = _counts(train, len(texts))
    transitions = count_transitions(train, len(texts), window=config.window, constants=constants)
    similar = None
    if config.text == "tfidf" and (index := index or TextIndex.fit(texts)) is not None:
        similar = index.most_similar(config.similar_items)
    if constants.scale == 0:
        scale = transition_scale(transitions, counts, constants.exponent)
        constants = dataclasses.replace(constants, scale=scale)
    return _assembled(config, constants, counts, transitions, similar, index, item_ids)


def fit_memory(
    data: Dataset, split: Split, *, config: MemoryConfig, log: Log | None = None, scratch: Path | None = None
) -> Memory:
    """Build the memory of a data set from its training part, with constants chosen on its validation users.

    Args:
        data: The data set.
        split: Its split. The test items are not read.
        config: Settings.
        log: Receives the search of `fit_constants`.
        scratch: A folder for the entries of the memory while it is built, and for as long as it is used; see
            `RowsWriter`. None keeps them in memory: about 800 bytes per item for the most similar texts, and
            8 bytes per transition, of which there are up to 20 per training event with the default window.

    Raises:
        UserError: There is no training interaction.
        StorageError: The disk of ``scratch`` is full.
    """
    counts = _counts(split.train, data.num_items)
    index = TextIndex.fit(data.texts) if config.text == "tfidf" else None
    similar = None if index is None else index.most_similar(config.similar_items, scratch=scratch)
    default = Constants()
    transitions = count_transitions(
        split.train, data.num_items, window=config.window, constants=default, scratch=scratch
    )
    constants = fit_constants(split, transitions, similar, config=config, log=log)
    if constants.exponent != default.exponent:  # it orders the rows
        del transitions  # before the new ones are counted
        transitions = count_transitions(
            split.train, data.num_items, window=config.window, constants=constants, scratch=scratch
        )
    return _assembled(config, constants, counts, transitions, similar, index, data.item_ids)


def _counts(train: Sequence[np.ndarray], num_items: int) -> np.ndarray:
    items, _ = flatten(train)
    if not len(items):
        raise UserError(
            "there is no training interaction for the memory", fix="check the data: cemg-data stats"
        )
    return np.bincount(items, minlength=num_items).astype(np.int64)


def _assembled(
    config: MemoryConfig, constants: Constants, counts: np.ndarray, transitions: Rows, similar: Rows | None,
    index: TextIndex | None, item_ids: Sequence[str | int] | None,
) -> Memory:  # fmt: skip
    similarity = None
    if similar is not None and index is not None:
        similarity = Similarity(similar, top=config.similar_items, index=index)
    catalog = ids_digest(range(len(counts)) if item_ids is None else item_ids)
    return Memory(config, constants, counts, transitions, similarity, catalog, len(counts))
