"""k-core, time order, ties and repeats."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg.data.filter import in_time_order, k_core, tie_rule, without_repeats
from cemg.errors import UserError

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=0, max_size=40)


def frame(rows: list[tuple[str, str, int]]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row"
    )


def naive_core(pairs: list[tuple[int, int]], least: int) -> list[tuple[int, int]]:
    """One offender at a time: any order of removal ends in the same largest core."""
    pairs = list(pairs)
    while True:
        users, items = [u for u, _ in pairs], [i for _, i in pairs]
        bad = next((p for p in pairs if users.count(p[0]) < least or items.count(p[1]) < least), None)
        if bad is None:
            return pairs
        pairs.remove(bad)


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.integers(0, 4))
def test_the_k_core_equals_removing_one_row_at_a_time(pairs, least):
    rows = frame([(str(u), str(i), n) for n, (u, i) in enumerate(pairs)])
    core = k_core(rows, least)
    assert sorted((int(u), int(i)) for u, i, _ in core.rows()) == sorted(naive_core(pairs, least))
    assert core["timestamp"].is_sorted()  # the order of the rows is kept


def test_the_k_core_filter_repeats_until_a_fixed_point():
    # a:1,2 b:2,3 c:3,4: item 1 has one buyer, so a falls, so 2 does, and so on: a single pass leaves b and c.
    rows = frame([("a", "1", 0), ("a", "2", 1), ("b", "2", 2), ("b", "3", 3), ("c", "3", 4), ("c", "4", 5)])
    assert k_core(rows, 2).is_empty()


def test_rows_are_grouped_by_user_in_order_of_appearance_and_sorted_by_time():
    rows = frame([("b", "1", 9), ("a", "2", 5), ("b", "3", 1), ("a", "4", 4)])
    assert in_time_order(rows)["item"].to_list() == ["3", "1", "4", "2"]


def test_equal_times_keep_the_order_of_the_source():
    rows = frame([("a", str(n), 7) for n in range(100)])
    assert in_time_order(rows)["item"].to_list() == [str(n) for n in range(100)]


def test_shuffled_ties_follow_the_seed_and_move_only_equal_times():
    rows = frame([("a", str(n), n // 50) for n in range(100)])
    one, again, other = (in_time_order(rows, ties="shuffle", seed=s)["item"].to_list() for s in (1, 1, 2))
    assert one == again and one != other and one != [str(n) for n in range(100)]
    assert {int(item) for item in one[:50]} == set(range(50))


def test_the_tie_rule_names_the_seed_only_if_it_matters():
    assert tie_rule("source", 3) == "equal times in order of the source file"
    assert tie_rule("shuffle", 3) == "equal times shuffled, seed 3"


@pytest.mark.parametrize(("which", "times"), [("keep", [0, 1, 2, 3]), ("first", [0, 1]), ("last", [2, 3])])
def test_repeated_pairs_are_kept_or_dropped(which, times):
    rows = frame([("a", "x", 0), ("a", "y", 1), ("a", "x", 2), ("a", "y", 3)])
    assert without_repeats(rows, which)["timestamp"].to_list() == times


def test_unknown_options_are_refused_with_the_valid_ones():
    with pytest.raises(UserError, match="source, shuffle, got 'random'"):
        in_time_order(frame([]), ties="random")
    with pytest.raises(UserError, match="keep, first, last, got 'none'"):
        without_repeats(frame([]), "none")
