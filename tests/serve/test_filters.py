"""Filter expressions against a plain Python evaluator, and what is refused."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cemg.errors import UserError
from cemg.serve.attributes import AttributeTable
from cemg.serve.expressions import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_TEXT,
    MAX_VALUES,
    FilterInput,
    canonical,
    parse_filter,
)
from cemg.serve.filters import Filters
from cemg_kernels import Trie

ITEMS: dict[str, dict[str, Any]] = {
    "A": {"category": "music", "price": 5, "stock": True, "tags": ["new", "Red"], "published": "2024-01-31"},
    "B": {"category": "Garden music", "price": 20.5, "stock": False, "tags": [], "published": "2023-06-01"},
    "C": {"category": "music_box", "price": 20, "tags": ["red"], "published": "2024-01-31T12:00:00+02:00"},
    "D": {"price": None, "stock": True, "tags": ["old", "Garden Red"]},
    "E": {},
}


def admitted(*conditions: Any, items: dict[str, dict[str, Any]] = ITEMS, **clauses: Any) -> str:
    """The ids that a filter admits, joined; conditions are those of ``must``."""
    expression = {"must": list(conditions), **clauses} if conditions else clauses
    mask = Filters(AttributeTable(list(items), items)).mask(parse_filter(expression))
    return "".join(item for item, one in zip(items, mask.tolist(), strict=True) if one)


def key(name: str, **test: Any) -> dict[str, Any]:
    """A condition on an attribute; ``not_in`` stands for except, which is a word of Python."""
    tests = {"except" if kind == "not_in" else kind: values for kind, values in test.items()}
    if set(tests) <= {"gt", "gte", "lt", "lte"}:
        return {"key": name, "range": tests}
    return {"key": name, "match": tests}


def trie_of(count: int) -> Trie:
    return Trie.from_codes(torch.tensor([[i // 8, i % 8] for i in range(count)]), 8)


@pytest.mark.parametrize(
    "condition, expected",
    [
        (key("category", value="music"), "A"),
        (key("price", value=20), "C"),
        (key("stock", value=True), "AD"),
        (key("stock", value=False), "B"),
        (key("tags", value="red"), "C"),  # exact: not Red
        (key("category", any=["music", "music_box"]), "AC"),
        (key("category", any=[]), ""),
        (key("tags", any=["new", "old"]), "AD"),
        ({"key": "price", "in": [5, 20.5]}, "AB"),
        (key("category", not_in=["music"]), "BC"),  # an item without a category has no other one
        (key("category", not_in=[]), "ABC"),
        (key("tags", not_in=["red"]), "AD"),
        (key("tags", not_in=["old"]), "ACD"),  # one value of D is another one
        (key("category", text="MUSIC"), "ABC"),  # an underscore ends a word
        (key("category", text="music garden"), "B"),
        (key("category", text="mus"), ""),
        (key("category", text="-"), ""),
        (key("tags", text="red"), "ACD"),
        (key("tags", text="red garden"), "D"),
        (key("price", gte=5, lt=20.5), "AC"),
        (key("price", gt=5), "BC"),
        (key("price", lte=5), "A"),
        (key("published", gte="2024-01-31"), "AC"),
        (key("published", gt="2024-01-31"), "C"),
        (key("published", gte="2024-01-31T10:00:00Z", lte="2024-01-31 10:00"), "C"),
        (key("published", value="2024-01-31"), "A"),
        ({"has_id": ["A", "E", "unknown"]}, "AE"),
        ({"has_id": []}, ""),
        ({"is_empty": {"key": "price"}}, "DE"),
        ({"is_empty": {"key": "tags"}}, "BE"),
        ({"is_null": {"key": "price"}}, "D"),
        ({"is_null": {"key": "tags"}}, ""),
        ({}, "ABCDE"),
        ({"should": [key("price", value=5), {"has_id": ["E"]}]}, "AE"),
    ],
)
def test_each_condition_admits_the_items_that_meet_it(condition, expected):
    assert admitted(condition) == expected


def test_clauses_combine_their_conditions():
    cheap, stocked, red = key("price", lte=20), key("stock", value=True), key("tags", text="red")
    assert admitted() == admitted(should=[], must_not=[]) == "ABCDE"
    assert admitted(cheap, stocked) == "A"
    assert admitted(should=[cheap, stocked]) == "ACD"
    assert admitted(must_not=[cheap]) == "BDE"
    assert admitted(cheap, must_not=[stocked]) == "C"
    assert admitted(min_should={"conditions": [cheap, stocked, red], "min_count": 2}) == "ACD"
    assert admitted(min_should={"conditions": [cheap, stocked, red], "min_count": 4}) == ""
    assert admitted(min_should={"conditions": [], "min_count": 1}) == ""
    assert admitted(should=[{"must": [cheap, {"must_not": stocked}]}, {"must": {"has_id": ["E"]}}]) == "CE"


def test_a_table_without_attributes_refuses_no_field():
    items: dict[str, dict[str, Any]] = {"A": {}, "B": {}}
    assert admitted(key("price", gt=1), items=items) == ""
    assert admitted({"is_empty": {"key": "price"}}, items=items) == "AB"
    assert admitted(must_not=[key("price", gt=1)], items=items) == "AB"


WORDS = ["red", "Red", "blue", "red blue", "2024-01-05", "2024-02-29T10:00:00+01:00", "é"]
DATES = ["2024-01-05", "2024-01-05T00:00:01", "2023-12-31T23:30:00-01:00", "0001-01-01T00:00+01:00"]
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "word": st.sampled_from(WORDS),
    "date": st.sampled_from(DATES),
    "number": st.sampled_from([-1, 0, 1, 1.5, 2]),
    "flag": st.booleans(),
    "tags": st.lists(st.sampled_from(WORDS), max_size=3),
}
ITEM = st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in FIELDS.items()})


def of_field(name: str) -> st.SearchStrategy[Any]:
    values = st.sampled_from(WORDS) if name == "tags" else FIELDS[name]
    lists = st.lists(values, max_size=3)
    match = [values.map(lambda v: {"value": v}), lists.map(lambda v: {"any": v})]
    match.append(lists.map(lambda v: {"except": v}))
    if name in ("word", "date", "tags"):
        match.append(st.sampled_from([*WORDS, "", "RED", "10 00"]).map(lambda v: {"text": v}))
    tests = [st.one_of(match).map(lambda m: {"key": name, "match": m})]
    tests.append(lists.map(lambda v: {"key": name, "in": v}))
    tests += [st.just({kind: {"key": name}}) for kind in ("is_empty", "is_null")]
    if name in ("number", "date"):
        bounds = st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), values, min_size=1)
        tests.append(bounds.map(lambda b: {"key": name, "range": b}))
    return st.one_of(tests)


LEAF = st.one_of(
    *map(of_field, FIELDS), st.lists(st.sampled_from("01234x"), max_size=3).map(lambda v: {"has_id": v})
)
EXPRESSION = st.recursive(
    LEAF,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "must": st.lists(inner, max_size=3),
            "should": st.lists(inner, max_size=3),
            "must_not": st.lists(inner, max_size=3) | inner,
            "min_should": st.fixed_dictionaries(
                {"conditions": st.lists(inner, max_size=3), "min_count": st.integers(1, 3)}
            ),
        },
    ),
    max_leaves=6,
)


def moment(text: str) -> float:
    parsed = datetime.fromisoformat(text)
    parsed = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    return (parsed.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() - (
        parsed.utcoffset() or datetime.min - datetime.min
    ).total_seconds()


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


def meets(item_id: str, item: dict[str, Any], test: dict[str, Any]) -> bool:
    """Qdrant's semantics, one item at a time."""
    if "has_id" in test:
        return item_id in test["has_id"]
    if "is_empty" in test:
        return item.get(test["is_empty"]["key"]) in (None, [])
    if "is_null" in test:
        return item.get(test["is_null"]["key"], 0) is None
    if "key" not in test:
        return meets_all(item_id, item, test)
    value = item.get(test["key"])
    values = value if isinstance(value, list) else [] if value is None else [value]
    if "in" in test:
        return any(one in test["in"] for one in values)
    if "match" in test:
        ((kind, wanted),) = test["match"].items()
        tests = {
            "value": lambda one: one == wanted,
            "any": lambda one: one in wanted,
            "except": lambda one: one not in wanted,
            "text": lambda one: bool(words(wanted)) and words(wanted) <= words(one),
        }
        return any(map(tests[kind], values))
    compare = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}

    def number(one: Any) -> float:
        return moment(one) if isinstance(one, str) else float(one)

    return any(
        all(getattr(number(one), compare[name])(number(bound)) for name, bound in test["range"].items())
        for one in values
    )


def meets_all(item_id: str, item: dict[str, Any], expression: dict[str, Any]) -> bool:
    def met(conditions: Any) -> list[bool]:
        listed = conditions if isinstance(conditions, list) else [conditions]
        return [meets(item_id, item, one) for one in listed]

    few = expression.get("min_should")
    return (
        all(met(expression.get("must", [])))
        and (not expression.get("should") or any(met(expression["should"])))
        and not any(met(expression.get("must_not", [])))
        and (few is None or sum(met(few["conditions"])) >= few["min_count"])
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    items=st.lists(ITEM, min_size=1, max_size=6),
    changes=st.lists(st.tuples(st.integers(0, 5), ITEM, st.booleans()), max_size=4),
    expressions=st.lists(EXPRESSION, min_size=1, max_size=3),
)
def test_random_expressions_admit_what_a_plain_evaluator_admits(items, changes, expressions):
    """Also after changes of single items, of which some are merged, with the same compiled filters."""
    types = dict(word="string", date="datetime", number="number", flag="boolean", tags="list of strings")
    model = {str(row): item for row, item in enumerate(items)}
    table = AttributeTable(list(model), model, types=types)  # type: ignore[arg-type]
    filters = Filters(table)
    given = [
        one if set(one) <= {"must", "should", "must_not", "min_should"} else {"must": [one]}
        for one in expressions
    ]

    def check() -> None:
        for expression in given:
            mask = filters.mask(parse_filter(expression)).tolist()
            assert mask == [meets_all(item_id, item, expression) for item_id, item in model.items()], (
                expression
            )

    check()
    for row, item, merged in changes:
        name = str(row)
        if name in model:
            table.update({name: item})
        else:
            name = str(len(model))
            table.extend([name], {name: item})
        model[name] = item
        if merged:
            table.merge()
        check()
    assert {item_id: table[item_id] for item_id in model} == model


DEEP: dict[str, Any] = {}
for _ in range(MAX_DEPTH):
    DEEP = {"must": [DEEP]}


@pytest.mark.parametrize(
    "expression, problem",
    [
        (
            {"must": [{"key": "price", "match": {"equals": 3}}]},
            "filter.must[0].match: match has one of value, any",
        ),
        ({"must": [{"key": "price"}]}, "filter.must[0]: a condition is {key, match}"),
        ({"must": [{"key": "price", "match": {"value": None}}]}, "got NoneType"),
        ({"must": [{"key": "price", "match": {"any": [float("inf")]}}]}, "must be finite"),
        ({"must": [{"key": "price", "range": {}}]}, "filter.must[0].range: the range has none of gt"),
        ({"must": [{"key": "price", "range": {"gt": 1, "lt": "2024-01-01"}}]}, "mixes numbers and dates"),
        (
            {"must": [{"key": "price", "range": {"gt": "2024-13-01"}}]},
            "range.gt: '2024-13-01' is not an ISO date",
        ),
        ({"must": [{"key": "price", "range": {"gt": True}}]}, "a bound is a number or an ISO date"),
        ({"muts": []}, "filter.muts: there is no such field"),
        ({"must": 3}, "filter.must: must be a list"),
        ([], "filter: must be a JSON object"),
        ({"min_should": {"conditions": [], "min_count": 0}}, "greater than or equal to 1"),
        ({"must": [DEEP]}, f"more than {MAX_DEPTH} expressions within each other"),
        ({"must": [{}] * (MAX_CONDITIONS + 1)}, "the filter is too large"),
        ({"must": [{"has_id": ["a"] * (MAX_VALUES + 1)}]}, "the filter is too large"),
        ({"must": [key("price", value="x" * (MAX_TEXT + 1))]}, "has 1,001 characters"),
        ({"must": [key("price", value="\ud800")]}, "not valid Unicode"),
        ({"name": "x", "more": 1}, "filter.more: there is no such field"),
    ],
)
def test_an_invalid_expression_is_refused_with_its_place(expression, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        parse_filter(expression)


@pytest.mark.parametrize(
    "condition, problem",
    [
        (key("prices", gt=1), "filter.must[0]: no item has the attribute 'prices'"),
        (key("category", gt=1), "a range of numbers does not fit the attribute 'category'"),
        (key("category", gt="2024-01-01"), "3 of its 3 strings are not ISO dates"),
        (key("tags", gt=1), "which is a list of strings"),
        (key("price", gt="2024-01-01"), "which is a number"),
        (key("published", gt=3), "give datetimes as bounds"),
        (key("price", value="5"), "a string does not match the attribute 'price', which is a number"),
        (key("stock", any=[1]), "a number does not match the attribute 'stock', which is a boolean"),
        (key("category", not_in=["a", True]), "a boolean does not match"),
        (key("price", text="5"), "a string does not match"),
        ({"key": "tags", "in": [1]}, "compare it with a string"),
        ({"is_empty": {"key": "nothing"}}, "known attributes: category (string), price (number)"),
        ({"should": [{"min_should": {"conditions": [key("x", gt=1)], "min_count": 1}}]},
         "filter.must[0].should[0].min_should.conditions[0]"),
    ],
)  # fmt: skip
def test_a_condition_that_does_not_fit_the_table_is_refused(condition, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        admitted(condition)


def test_the_error_of_an_unknown_field_names_the_nearest():
    with pytest.raises(UserError) as error:
        admitted(key("prices", gt=1))
    assert error.value.fix == "write 'price'"


def test_a_request_model_shows_filters_with_examples_and_checks_their_limits():
    class Request(BaseModel):
        filter: FilterInput | None = None

    schema = json.dumps(Request.model_json_schema())
    for name in ("MatchCondition", "RangeCondition", "NamedFilter", "MinShould", "examples"):
        assert name in schema
    with pytest.raises(ValueError, match="within each other"):
        Request.model_validate({"filter": {"must": [DEEP]}})
    assert Request.model_validate({"filter": {"must": [key("price", gt=1)]}}).filter is not None


def test_filters_that_differ_only_in_order_have_one_canonical_form():
    a = parse_filter({"must": [key("x", any=["b", "a", "a"]), key("y", gt=1)], "should": []})
    b = parse_filter({"must": [key("y", gt=1.0), {"key": "x", "in": ["a", "b"]}]})
    assert canonical(a) == canonical(b)  # type: ignore[arg-type]
    twice = {"conditions": [key("x", gt=1), key("x", gt=1)], "min_count": 2}
    once = {"conditions": [key("x", gt=1)], "min_count": 2}
    assert canonical(parse_filter({"min_should": twice})) != canonical(parse_filter({"min_should": once}))  # type: ignore[arg-type]
    assert canonical(parse_filter({"must": key("x", value=True)})) != canonical(  # type: ignore[arg-type]
        parse_filter({"must": key("x", value=1)})  # type: ignore[arg-type]
    )
