"""Filters over item attributes: from an expression to the ``ItemFilter`` that a search takes.

Polars evaluates the expression on the columns of the attribute table. N rows of the catalog.
"""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, Generic, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cemg.errors import UserError
from cemg_kernels import ItemFilter, Trie

from .attribute_fields import Field
from .attributes import AttributeTable, Snapshot
from .dates import microseconds
from .expressions import (
    Filter,
    HasIdCondition,
    InCondition,
    IsEmptyCondition,
    IsNullCondition,
    MatchAny,
    MatchCondition,
    MatchExcept,
    MatchText,
    MatchValue,
    NamedFilter,
    RangeCondition,
    canonical,
)
from .named_filters import NamedFilters

V = TypeVar("V")

ENTRY_BYTES = 2_000  # of an entry of a cache beside its value, so that small filters are bounded, too
MAX_TRIES = 2  # filters of older tries are dropped, because each keeps its trie in memory
_WORD = r"[\p{Alphabetic}\p{N}]"
_WORDS = rf"{_WORD}+"
_NO_WORD = _WORD.replace("[", "[^", 1)
_COMPARE: dict[str, Callable[[pl.Expr, Any], pl.Expr]] = {
    "gt": pl.Expr.gt, "gte": pl.Expr.ge, "lt": pl.Expr.lt, "lte": pl.Expr.le,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since the start: requests that found their filter, filters compiled, and what is kept."""

    hits: int
    misses: int
    entries: int
    bytes: int


class Filters:
    """Compiles filter expressions over a table and caches the result. All methods are thread-safe.

    Args:
        table: The attributes of the catalog.
        named: The named filters of the service.
        max_bytes: Limit of the cache. A filter of 1e6 items takes about 2.2 MB: two masks and the bits of
            the trie's nodes.

    Example:
        >>> filters = Filters(AttributeTable(["A", "B"], {"A": {"price": 5}}))
        >>> filters.mask(parse_filter({"must": [{"key": "price", "range": {"lt": 9}}]}))
        tensor([ True, False])
    """

    def __init__(
        self, table: AttributeTable, named: NamedFilters | None = None, *, max_bytes: int = 256 << 20
    ) -> None:
        self.table, self.named = table, named or NamedFilters({})
        for name, filter in self.named.samples():
            check_fields(filter, table.snapshot(), where=f"named filter {name!r}")
        self._rows: _Cache[Tensor] = _Cache(max_bytes // 3, lambda rows: rows.nbytes)
        self._latest: _Cache[tuple[Tensor, ItemFilter]] = _Cache(max_bytes // 3, lambda last: last[0].nbytes)
        self._compiled: _Cache[ItemFilter] = _Cache(max_bytes // 3, lambda one: one.open.nbytes)
        self._tries: deque[str] = deque(maxlen=MAX_TRIES)  # fingerprints, in the order of their use
        self._lock = threading.Lock()

    def compile(
        self,
        expression: Filter | NamedFilter,
        trie: Trie,
        catalog_version: int,
        rows: Tensor | None = None,
    ) -> ItemFilter | None:
        """Returns the filter of an expression for a search, or None if it admits all items.

        Requests for the same expression, catalog and attributes get the same object, compiled once.

        Args:
            expression: What the items must meet.
            trie: The trie that the search walks.
            catalog_version: The version of the catalog that ``trie`` belongs to.
            rows: int64 [number of items in the trie], the table's row of each row of ``Trie.from_codes``.
                None: the rows are the same.

        Raises:
            UserError: A field or named filter is unknown, or a condition does not fit the type of a field.
            ValueError: The number of rows differs from that of the trie.
        """
        resolved = self.named.resolve(expression)
        key, snapshot = canonical(resolved), self.table.snapshot()
        if key == "{}":
            return None
        count = snapshot.num_rows if rows is None else len(rows)
        if count != trie.num_items:
            raise ValueError(
                f"the table has {count} rows and the trie {trie.num_items} items; pass rows= of each item"
            )
        self._use(trie.fingerprint)

        def make() -> ItemFilter:
            mask = self._mask(resolved, key, snapshot)
            allowed = mask if rows is None else mask[rows.to(mask.device)]  # [items of the trie]
            last = self._latest.find((key, trie.fingerprint))
            if last is not None and torch.equal(last[0], allowed):  # most changes leave most filters as is
                return last[1]
            filter = ItemFilter.from_mask(trie, allowed)
            self._latest.put((key, trie.fingerprint), (allowed, filter))
            return filter

        return self._compiled.get((key, trie.fingerprint, catalog_version, snapshot.version), make)

    def mask(self, expression: Filter | NamedFilter) -> Tensor:
        """Returns whether each row of the table meets the expression: bool [N] on the CPU.

        Raises:
            UserError: As in ``compile``.
        """
        resolved = self.named.resolve(expression)
        return self._mask(resolved, canonical(resolved), self.table.snapshot())

    def statistics(self) -> CacheStatistics:
        """Returns the hits, misses and size of the cache of compiled filters, for metrics."""
        compiled, bytes = self._compiled, self._compiled.bytes + self._rows.bytes + self._latest.bytes
        return CacheStatistics(compiled.hits, compiled.misses, len(compiled), bytes)

    def _use(self, fingerprint: str) -> None:
        """Drops the filters of a trie once newer tries have replaced it."""
        with self._lock:
            known = fingerprint in self._tries
            if known:
                self._tries.remove(fingerprint)
            self._tries.append(fingerprint)
            kept = set(self._tries)
        if not known:
            self._compiled.keep(lambda key: key[1] in kept)
            self._latest.keep(lambda key: key[1] in kept)

    def _mask(self, filter: Filter, key: str, snapshot: Snapshot) -> Tensor:
        """Returns the mask [N]. That of the base is cached, so a change of few rows evaluates only these."""
        rows_of = self.table.rows_of
        changed = evaluate(filter, snapshot.overlay, snapshot.fields, rows_of)  # [C]; refuses unknown fields
        base = self._rows.get(
            (key, snapshot.base_version),
            lambda: torch.from_numpy(evaluate(filter, snapshot.base, snapshot.fields, rows_of)),
        )
        mask = torch.zeros(snapshot.num_rows, dtype=torch.bool)  # [N]
        mask[: len(base)] = base
        rows = snapshot.overlay["row"].to_numpy().astype(np.int64)  # [C]
        mask[torch.from_numpy(rows)] = torch.from_numpy(changed)
        return mask


def check_fields(filter: Filter, snapshot: Snapshot, *, where: str = "filter") -> None:
    """Raises UserError if a field of ``filter`` is unknown or a condition does not fit the field's type."""
    _Conditions(snapshot.fields, (), lambda _: []).filter(filter, where)


def evaluate(
    filter: Filter,
    frame: pl.DataFrame,
    fields: Mapping[str, Field],
    rows_of: Callable[[Iterable[str | int]], list[int]],
) -> np.ndarray:
    """Returns whether each row of a frame of a ``Snapshot`` meets the filter: bool [rows]."""
    condition = _Conditions(fields, frame.columns, rows_of).filter(filter, "filter")
    met: np.ndarray = frame.select("row", condition.alias("met"))["met"].to_numpy(writable=True)
    return met


class _Conditions:
    """Converts a filter to a Polars expression without nulls, over the columns that a frame has."""

    def __init__(
        self,
        fields: Mapping[str, Field],
        columns: Container[str],
        rows_of: Callable[[Iterable[str | int]], list[int]],
    ) -> None:
        self.fields, self.columns, self.rows_of = fields, columns, rows_of

    def filter(self, filter: Filter, where: str) -> pl.Expr:
        parts = [pl.lit(True)]
        if filter.must:
            parts += self._clause(filter.must, f"{where}.must")
        if filter.should:
            parts.append(pl.any_horizontal(self._clause(filter.should, f"{where}.should")))
        if filter.must_not:
            parts += [~one for one in self._clause(filter.must_not, f"{where}.must_not")]
        if filter.min_should:
            conditions = self._clause(filter.min_should.conditions, f"{where}.min_should.conditions")
            met = [one.cast(pl.UInt32) for one in conditions]
            enough = pl.sum_horizontal(met) >= filter.min_should.min_count if met else pl.lit(False)
            parts.append(enough)
        return pl.all_horizontal(parts)

    def _clause(self, conditions: list[Any], where: str) -> list[pl.Expr]:
        return [self._condition(one, f"{where}[{i}]") for i, one in enumerate(conditions)]

    def _condition(self, condition: Any, where: str) -> pl.Expr:
        if isinstance(condition, Filter):
            return self.filter(condition, where)
        if isinstance(condition, HasIdCondition):
            return pl.col("row").is_in(pl.Series(self.rows_of(condition.has_id), dtype=pl.UInt32).implode())
        if isinstance(condition, IsEmptyCondition):
            return self._is_empty(self._field(condition.is_empty.key, where))
        if isinstance(condition, IsNullCondition):
            field = self._field(condition.is_null.key, where)
            has_column = field is not None and field.nulls and field.null in self.columns
            return pl.col(field.null).fill_null(False) if field and has_column else pl.lit(False)
        field = self._field(condition.key, where)
        if field is None or field.storage is None:
            return pl.lit(False)
        if isinstance(condition, RangeCondition):
            return self._range(condition, field, where)
        match = MatchAny(any=condition.in_) if isinstance(condition, InCondition) else condition.match
        _check_values(condition, match, field, where)
        if field.column not in self.columns:
            return pl.lit(False)
        column = pl.col(field.column)
        if field.storage != "list of strings":
            return _matches(column, match).fill_null(False)
        return column.list.eval(_matches(pl.element(), match)).list.any().fill_null(False)

    def _field(self, name: str, where: str) -> Field | None:
        """Returns the field, or None if no item has any attribute."""
        if name in self.fields or not self.fields:
            return self.fields.get(name)
        near = difflib.get_close_matches(name, self.fields, 1)
        known = ", ".join(f"{one} ({field.type or 'null'})" for one, field in sorted(self.fields.items()))
        raise UserError(
            f"{where}: no item has the attribute {name!r}",
            cause=f"known attributes: {known}",
            fix=f"write {near[0]!r}" if near else None,
        )

    def _is_empty(self, field: Field | None) -> pl.Expr:
        if field is None or field.column not in self.columns:
            return pl.lit(True)
        column = pl.col(field.column)
        if field.storage == "list of strings":
            return (column.list.len() == 0).fill_null(True)
        return column.is_null()

    def _range(self, condition: RangeCondition, field: Field, where: str) -> pl.Expr:
        bounds = condition.range.given()
        kind = "datetime" if isinstance(next(iter(bounds.values())), str) else "number"
        if field.type != kind:
            raise UserError(
                f"{where}: a range of {kind}s does not fit the attribute {condition.key!r}, "
                f"which is a {field.type}",
                cause=f"{field.not_dates:,} of its {field.values:,} strings are not ISO dates"
                if kind == "datetime" and field.not_dates else None,
                fix="a range needs numbers or datetimes" if field.type not in ("datetime", "number")
                else f"give {field.type}s as bounds",
            )  # fmt: skip
        name = field.moments if kind == "datetime" else field.column
        if name not in self.columns:
            return pl.lit(False)
        limits = {one: microseconds(b) if isinstance(b, str) else b for one, b in bounds.items()}
        return reduce(and_, (_COMPARE[one](pl.col(name), b) for one, b in limits.items())).fill_null(False)


def _check_values(condition: MatchCondition | InCondition, match: Any, field: Field, where: str) -> None:
    """Raises UserError if a value cannot be one of the field."""
    given = {type(value) for value in _values_of(match)}
    wanted = {"number": float, "boolean": bool}.get(field.storage or "", str)
    wrong = next((kind for kind in given if kind is not wanted), None)
    if wrong is not None:
        kinds = {str: "string", float: "number", bool: "boolean"}
        raise UserError(
            f"{where}: a {kinds[wrong]} does not match the attribute {condition.key!r}, "
            f"which is a {field.type}",
            fix=f"compare it with a {kinds[wanted]}",
        )


def _values_of(match: Any) -> list[Any]:
    if isinstance(match, MatchAny):
        return match.any
    if isinstance(match, MatchExcept):
        return match.except_
    return [match.text if isinstance(match, MatchText) else match.value]


def _matches(value: pl.Expr, match: Any) -> pl.Expr:
    """Whether one value of an attribute matches; null where there is none."""
    if isinstance(match, MatchValue):
        return value == match.value
    if isinstance(match, MatchText):
        words = set(pl.Series([match.text]).str.extract_all(_WORDS)[0])
        parts = [value.str.contains(f"(?i)(?:^|{_NO_WORD}){word}(?:$|{_NO_WORD})") for word in sorted(words)]
        return pl.all_horizontal(parts) if parts else value.is_null() & False
    listed = _values_of(match)
    found = value.is_in(listed) if listed else value.is_null() & False
    return ~found & value.is_not_null() if isinstance(match, MatchExcept) else found


class _Cache(Generic[V]):
    """The most recently used values, up to a number of bytes. Concurrent requests make a value once."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self.max_bytes, self.size_of = max_bytes, size_of
        self.hits = self.misses = self.bytes = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[tuple[Hashable, ...], V] = OrderedDict()
        self._pending: dict[tuple[Hashable, ...], Future[V]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: tuple[Hashable, ...], make: Callable[[], V]) -> V:
        """Returns the value of a key; makes it if it is not there. An error goes to all that wait for it."""
        with self._lock:
            if key in self._values:
                self.hits += 1
                self._values.move_to_end(key)
                return self._values[key]
            pending = self._pending.get(key)
            if pending is None:
                self.misses += 1
                own = self._pending[key] = Future()
            else:
                self.hits += 1
        if pending is not None:
            return pending.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self._insert(key, value)
        own.set_result(value)
        return value

    def find(self, key: tuple[Hashable, ...]) -> V | None:
        """Returns the value of a key if it is there."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: tuple[Hashable, ...], value: V) -> None:
        """Adds or replaces a value."""
        with self._lock:
            if key in self._values:
                self._drop(key)
            self._insert(key, value)

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Drops the values of all other keys."""
        with self._lock:
            for key in [key for key in self._values if not wanted(key)]:
                self._drop(key)

    def _insert(self, key: tuple[Hashable, ...], value: V) -> None:
        self._values[key] = value
        self.bytes += self._size(key, value)
        while self.bytes > self.max_bytes and self._values:
            self._drop(next(iter(self._values)))

    def _drop(self, key: tuple[Hashable, ...]) -> None:
        self.bytes -= self._size(key, self._values.pop(key))

    def _size(self, key: tuple[Hashable, ...], value: V) -> int:
        """Bytes of an entry; the expression in the key may be longer than the filter."""
        return ENTRY_BYTES + sum(len(part) for part in key if isinstance(part, str)) + self.size_of(value)
