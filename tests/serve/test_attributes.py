"""The attribute table: types, updates, merges, and values that are refused."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg.errors import UserError
from cemg.serve.attributes import AttributeTable
from cemg.serve.expressions import (
    MAX_TEXT,
    parse_filter,
)
from cemg.serve.filters import Filters

from .test_filters import ITEM, ITEMS, key


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    items=st.lists(ITEM, min_size=1, max_size=4),
    changes=st.lists(st.tuples(st.integers(0, 3), ITEM, st.booleans()), max_size=6),
)
def test_an_updated_table_equals_one_built_from_the_same_items(items, changes):
    model = {str(row): item for row, item in enumerate(items)}
    table = AttributeTable(list(model), model)
    for row, item, merged in changes:
        model[str(row % len(model))] = item
        table.update({str(row % len(model)): item})
        if merged:
            table.merge()
    fresh = AttributeTable(list(model), model)
    assert table.types == fresh.types
    for field in fresh.types:
        for expression in ({"is_null": {"key": field}}, {"is_empty": {"key": field}}):
            masks = [Filters(one).mask(parse_filter({"must": expression})) for one in (table, fresh)]
            assert torch.equal(*masks)


def test_a_field_without_values_is_forgotten_and_may_return_with_another_type():
    table = AttributeTable(["A", "B"], {"A": {"x": "red"}, "B": {"x": None}})
    table.update({"A": {}})
    assert table.types == {}
    table.update({"A": {"x": 3}})
    filters = Filters(table)
    assert filters.mask(parse_filter({"must": key("x", gt=2)})).tolist() == [True, False]
    assert filters.mask(parse_filter({"must": {"is_null": {"key": "x"}}})).tolist() == [False, True]
    table.merge()
    assert filters.mask(parse_filter({"must": key("x", gt=2)})).tolist() == [True, False]


def test_strings_are_datetimes_as_long_as_all_of_them_are():
    table = AttributeTable(["A", "B"], {"A": {"day": "2024-01-31"}, "B": {"day": "soon"}})
    filters, recent = Filters(table), parse_filter({"must": key("day", gte="2024-01-01")})
    with pytest.raises(UserError, match="1 of its 2 strings are not ISO dates"):
        filters.mask(recent)
    table.update({"B": {"day": "2023-12-31"}})
    assert table.types == {"day": "datetime"}
    assert filters.mask(recent).tolist() == [True, False]
    declared = AttributeTable(["A"], types={"day": "datetime"})
    with pytest.raises(UserError, match="'day' of item 'A' is not an ISO date: 'soon'"):
        declared.update({"A": {"day": "soon"}})


@pytest.mark.parametrize(
    "item, problem",
    [
        ({"price": "cheap"}, "'price' of item 'B' is a string, but 'price' is a number"),
        ({"price": True}, "is a boolean, but 'price' is a number"),
        ({"tags": "new"}, "is a string, but 'tags' is a list of strings"),
        ({"tags": ["a", 3]}, "has a list with int"),
        ({"tags": ["a", None]}, "has a list with NoneType"),
        ({"size": {"w": 3}}, "has the type dict"),
        ({"price": float("nan")}, "is not a finite 64-bit number"),
        ({"price": 10**400}, "is not a finite 64-bit number"),
        ({"price": [2**70]}, "is a list of strings, but"),
        ({"category": "\ud800"}, "is not valid Unicode"),
        ({"tags": ["\ud800"]}, "is not valid Unicode"),
        ({"": 3}, "the name of an attribute"),
        ({"x" * (MAX_TEXT + 1): 3}, "has 1,001 characters"),
        ({f"x{i}": 1 for i in range(300)}, "more than 256 different attributes"),
    ],
)
def test_an_invalid_attribute_is_refused_and_changes_nothing(item, problem):
    table = AttributeTable(list(ITEMS), ITEMS)
    before, version = table.types, table.version
    with pytest.raises(UserError, match=re.escape(problem)):
        table.update({"A": {"price": 7}, "B": item})
    with pytest.raises(UserError, match=re.escape(problem)):
        AttributeTable(list(ITEMS), {**ITEMS, "B": item})
    assert (table.types, table.version, table["A"]["price"]) == (before, version, 5)


def test_unknown_and_repeated_items_are_refused():
    table = AttributeTable(["A", 7])
    with pytest.raises(UserError, match="no item 'X'"):
        table.update({"A": {"price": 1}, "X": {}})
    with pytest.raises(UserError, match="'7' occurs twice"):
        table.extend(["B", "7"])
    with pytest.raises(UserError, match="'A' occurs twice"):
        AttributeTable(["A", "A"])
    with pytest.raises(UserError, match="no item 'A'"):
        table.extend(["B"], {"A": {}})
    assert len(table) == 2 and 7 in table and "B" not in table
    table.update({7: {"price": 1}})
    assert table["7"] == {"price": 1}
