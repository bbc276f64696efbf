"""Histories as one padded tensor."""

from __future__ import annotations

import numpy as np

from cemg.dense import pad_histories


def test_histories_keep_the_newest_items_and_are_padded_on_the_right() -> None:
    items, lengths = pad_histories([np.array([1, 2, 3, 4]), np.array([9])], 3)
    assert items.tolist() == [[2, 3, 4], [9, 0, 0]] and lengths.tolist() == [3, 1]
