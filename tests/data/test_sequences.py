"""Item sequences in one array equal a list of arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cemg.data.sequences import Sequences
from cemg.errors import UserError

lists = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6)


def contents(sequences: Sequences) -> list[list[int]]:
    return [sequence.tolist() for sequence in sequences]


@given(lists, st.data())
def test_every_part_equals_that_of_lists(given: list[list[int]], data: st.DataObject) -> None:
    made = Sequences.of([np.array(one, np.int32) for one in given])
    assert contents(made) == given and len(made) == len(given)
    assert [made[user].tolist() for user in range(-len(given), len(given))] == given * 2
    assert made.lengths.tolist() == [*map(len, given)]
    low, high = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    assert contents(made[low:high]) == given[low:high]
    users = data.draw(st.lists(st.integers(0, len(given) - 1))) if given else []
    chosen, expected = made.of_users(np.array(users, np.int64)), [given[user] for user in users]
    assert contents(chosen) == expected
    assert chosen.flat().tolist() == [item for one in expected for item in one]
    ends = np.array([data.draw(st.integers(0, len(one))) for one in expected], np.int64)
    parts = chosen.part(ends // 2, ends)
    assert contents(parts) == [one[end // 2 : end] for one, end in zip(expected, ends, strict=True)]
    assert parts.flat().tolist() == [item for one in parts for item in one]
    both = chosen.followed_by(parts)
    assert contents(both) == [one + two for one, two in zip(expected, contents(parts), strict=True)]
    full = made.of_users(np.array([user for user, one in enumerate(given) if one], np.int64))
    assert full.at(full.lengths - 1).tolist() == [one[-1] for one in given if one]


def test_they_are_kept_as_they_are_and_any_integers_become_int32() -> None:
    made = Sequences.of([np.array([1, 2], np.uint64), np.array([]), [], np.array([3], np.int64)])
    assert Sequences.of(made) is made and made.items.dtype == np.int32
    assert contents(made) == [[1, 2], [], [], [3]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([0.5]), "sequence 1 does not have item rows, which are integers"),
        (np.zeros((1, 2), int), "sequence 1 does not have item rows"),
        (np.array([4, 2**32 + 1]), "sequence 1 has item row 4294967297; rows are from 0 to 2147483647"),
        (np.array([-1]), "sequence 1 has item row -1"),
    ],
)
def test_what_is_not_an_item_row_is_refused(wrong: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sequences.of([np.array([0]), wrong])
