"""Filter expressions over item attributes, in the shape of Qdrant's filters.

``{"must": [...], "should": [...], "must_not": [...], "min_should": {...}}`` admits the items that meet all
conditions of ``must``, none of ``must_not``, and one of ``should``. Clauses that are missing or empty have no
effect. A condition compares an attribute, and expressions nest. An item without the attribute meets no
``match``, ``range`` or ``in``. A list meets a condition if one of its values does, also ``except``.

Two differences from Qdrant: numbers compare by value (1 and 1.0 are equal), and ``in`` is short for
``match.any``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    StrictBool,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from cemg.errors import UserError

from .dates import microseconds

MAX_DEPTH = 8  # expressions within each other
MAX_CONDITIONS = 256
MAX_VALUES = 10_000  # numbers, strings and booleans of one expression
MAX_TEXT = 1_000  # characters of a name or value
MAX_WORDS = 64  # of all texts to match: each is a search in the values of the catalog
MAX_NUMBER = sys.float_info.max
CLAUSES = ("must", "should", "must_not", "min_should")
_UNORDERED = {"must", "should", "must_not", "conditions", "any", "except", "has_id"}

Number = Annotated[float, Strict(), AllowInfNan(False)]


def _check_value(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"a value is a string, a number or a boolean, got {type(value).__name__}")
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise ValueError("a number must be finite and fit a 64-bit float")
    return value


Value = Annotated[StrictBool | Number | StrictStr, BeforeValidator(_check_value)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _examples(*examples: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(examples)})


class MatchValue(_Model):
    """The attribute is this value."""

    value: Value


class MatchAny(_Model):
    """The attribute is one of these values."""

    any: list[Value]


class MatchExcept(_Model):
    """The attribute has a value that is not one of these."""

    except_: list[Value] = Field(alias="except")


class MatchText(_Model):
    """The attribute contains all words of this text, in any order; upper and lower case are equal."""

    text: StrictStr


def _kind_of_match(match: Any) -> str | None:
    if isinstance(match, BaseModel):
        return f"={next(iter(type(match).model_fields)).rstrip('_')}"
    names = [name for name in ("value", "any", "except", "text") if isinstance(match, dict) and name in match]
    return f"={names[0]}" if names else None


Match = Annotated[
    Annotated[MatchValue, Tag("=value")]
    | Annotated[MatchAny, Tag("=any")]
    | Annotated[MatchExcept, Tag("=except")]
    | Annotated[MatchText, Tag("=text")],
    Discriminator(
        _kind_of_match,
        custom_error_type="unknown_match",
        custom_error_message="match has one of value, any, except and text",
    ),
]


class MatchCondition(_Model):
    """Compares an attribute with one or several values."""

    model_config = _examples({"key": "category", "match": {"value": "music"}})

    key: StrictStr
    match: Match


def _check_bound(bound: Any) -> Any:
    if isinstance(bound, bool) or not isinstance(bound, int | float | str):
        raise ValueError("a bound is a number or an ISO date such as 2024-01-31 or 2024-01-31T08:00:00Z")
    if not isinstance(bound, str):
        return _check_value(bound)
    if microseconds(bound) is None:
        raise ValueError(f"{bound!r} is not an ISO date such as 2024-01-31 or 2024-01-31T08:00:00Z")
    return bound


Bound = Annotated[Number | StrictStr, BeforeValidator(_check_bound)]


class Bounds(_Model):
    """Numbers or ISO dates; a date without an offset is in UTC. All bounds hold."""

    gt: Bound | None = None
    gte: Bound | None = None
    lt: Bound | None = None
    lte: Bound | None = None

    @model_validator(mode="after")
    def _check(self) -> Bounds:
        kinds = {isinstance(bound, str) for bound in self.given().values()}
        if len(kinds) != 1:
            what = "mixes numbers and dates" if kinds else "has none of gt, gte, lt and lte"
            raise ValueError(f"the range {what}")
        return self

    def given(self) -> dict[str, float | str]:
        """Returns the bounds that are set, by their names."""
        named = {"gt": self.gt, "gte": self.gte, "lt": self.lt, "lte": self.lte}
        return {name: bound for name, bound in named.items() if bound is not None}


class RangeCondition(_Model):
    """The attribute, a number or a date, is within bounds."""

    model_config = _examples(
        {"key": "price", "range": {"gte": 5, "lt": 20}}, {"key": "published", "range": {"gte": "2024-01-31"}}
    )

    key: StrictStr
    range: Bounds


class InCondition(_Model):
    """Short for ``match`` with ``any``: the attribute is one of these values."""

    model_config = _examples({"key": "color", "in": ["red", "blue"]})

    key: StrictStr
    in_: list[Value] = Field(alias="in")


class HasIdCondition(_Model):
    """The item is one of these. Ids that the catalog does not have match nothing."""

    model_config = _examples({"has_id": ["B001", "B002"]})

    has_id: list[StrictStr | Annotated[int, Strict()]]


class Key(_Model):
    """The name of an attribute."""

    key: StrictStr


class IsEmptyCondition(_Model):
    """The item does not have the attribute, or it is null or an empty list."""

    model_config = _examples({"is_empty": {"key": "stock"}})

    is_empty: Key


class IsNullCondition(_Model):
    """The attribute is null. An item without it does not match."""

    model_config = _examples({"is_null": {"key": "stock"}})

    is_null: Key


class NamedFilter(_Model):
    """A filter of the service's filters file, with values for its parameters."""

    model_config = _examples({"name": "in_stock_below", "parameters": {"max_price": 20}})

    name: StrictStr
    parameters: dict[str, Any] = Field(default_factory=dict)


_KEYS = {  # the key that tells a kind of condition from the others
    "match": MatchCondition,
    "range": RangeCondition,
    "in": InCondition,
    "has_id": HasIdCondition,
    "is_empty": IsEmptyCondition,
    "is_null": IsNullCondition,
    "name": NamedFilter,
}


def _kind_of_condition(condition: Any) -> str | None:
    if isinstance(condition, BaseModel):
        return next((f"={key}" for key, kind in _KEYS.items() if isinstance(condition, kind)), "=filter")
    if not isinstance(condition, dict):
        return None
    names = [key for key in _KEYS if key in condition]
    if names:
        return f"={names[0]}"
    return "=filter" if not condition or any(name in condition for name in CLAUSES) else None


_DISCRIMINATOR = Discriminator(
    _kind_of_condition,
    custom_error_type="unknown_condition",
    custom_error_message="a condition is {key, match}, {key, range}, {key, in}, {has_id}, {is_empty}, "
    "{is_null}, a named filter {name, parameters}, or an expression with "
    "must, should, must_not or min_should",
)
Condition = Annotated[
    Annotated[MatchCondition, Tag("=match")]
    | Annotated[RangeCondition, Tag("=range")]
    | Annotated[InCondition, Tag("=in")]
    | Annotated[HasIdCondition, Tag("=has_id")]
    | Annotated[IsEmptyCondition, Tag("=is_empty")]
    | Annotated[IsNullCondition, Tag("=is_null")]
    | Annotated[NamedFilter, Tag("=name")]
    | Annotated["Filter", Tag("=filter")],
    _DISCRIMINATOR,
]


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, dict | BaseModel) else given


Clause = Annotated[
    list[Condition], BeforeValidator(_listed, json_schema_input_type=list[Condition] | Condition)
]


class MinShould(_Model):
    """At least ``min_count`` of the conditions hold."""

    conditions: Clause
    min_count: Annotated[int, Strict(), Field(ge=1)]


class Filter(_Model):
    """Admits items by their attributes. Without conditions it admits all items."""

    model_config = _examples(
        {
            "must": [
                {"key": "category", "match": {"value": "music"}},
                {"key": "price", "range": {"lte": 20}},
            ],
            "must_not": [{"key": "stock", "match": {"value": 0}}],
        }
    )

    must: Clause | None = None
    should: Clause | None = None
    must_not: Clause | None = None
    min_should: MinShould | None = None


def check_limits(given: Any) -> Any:
    """Returns ``given``, the JSON of a filter, unchanged.

    Raises:
        UserError: It is nested too deeply, has too many conditions or values, or a string is too long or not
            valid Unicode.
    """
    conditions = values = words = 0
    stack = [(given, 0)]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, Mapping):
            inner = [node[name] for name in CLAUSES if name in node]
            depth += bool(inner)
            if depth > MAX_DEPTH:
                raise UserError(f"the filter has more than {MAX_DEPTH} expressions within each other",
                                fix="flatten it: nested must inside must is one must")  # fmt: skip
            conditions += sum(len(clause) if isinstance(clause, list) else 1 for clause in inner)
            if isinstance(text := node.get("text"), str):
                words += len(re.findall(r"\w+", text[:MAX_TEXT]))
            stack += [(name, depth) for name in node if isinstance(name, str) and name not in CLAUSES]
            stack += [(child, depth) for child in node.values()]
        elif isinstance(node, list):
            stack += [(child, depth) for child in node]
        else:
            values += 1
            if isinstance(node, str):
                check_text(node, "a string of the filter")
        if words > MAX_WORDS:
            raise UserError(f"the texts to match have more than {MAX_WORDS} words", fix="use fewer words")
        if conditions > MAX_CONDITIONS or values + len(stack) > 4 * MAX_VALUES or values > MAX_VALUES:
            raise UserError(
                "the filter is too large",
                cause=f"at most {MAX_CONDITIONS} conditions and {MAX_VALUES:,} values are allowed",
                fix="name the subset: set an attribute on its items and match that",
            )
    return given


def check_text(text: str, what: str) -> None:
    """Raises UserError if ``text`` is too long or not valid Unicode."""
    if len(text) > MAX_TEXT:
        raise UserError(f"{what} has {len(text):,} characters", fix=f"use at most {MAX_TEXT:,}")
    check_unicode(text, what)


def check_unicode(text: str, what: str) -> None:
    """Raises UserError if ``text`` has half of a surrogate pair, which UTF-8 cannot encode."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"{what} is not valid Unicode: {text[:40]!a}")


FilterInput = Annotated[
    Annotated[NamedFilter, Tag("=name")] | Annotated[Filter, Tag("=filter")],
    Discriminator(
        lambda given: "=name"
        if isinstance(given, NamedFilter) or (isinstance(given, dict) and "name" in given) else "=filter"
    ),
    BeforeValidator(check_limits),
]  # fmt: skip
"""The type of a request's ``filter`` field: an expression or a named filter, within the limits."""

_MESSAGES = {  # in place of pydantic's, which name Python's types
    "extra_forbidden": "there is no such field",
    "missing": "the field is missing",
    "model_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
    "list_type": "must be a list",
}
_ADAPTER: TypeAdapter[Filter | NamedFilter] = TypeAdapter(FilterInput)


def parse_filter(given: Any, *, where: str = "filter") -> Filter | NamedFilter:
    """Reads a filter from parsed JSON.

    Args:
        given: Dictionaries, lists, strings, numbers and booleans.
        where: What errors call the filter.

    Raises:
        UserError: It is not a filter, or too large; the message names the place.

    Example:
        >>> parse_filter({"must": [{"key": "price", "in": [1, 2]}]}).must[0].in_
        [1.0, 2.0]
    """
    try:
        return _ADAPTER.validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from error
        message = _MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise UserError(f"{where}{place(first['loc'])}: {message}") from error


def place(location: tuple[int | str, ...]) -> str:
    """Returns a location of pydantic as a path such as ``.must[0].range``, without the kinds of unions."""
    names = [part for part in location if isinstance(part, int) or not _is_kind(part)]
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)


def _is_kind(part: str) -> bool:
    """Whether pydantic names a member of a union by ``part``: our tags, and types such as ``float``."""
    return part.startswith(("=", "function-", "constrained-")) or part in ("bool", "float", "int", "str")


def canonical(filter: Filter) -> str:
    """Returns JSON that is equal for filters that differ only in order, repetition and empty clauses.

    Example:
        >>> canonical(parse_filter({"should": [], "must": {"key": "a", "in": [2, 1, 2]}}))
        '{"must":[{"key":"a","match":{"any":[1.0,2.0]}}]}'
    """
    return _dump(_ordered(filter.model_dump(by_alias=True, exclude_none=True)))


def _ordered(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if "in" in node:
        node = {"key": node["key"], "match": {"any": node["in"]}}
    ordered = {}
    for name, child in node.items():
        if name in _UNORDERED:
            parts = sorted((_ordered(part) for part in child), key=_dump)
            if name != "conditions":  # min_should counts a repeated condition twice
                parts = [part for i, part in enumerate(parts) if i == 0 or _dump(part) != _dump(parts[i - 1])]
            if parts or name not in CLAUSES:
                ordered[name] = parts
        else:
            ordered[name] = _ordered(child)
    return ordered


def _dump(node: Any) -> str:
    return json.dumps(node, sort_keys=True, separators=(",", ":"))
