"""Checks of what callers pass to a memory: histories, sequences, texts and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from operator import index

import numpy as np

from cemg.data.sequences import Sequences
from cemg.errors import UserError

BATCH = "pass a list of histories, for one user [[3, 1, 4]]"
LARGEST = 2**31 - 1  # of a number of items


def newest_rows(history: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Return the last ``count`` item rows of a history, [up to count] int64.

    Raises:
        UserError: It is not a sequence of integers.
    """
    try:
        rows = np.asarray(history[-count:])
    except (TypeError, ValueError, LookupError):
        raise _no_history(history) from None
    if not _are_rows(rows):
        raise _no_history(history)
    return rows.astype(np.int64, copy=False)


def item_rows(history: Sequence[int] | np.ndarray) -> list[int]:
    """Return all item rows of a history. Raises UserError as `newest_rows` does."""
    try:
        return [index(row) for row in history]
    except TypeError:
        raise _no_history(history) from None


def integer(name: str, value: object) -> int:
    """Return ``value``; UserError if it is not an integer."""
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{name} must be an integer, got {_shown(value)}") from None


def _no_history(given: object) -> UserError:
    return UserError(
        f"{_shown(given)} is not a history",
        cause="a history is a sequence of item rows, which are integers, oldest first",
        fix="for example [3, 1, 4]",
    )


def check_histories(histories: object) -> None:
    """Raise UserError for one history in place of several."""
    try:
        first = histories[0] if len(histories) else []  # type: ignore[index, arg-type]
        len(first)
    except (TypeError, LookupError):
        raise UserError(f"{_shown(histories)} is not a list of histories", fix=BATCH) from None


def check_sequences(train: Sequence[np.ndarray], num_items: int) -> None:
    """Raise UserError unless ``train`` has sequences of item rows from 0 to ``num_items - 1``."""
    check_histories(train)
    with suppress(
        TypeError, ValueError, UserError
    ):  # else, and if a row is wrong, the loop below names the sequence
        rows = Sequences.of(train).flat()
        if _are_rows(rows) and (not len(rows) or 0 <= rows.min() <= rows.max() < num_items):
            return
    for user, sequence in enumerate(train):
        rows = np.asarray(sequence)
        if not _are_rows(rows):
            raise UserError(
                f"sequence {user} of the training is not a sequence of item rows: {_shown(sequence)}"
            )
        wrong = rows[(rows < 0) | (rows >= num_items)]
        if len(wrong):
            raise UserError(
                f"sequence {user} of the training has item {wrong[0]}, but {num_items} items have texts",
                fix="pass one text per item, None for an item without a text",
            )


def _are_rows(rows: np.ndarray) -> bool:
    return rows.ndim == 1 and (rows.dtype.kind in "iu" or not len(rows))


def check_texts(texts: Sequence[str | None]) -> None:
    """Raise UserError unless ``texts`` is a sequence of texts and None."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise UserError(
            f"{_shown(texts)} is not a list of texts", fix="pass one text per item: ['nail brush']"
        )
    wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise UserError(f"{_shown(wrong)} is not a text", fix="pass None for an item without a text")


def check_count(name: str, value: object, *, most: int = LARGEST) -> None:
    """Raise UserError unless ``value`` is an integer from 1 to ``most``."""
    if isinstance(value, bool):
        raise UserError(f"{name} must be an integer, got {value}")
    count = integer(name, value)
    if count < 1:
        raise UserError(f"{name} must be at least 1, got {count}")
    if count > most:
        raise UserError(f"{name} must be at most {most:,}, got {count}")


def check_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Raise UserError unless ``value`` is a number from ``low`` to ``high``; ``above``: without ``low``."""
    number = math.nan
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        number = float(value)
    if not low <= number <= high or (above and number == low):
        within = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise UserError(f"{name} must be a number {within}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
