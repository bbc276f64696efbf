"""The scores of a query in one call of C++: those of `Memory.scores`, for a memory without live changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.rows import Rows
from cemg_kernels.runtime.dispatch import native


class NativeScores:
    """Scores of histories, from matrices that must not change.

    Args:
        transitions: T, at least one row.
        similar: C; None for a catalog without texts.
        factors: ``max(n_i, 1) ** -exponent``, [N] float64.
        config: How many entries of a row a query reads.
        constants: Decays and weights.
    """

    def __init__(
        self, transitions: Rows, similar: Rows | None, factors: np.ndarray, config: MemoryConfig,
        constants: Constants,
    ) -> None:  # fmt: skip
        self.constants, self.factors = constants, factors
        self._read: list[np.ndarray] = []  # by C++, so they must stay
        reads_texts = similar is not None and constants.text_weight > 0
        self.similar = similar if reads_texts else None
        self._transitions, transition_terms = self._rows_of(transitions, config.transition_items)
        self._similar, similar_terms = self._rows_of(self.similar or transitions, config.similar_items)
        self._terms = transition_terms + (similar_terms if reads_texts else 0) + 1  # per item of a history

    def _rows_of(self, rows: Rows, top: int) -> tuple[Any, int]:
        """The C++ SparseRows of a matrix, and the largest number of terms of a row."""
        arrays = [
            np.ascontiguousarray(array, dtype=dtype)
            for array, dtype in ((rows.starts, np.int64), (rows.items, np.int32), (rows.values, np.float32))
        ]
        starts, items, values = (array.ctypes.data for array in arrays)
        view = native().SparseRows(starts=starts, items=items, values=values, rows=len(rows), top=top)
        self._read.extend(arrays)
        return view, min(top, len(rows.items))

    def scores(self, rows: np.ndarray, recency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return items, [Z] int32 ascending, and their scores above zero, [Z] float64.

        Args:
            rows: Rows of a history that exist, [n] int64, newest first.
            recency: The recency of each, [n]; 0 is the newest.
        """
        use = self.constants
        history = np.ascontiguousarray(rows, dtype=np.int64)
        fading = use.scale * use.text_decay**recency
        weights = use.decay**recency * self.factors[history]
        texts = use.text_weight * fading if self.similar is not None else None
        repeats = use.repeat_weight * fading if use.repeat_weight > 0 else None
        items = np.empty(len(history) * self._terms, dtype=np.int32)
        scores = np.empty(len(items))
        count = native().memory_scores(
            self._transitions, self._similar, history=history.ctypes.data,
            transition_weights=weights.ctypes.data,
            similar_weights=0 if texts is None else texts.ctypes.data,
            repeat_weights=0 if repeats is None else repeats.ctypes.data, size=len(history),
            factors=self.factors.ctypes.data, items=items.ctypes.data, scores=scores.ctypes.data,
        )  # fmt: skip
        return items[:count], scores[:count]
