"""Filters over item attributes against a plain Python evaluator; the table, the cache and named filters."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.serve import attributes as attributes_module
from cemg.serve import filters as filters_module
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
from cemg.serve.named_filters import NamedFilters
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter, Trie
from cemg_kernels.trie.live import LiveTrie

from ..decoding.conftest import SIZE, START, Bench, make_model

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


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each evaluation."""
    calls: list[int] = []
    evaluate = filters_module.evaluate

    def counting(filter: Any, frame: Any, *rest: Any) -> Any:
        calls.append(frame.height)
        return evaluate(filter, frame, *rest)

    monkeypatch.setattr(filters_module, "evaluate", counting)
    return calls


def test_a_filter_is_compiled_once_per_version(evaluations):
    table, trie = AttributeTable(list(ITEMS), ITEMS), trie_of(5)
    filters = Filters(table)
    cheap = {"must": [key("price", lte=20)]}
    first = filters.compile(parse_filter(cheap), trie, 1)
    assert filters.compile(parse_filter({**cheap, "should": []}), trie, 1) is first
    assert evaluations == [0, 5]  # the overlay and the base
    table.update({"E": {"price": 100}})
    assert filters.compile(parse_filter(cheap), trie, 1) is first  # it still admits the same items
    assert evaluations == [0, 5, 1]  # the base is not evaluated again
    table.update({"E": {"price": 1}})
    changed = filters.compile(parse_filter(cheap), trie, 2)
    assert evaluations == [0, 5, 1, 1]
    assert isinstance(first, ItemFilter) and isinstance(changed, ItemFilter)
    assert (len(first), len(changed)) == (2, 3)
    statistics = filters.statistics()
    assert (statistics.hits, statistics.misses, statistics.entries) == (1, 3, 3)
    assert filters.compile(parse_filter({}), trie, 2) is None


def test_concurrent_requests_compile_a_filter_once(evaluations):
    filters, trie = Filters(AttributeTable(list(ITEMS), ITEMS)), trie_of(5)
    start = threading.Barrier(8)

    def compile(_: int) -> ItemFilter | None:
        start.wait()
        return filters.compile(parse_filter({"must": [key("price", gt=1)]}), trie, 1)

    with ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(compile, range(8)))
    assert len(set(map(id, compiled))) == 1
    assert evaluations == [0, 5]


def test_an_error_reaches_every_request_and_is_not_cached():
    table = AttributeTable(["A"], {"A": {"x": 1}})
    filters, wanted = Filters(table), parse_filter({"must": key("y", gt=1)})
    for _ in range(2):
        with pytest.raises(UserError, match="'y'"):
            filters.compile(wanted, trie_of(1), 1)
    table.update({"A": {"y": 2}})
    compiled = filters.compile(wanted, trie_of(1), 1)
    assert compiled is not None and len(compiled) == 1


def test_the_cache_keeps_to_its_bytes_and_drops_filters_of_old_tries():
    filters, trie = Filters(AttributeTable(list(ITEMS), ITEMS), max_bytes=150), trie_of(5)
    for limit in range(50):
        filters.compile(parse_filter({"must": [key("price", lt=limit)]}), trie, 1)
    assert 0 < filters.statistics().bytes <= 150
    filters = Filters(AttributeTable(list(ITEMS), ITEMS))
    for version in range(5):
        codes = torch.tensor([[version, i] for i in range(5)])
        filters.compile(parse_filter({"must": [key("price", lt=9)]}), Trie.from_codes(codes, 8), version)
    assert filters.statistics().entries == filters_module.MAX_TRIES


def test_many_updates_are_merged_in_the_background(monkeypatch):
    monkeypatch.setattr(attributes_module, "MAX_OVERLAY", 10)
    table = AttributeTable([str(i) for i in range(50)], {"0": {"x": -1}})
    for i in range(50):
        table.update({str(i): {"x": i}})
    for thread in threading.enumerate():
        if thread.name == "cemg-attributes":
            thread.join()
    snapshot = table.snapshot()
    assert snapshot.base_version > 1 and snapshot.overlay.height < 50
    assert Filters(table).mask(parse_filter({"must": key("x", gte=25)})).tolist() == [
        i >= 25 for i in range(50)
    ]


def test_requests_see_whole_updates_while_the_table_changes(monkeypatch):
    """Each update sets both attributes of ten items, so no item ever has one without the other."""
    monkeypatch.setattr(attributes_module, "MAX_OVERLAY", 20)
    items = [str(i) for i in range(40)]
    table, trie = AttributeTable(items, {i: {"x": 1, "y": True} for i in items}), trie_of(40)
    filters, stop = Filters(table), threading.Event()
    torn = parse_filter({"must": [key("x", value=1)], "must_not": [key("y", value=True)]})
    whole = parse_filter({"must": [key("x", value=1), key("y", value=True)]})

    def change() -> None:
        try:
            for step in range(1000):
                ten = items[step % 4 * 10 :][:10]
                table.update({i: {"x": step % 3, "y": step % 3 == 1} for i in ten})
        finally:
            stop.set()

    def search(_: int) -> None:
        while not stop.is_set():
            none, some = filters.compile(torn, trie, 1), filters.compile(whole, trie, 1)
            assert none is not None and some is not None
            assert len(none) == 0 and len(some) % 10 == 0

    with ThreadPoolExecutor(3) as pool:
        searches = pool.map(search, range(2))
        pool.submit(change).result()
        list(searches)


def test_a_table_of_another_size_than_the_trie_needs_rows():
    filters, trie = Filters(AttributeTable(list(ITEMS), ITEMS)), trie_of(3)
    wanted = parse_filter({"must": [key("price", gt=1)]})
    with pytest.raises(ValueError, match="5 rows and the trie 3 items"):
        filters.compile(wanted, trie, 1)
    compiled = filters.compile(wanted, trie, 1, rows=torch.tensor([3, 0, 4]))
    assert compiled is not None
    assert compiled.allows_ranks([0, 1, 2]).tolist() == [False, True, False]


def test_a_live_catalog_combines_filters_with_removals_and_additions():
    live, table = LiveTrie(trie_of(5)), AttributeTable(list(ITEMS), ITEMS)
    filters, cheap = Filters(table), parse_filter({"must": [key("price", lte=20)]})

    def allowed() -> list[int]:
        now = live.snapshot()
        rows = torch.empty_like(now.trie.ids_by_rank)
        rows[now.trie.rows] = now.trie.ids_by_rank  # the ids of this trie are rows of the table
        filter = now.restrict(filters.compile(cheap, now.trie, now.version, rows))
        assert filter is not None
        return sorted(now.trie.ids_by_rank[filter.by_rank()].tolist())

    assert allowed() == [0, 2]
    live.remove([2])
    assert allowed() == [0]
    table.extend(["F"], {"F": {"price": 2}})
    live.add([[7, 7]], [5])
    live.wait()
    assert allowed() == [0, 5]
    table.update({"A": {"price": 100}, "E": {"price": 3}})
    assert allowed() == [4, 5]


def test_searches_return_only_items_that_meet_the_filter():
    torch.manual_seed(0)
    codes = torch.unique(torch.randint(SIZE, (60, 3)), dim=0)
    made = Bench(make_model("gpt2"), Catalog.from_codes(codes, SIZE))
    count = len(made.catalog)
    table = AttributeTable(range(count), {i: {"price": i % 7, "color": "red"} for i in range(0, count, 2)})
    filters, decoder = Filters(table), Decoder(made.model, made.catalog, START, "vocab")
    ids, mask = made.prompts([3, 5])
    cheap = filters.compile(parse_filter({"must": key("price", lt=2)}), decoder.trie, 1)
    others = filters.compile(parse_filter({"must_not": key("color", value="red")}), decoder.trie, 1)
    assert cheap is not None and others is not None
    expected = [i for i in range(0, count, 2) if i % 7 < 2]
    found = decoder.decode(ids, mask, count, filter=RequestFilter.stack([cheap, others]))
    assert sorted(i for i in found.items[0].tolist() if i >= 0) == expected
    assert sorted(i for i in found.items[1].tolist() if i >= 0) == list(range(1, count, 2))
    exact = decoder.decode_exact(ids, mask, 3, 10, filter=cheap)
    assert set(exact.items.flatten().tolist()) <= set(expected)


NAMED = """
in_stock_below:
  parameters: {max_price: number}
  filter:
    must:
      - {key: stock, match: {value: true}}
      - {key: price, range: {lte: $max_price}}
tagged:
  parameters: {tags: list of strings, since: datetime}
  filter: {should: [{key: tags, match: {any: $tags}}, {key: published, range: {gt: $since}}]}
old: {filter: {must: {key: published, range: {lt: 2024-01-01}}}}
dollar: {filter: {must: {key: category, match: {value: $$5}}}}
"""


@pytest.fixture
def named(tmp_path) -> NamedFilters:
    (tmp_path / "filters.yaml").write_text(NAMED)
    return NamedFilters.read(tmp_path / "filters.yaml")


def test_named_filters_take_parameters_and_nest(named):
    filters = Filters(AttributeTable(list(ITEMS), ITEMS), named)

    def ids(expression: Any) -> str:
        mask = filters.mask(parse_filter(expression))
        return "".join(item for item, one in zip(ITEMS, mask.tolist(), strict=True) if one)

    below = {"name": "in_stock_below", "parameters": {"max_price": 20}}
    tagged = {"name": "tagged", "parameters": {"tags": ["old"], "since": "2024-01-31"}}
    assert ids(below) == "A"
    assert ids(tagged) == "CD"
    assert ids({"name": "old"}) == "B"
    assert ids({"name": "dollar"}) == ""
    assert ids({"should": [below, {"must_not": [tagged]}], "must_not": {"name": "old"}}) == "AE"
    assert ids({"min_should": {"conditions": [below, {"name": "old"}], "min_count": 1}}) == "AB"
    trie, inline = trie_of(5), {"must": [key("stock", value=True), key("price", lte=20)]}
    assert filters.compile(parse_filter(below), trie, 1) is filters.compile(parse_filter(inline), trie, 1)


@pytest.mark.parametrize(
    "use, problem",
    [
        ({"name": "in_stock"}, "named filters: dollar, in_stock_below, old, tagged"),
        ({"name": "in_stock_below"}, "needs the parameter 'max_price'"),
        ({"name": "old", "parameters": {"x": 1}}, "has no parameter 'x'"),
        ({"name": "in_stock_below", "parameters": {"max_price": "20"}}, "'max_price' of the filter"),
        ({"name": "in_stock_below", "parameters": {"max_price": True}}, "must be a number, got True"),
        ({"name": "in_stock_below", "parameters": {"max_price": float("nan")}}, "must be a number, got nan"),
        ({"name": "tagged", "parameters": {"tags": ["a", 1], "since": "2024-01-01"}}, "list of strings"),
        ({"name": "tagged", "parameters": {"tags": [], "since": "soon"}}, "must be a datetime, got 'soon'"),
        ({"must": [{"name": "nothing"}]}, "no filter named 'nothing'"),
    ],
)
def test_a_wrong_use_of_a_named_filter_is_refused(named, use, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        named.resolve(parse_filter(use))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("a: {filter: {must: {key: x, range: {lt: $y}}}}", "the parameter 'y' is not declared"),
        ("a: {parameters: {y: number}, filter: {}}", "the parameter 'y' is not used"),
        ("a: {parameters: {y: float}, filter: {must: {key: x, range: {lt: $y}}}}", "unknown type 'float'"),
        ("a: {parameters: {y: string}, filter: {must: {key: x, range: {lt: $y}}}}", "'a' is not an ISO date"),
        ("a: {must: []}", "a named filter has a filter"),
        ("a: {filter: {muts: []}}", "named filter 'a'.muts: there is no such field"),
        ("a: {filter: {name: b}}", "must be an expression"),
        ("a: {filter: {must: {name: b}}}", "the named filter 'a' cannot use another one"),
        ("a: {filter: {}}\na: {filter: {}}", "'a' occurs twice"),
        ("a: &x {filter: {}}\nb: *x", "aliases such as *x"),
        ("a: {", "is not valid YAML"),
        ("[1]", "must be a mapping"),
    ],
)
def test_an_invalid_file_of_named_filters_is_refused(tmp_path, text, problem):
    (tmp_path / "filters.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(problem)):
        NamedFilters.read(tmp_path / "filters.yaml")


def test_named_filters_are_checked_against_the_table_and_read_from_json(tmp_path):
    definition = {"a": {"filter": {"must": [key("prise", gt=1)]}}}
    (tmp_path / "filters.json").write_text(json.dumps(definition))
    named = NamedFilters.read(tmp_path / "filters.json")
    with pytest.raises(UserError, match=r"named filter 'a'.must\[0\]: no item has the attribute 'prise'"):
        Filters(AttributeTable(list(ITEMS), ITEMS), named)
    Filters(AttributeTable(["A"]), named)  # there are no attributes to compare with
