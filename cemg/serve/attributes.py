"""The attributes of all catalog items as columns, updated one item at a time.

The table has a base of Polars columns and an overlay of changed rows, which a merge moves into the base once
there are many. An update costs the changed rows only, and a filter is evaluated on the base and on the
overlay. N rows of the catalog, C changed rows in the overlay.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import polars as pl

from cemg.errors import UserError

from .attribute_fields import (
    STORAGE_OF,
    TYPES,
    Field,
    Type,
    check_name,
    checked_columns,
    frame_of,
    moments_of,
    row_numbers,
    with_overlay,
)

MAX_FIELDS = 256
MAX_OVERLAY = 4096  # changed rows between two merges; evaluating them takes a few milliseconds
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The attributes at one version; immutable.

    Args:
        version: Grows with each change of the attributes.
        base_version: Grows with each merge of the overlay into the base.
        num_rows: N.
        base: The first rows. A field that is newer than the last merge has no column here.
        overlay: The changed rows, which replace those of the base. ``row`` holds their numbers.
        fields: The fields by name.
    """

    version: int
    base_version: int
    num_rows: int
    base: pl.DataFrame
    overlay: pl.DataFrame
    fields: Mapping[str, Field]

    @property
    def types(self) -> dict[str, Type]:
        """The type of each field that has values or a declared type, in the order of the names."""
        return {name: field.type for name, field in sorted(self.fields.items()) if field.type}


class AttributeTable:
    """The attributes of the items of a catalog. All methods are thread-safe.

    A value is a string, a number (stored as a 64-bit float), a boolean, a list of strings, or null. A field
    has one type for all items. Strings that all are ISO dates have the type ``datetime``, and filters compare
    them as moments. A declared type holds from the first item on.

    Args:
        item_ids: The ids of rows 0 to N - 1. An integer and its decimal string are the same id.
        attributes: Values by name for each item; items without attributes may be absent.
        types: Declared types by field name: string, number, boolean, list of strings or datetime.

    Raises:
        UserError: An id occurs twice, an item is not in the catalog, or a value or name is not valid.

    Example:
        >>> table = AttributeTable(["A", "B"], {"A": {"price": 5, "color": "red"}})
        >>> table.update({"B": {"price": 7.5}})
        >>> table.types, table["B"], table.version
        ({'color': 'string', 'price': 'number'}, {'price': 7.5}, 2)
    """

    def __init__(
        self,
        item_ids: Sequence[str | int],
        attributes: Mapping[Any, Mapping[str, Any]] | None = None,
        *,
        types: Mapping[str, Type] | None = None,
    ) -> None:
        self._lock, self._merge_lock = threading.Lock(), threading.Lock()
        self._merging = False
        self._row_of: dict[str, int] = {}
        self._columns = 0  # number of column names so far
        self._version = self._base_version = 1
        self._overlay: dict[int, Mapping[str, Any]] = {}
        self._snapshot: Snapshot | None = None
        self._fields = {name: self._declared(name, declared) for name, declared in (types or {}).items()}
        self._row_of = self._numbered(item_ids)
        given = _by_id(attributes or {})
        _check_known(given, self._row_of)
        self._base = self._built([given.get(item) or _NOTHING for item in self._row_of])

    def __len__(self) -> int:
        """Returns the number of rows, N."""
        return len(self._row_of)

    def __contains__(self, item_id: str | int) -> bool:
        """Returns whether the catalog has the item."""
        return str(item_id) in self._row_of

    def __getitem__(self, item_id: str | int) -> dict[str, Any]:
        """Returns the attributes of an item; an integer may be a float.

        Raises:
            UserError: The catalog does not have the item.
        """
        with self._lock:
            item_id = str(item_id)
            _check_known({item_id: None}, self._row_of)
            return dict(self._values(self._row_of[item_id]))

    @property
    def version(self) -> int:
        """Grows with each change."""
        return self._version

    @property
    def types(self) -> dict[str, Type]:
        """The type of each field that has values or a declared type, in the order of the names."""
        return self.snapshot().types

    def rows_of(self, item_ids: Iterable[str | int]) -> list[int]:
        """Returns the rows of the items that the catalog has; leaves out others."""
        rows = (self._row_of.get(str(item)) for item in item_ids)
        return [row for row in rows if row is not None]

    def update(self, attributes: Mapping[Any, Mapping[str, Any]]) -> None:
        """Replaces all attributes of the given items, or of none of them if one is not valid.

        Raises:
            UserError: An item is not in the catalog, or a value or name is not valid; the message names it.
        """
        with self._lock:
            given = _by_id(attributes)
            _check_known(given, self._row_of)
            self._replace({self._row_of[item]: dict(values) for item, values in given.items()}, list(given))

    def extend(
        self, item_ids: Sequence[str | int], attributes: Mapping[Any, Mapping[str, Any]] | None = None
    ) -> None:
        """Appends rows for new items, with or without attributes; none of them if one is not valid.

        Raises:
            UserError: An id is already in the catalog, a value or name is not valid, or ``attributes`` has
                an item that is not among ``item_ids``.
        """
        with self._lock:
            new = self._numbered(item_ids)
            given = _by_id(attributes or {})
            _check_known(given, new)
            self._replace({row: dict(given.get(item) or {}) for item, row in new.items()}, list(new))
            self._row_of |= new

    def check(self, attributes: Mapping[Any, Mapping[str, Any]]) -> None:
        """Checks what ``update`` would do, or ``extend`` for new items, and changes nothing.

        Raises:
            UserError: A value or name is not valid, or does not fit those of other items.
        """
        with self._lock:
            given = _by_id(attributes)
            new = len(self._row_of)
            rows = {self._row_of.get(item, new + n): dict(v) for n, (item, v) in enumerate(given.items())}
            self._checked(rows, list(given))

    def snapshot(self) -> Snapshot:
        """Returns the current attributes; builds the frame of the overlay once per version."""
        with self._lock:
            if self._snapshot is None or self._snapshot.version != self._version:
                self._add_moments()
                self._snapshot = Snapshot(
                    self._version, self._base_version, len(self), self._base,
                    frame_of(self._overlay, self._fields),
                    self._fields,
                )  # fmt: skip
            return self._snapshot

    def merge(self) -> None:
        """Moves the changed rows into the base. The table does this itself, in the background."""
        with self._merge_lock:
            with self._lock:
                self._add_moments()
                base, overlay, fields = self._base, dict(self._overlay), self._fields
            merged = with_overlay(base, frame_of(overlay, fields))
            with self._lock:  # rows that changed meanwhile stay in the overlay
                self._base, self._snapshot = merged, None
                self._overlay = {r: new for r, new in self._overlay.items() if overlay.get(r) is not new}
                self._base_version += 1

    def _merge_in_background(self) -> None:
        try:
            self.merge()
        finally:
            self._merging = False

    def _numbered(self, item_ids: Sequence[str | int]) -> dict[str, int]:
        """Returns the next rows by new item id."""
        first = len(self._row_of)
        new = dict(zip(map(str, item_ids), range(first, first + len(item_ids)), strict=True))
        twice = next(iter(new.keys() & self._row_of.keys()), None) if first else None
        if len(new) < len(item_ids):
            twice = Counter(map(str, item_ids)).most_common(1)[0][0]
        if twice is not None:
            raise UserError(f"the item {twice!r} occurs twice", fix="give each item its own id")
        return new

    def _column(self) -> str:
        self._columns += 1
        return f"f{self._columns}"

    def _field(self) -> Field:
        column = self._column()
        return Field(column, f"{column}.null")

    def _declared(self, name: str, declared: Type) -> Field:
        check_name(name)
        if declared not in TYPES:
            raise UserError(f"unknown type {declared!r} of the attribute {name!r}",
                            fix=f"choose from {', '.join(TYPES)}")  # fmt: skip
        field = self._field()
        field.declared, field.storage = declared, "string" if declared == "datetime" else declared
        return field

    def _built(self, rows: list[Mapping[str, Any]]) -> pl.DataFrame:
        """Returns the base of all rows. Checks and counts the values column by column."""
        present, item_ids = Counter(chain.from_iterable(rows)), list(self._row_of)
        for name in present:
            check_name(name)
            self._fields.setdefault(name, self._field())
        _check_number_of(self._fields)
        columns = [row_numbers(range(len(rows)))]
        for name, field in self._fields.items():
            values = [row.get(name) for row in rows]
            field.values = len(values) - values.count(None)
            field.nulls = present[name] - field.values
            if field.nulls:
                columns.append(pl.Series(field.null, [row.get(name, 0) is None for row in rows], pl.Boolean))
            if field.values:
                columns += checked_columns(name, field, values, item_ids)
        return pl.DataFrame(columns)

    def _replace(self, changed: dict[int, dict[str, Any]], items: Sequence[str]) -> None:
        """Replaces the attributes of rows; checks all of them before it changes anything."""
        self._fields = self._checked(changed, items)
        self._overlay |= changed
        self._version += 1
        if len(self._overlay) > MAX_OVERLAY and not self._merging:
            self._merging = True
            threading.Thread(target=self._merge_in_background, name="cemg-attributes", daemon=True).start()

    def _checked(self, changed: dict[int, dict[str, Any]], items: Sequence[str]) -> dict[str, Field]:
        """Returns the fields as they are after rows are replaced. Raises UserError for the first problem."""
        fields = {name: copy.copy(field) for name, field in self._fields.items()}
        for row in changed:
            for name, value in self._values(row).items():
                fields[name].count(value, -1)
        for name, field in list(fields.items()):
            if not field.values and not field.declared:
                field.storage, field.column = None, self._column()
                if not field.nulls:
                    del fields[name]
        for item, values in zip(items, changed.values(), strict=True):
            for name, value in values.items():
                field = fields.get(name) or self._field()
                if name not in fields:
                    check_name(name)
                    fields[name] = field
                field.check(name, value, item)
                field.storage = field.storage or STORAGE_OF.get(type(value))
                field.count(value, 1)
        _check_number_of(fields)
        return fields

    def _values(self, row: int) -> Mapping[str, Any]:
        """Returns the attributes of a row; a row that does not exist yet has none."""
        if row in self._overlay or row >= self._base.height:
            return self._overlay.get(row, {})
        values: dict[str, Any] = {}
        for name, field in self._fields.items():
            value = self._base[field.column][row] if field.column in self._base.columns else None
            is_null = field.nulls and field.null in self._base.columns and self._base[field.null][row]
            if value is not None or is_null:
                values[name] = value.to_list() if isinstance(value, pl.Series) else value
        return values

    def _add_moments(self) -> None:
        """Adds the moments of fields that became dates because other strings were replaced."""
        for field in self._fields.values():
            columns = self._base.columns
            if field.type == "datetime" and field.column in columns and field.moments not in columns:
                moments = moments_of(self._base[field.column]).alias(field.moments)
                self._base = self._base.with_columns(moments)


def _by_id(attributes: Mapping[Any, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    if set(map(type, attributes)) <= {str}:
        return attributes
    return {str(item): values for item, values in attributes.items()}


def _check_known(items: Mapping[str, Any], row_of: Mapping[str, int]) -> None:
    if items.keys() <= row_of.keys():
        return
    unknown = [item for item in items if item not in row_of]
    raise UserError(
        f"the catalog has no item {unknown[0]!r}",
        cause=f"{len(unknown):,} of {len(items):,} items are not in it" if len(items) > 1 else None,
        fix="add the item first",
    )


def _check_number_of(fields: Mapping[str, Field]) -> None:
    if len(fields) > MAX_FIELDS:
        raise UserError(
            f"the items have more than {MAX_FIELDS} different attributes",
            cause=f"{list(fields)[-1]!r} is one too many",
            fix="put labels into one attribute, a list of strings",
        )
