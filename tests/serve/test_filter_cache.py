"""Compiled filters: the cache, changing tables and tries, searches under a filter, and named filters."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.serve import attributes as attributes_module
from cemg.serve import filters as filters_module
from cemg.serve.attributes import AttributeTable
from cemg.serve.expressions import (
    parse_filter,
)
from cemg.serve.filters import Filters
from cemg.serve.named_filters import NamedFilters
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter, Trie
from cemg_kernels.trie.live import LiveTrie

from ..decoding.conftest import SIZE, START, Bench, make_model
from .test_filters import ITEMS, key, trie_of


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
    filters, trie = Filters(AttributeTable(list(ITEMS), ITEMS), max_bytes=20_000), trie_of(5)
    for limit in range(50):
        filters.compile(parse_filter({"must": [key("price", lt=limit)]}), trie, 1)
    assert 0 < filters.statistics().bytes <= 20_000
    filters = Filters(AttributeTable(list(ITEMS), ITEMS))
    for version in range(5):
        codes = torch.tensor([[version, i] for i in range(5)])
        filters.compile(parse_filter({"must": [key("price", lt=9)]}), Trie.from_codes(codes, 8), version)
    assert filters.statistics().entries == filters_module.MAX_TRIES


def test_many_different_filters_of_a_small_catalog_are_bounded_by_the_memory_of_their_expressions():
    filters, trie = Filters(AttributeTable(list(ITEMS), ITEMS), max_bytes=300_000), trie_of(5)
    for number in range(400):
        wanted = parse_filter({"must": [{"has_id": [f"{number}-{n}" for n in range(100)]}]})  # 1 kB
        filters.compile(wanted, trie, 1)
    kept = filters.statistics()
    assert kept.misses == 400 and 0 < kept.entries <= 50 and kept.bytes <= 300_000


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
