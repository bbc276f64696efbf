"""Filters that the operator of the service defines, by name and with parameters.

A file ``filters.yaml`` (or JSON) holds them::

    in_stock_below:
      parameters: {max_price: number}
      filter:
        must:
          - {key: stock, range: {gt: 0}}
          - {key: price, range: {lte: $max_price}}

A request writes ``{"name": "in_stock_below", "parameters": {"max_price": 20}}`` as its filter, or as a
condition. ``$name`` stands for the value of a parameter; ``$$`` begins a string with one dollar sign.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cemg.errors import UserError
from cemg.storage.read import read_text

from .dates import microseconds
from .expressions import CLAUSES, Filter, NamedFilter, parse_filter

MAX_FILE = 1_000_000  # characters
SAMPLES: dict[str, Any] = {  # a value of each type of parameter
    "string": "a",
    "number": 1,
    "boolean": True,
    "datetime": "2024-01-31",
    "list of strings": ["a"],
    "list of numbers": [1],
}


@dataclass(frozen=True, slots=True)
class Definition:
    """One named filter.

    Args:
        parameters: Type of each parameter.
        template: JSON of the filter, with ``$name`` in place of values.
    """

    parameters: Mapping[str, str]
    template: Mapping[str, Any]


class NamedFilters:
    """The named filters of a service, checked when they are read.

    Args:
        definitions: ``{"parameters": {name: type}, "filter": {...}}`` by name.
        source: Where they are from, for errors.

    Raises:
        UserError: A definition is not valid; the message names it.

    Example:
        >>> named = NamedFilters({"red": {"filter": {"must": [{"key": "color", "match": {"value": "red"}}]}}})
        >>> named.resolve(NamedFilter(name="red")).must[0].match.value
        'red'
    """

    def __init__(self, definitions: Mapping[str, Any], *, source: str = "the named filters") -> None:
        if not isinstance(definitions, Mapping):
            raise UserError(f"{source} must be a mapping of names, got {type(definitions).__name__}")
        self._definitions: dict[str, Definition] = {}
        for name, given in definitions.items():
            self._definitions[str(name)] = _definition(f"{source}: {name}", given)
        self._samples = [(name, self._sample(name)) for name in self._definitions]

    @classmethod
    def read(cls, path: Path | str) -> NamedFilters:
        """Reads a YAML or JSON file.

        Raises:
            UserError: The file cannot be read, or a definition is not valid.
        """
        path = Path(path)
        text = read_text(path, fix="check the path of the filters file")
        if len(text) > MAX_FILE:
            raise UserError(f"{path} has more than {MAX_FILE:,} characters")
        try:
            tree = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            cause = " ".join(str(error).split())[:300]
            raise UserError(f"{path} is not valid YAML or JSON", cause=cause) from error
        return cls({} if tree is None else tree, source=str(path))

    @property
    def definitions(self) -> Mapping[str, Definition]:
        """The filters by name."""
        return self._definitions

    def samples(self) -> list[tuple[str, Filter]]:
        """Returns each name and its filter with example values, for checks of fields and types."""
        return self._samples

    def _sample(self, name: str) -> Filter:
        one = self._definitions[name]
        samples = {parameter: SAMPLES[kind] for parameter, kind in one.parameters.items()}
        filter = _parsed(_filled(one.template, samples), name)
        try:
            NamedFilters({}).resolve(filter)  # finds names of other filters
        except UserError as error:
            raise UserError(
                f"the named filter {name!r} cannot use another one", cause=error.message
            ) from error
        return filter

    def resolve(self, expression: Filter | NamedFilter) -> Filter:
        """Returns an expression with the definitions in place of names, also of names within it.

        Raises:
            UserError: A name is unknown, or a parameter is missing, unknown or of another type.
        """
        if isinstance(expression, NamedFilter):
            return self._filter(expression)
        changed: dict[str, Any] = {}
        for clause in CLAUSES:
            conditions = getattr(expression, clause)
            if clause == "min_should" and conditions:
                inner = self._conditions(conditions.conditions)
                if inner is not conditions.conditions:
                    changed[clause] = conditions.model_copy(update={"conditions": inner})
            elif conditions:
                inner = self._conditions(conditions)
                if inner is not conditions:
                    changed[clause] = inner
        return expression.model_copy(update=changed) if changed else expression

    def _conditions(self, conditions: list[Any]) -> list[Any]:
        """Returns the conditions with names resolved; the same list if it has none."""
        resolved = [self.resolve(one) if isinstance(one, Filter | NamedFilter) else one for one in conditions]
        same = all(a is b for a, b in zip(resolved, conditions, strict=True))
        return conditions if same else resolved

    def _filter(self, use: NamedFilter) -> Filter:
        one = self._definitions.get(use.name)
        if one is None:
            near = difflib.get_close_matches(use.name, self._definitions, 1)
            names = ", ".join(sorted(self._definitions))
            raise UserError(
                f"there is no filter named {use.name!r}",
                cause=f"named filters: {names}" if names else "the service has no named filters",
                fix=f"write {near[0]!r}" if near else None,
            )
        _check_names(use, one.parameters)
        for name, kind in one.parameters.items():
            if not _fits(use.parameters[name], kind):
                raise UserError(
                    f"parameter {name!r} of the filter {use.name!r} must be a {kind}, "
                    f"got {use.parameters[name]!r:.80}"
                )
        return _parsed(_filled(one.template, use.parameters), use.name)


def _parsed(given: Any, name: str) -> Filter:
    filter = parse_filter(given, where=f"named filter {name!r}")
    assert isinstance(filter, Filter)
    return filter


class _Loader(yaml.SafeLoader):
    """YAML without aliases, repeated keys and dates, which stay strings as in JSON."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases such as *{event.anchor} are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} occurs twice in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _definition(where: str, given: Any) -> Definition:
    """Checks one definition: its form, the types and use of its parameters, and its filter."""
    if not isinstance(given, Mapping) or "filter" not in given or set(given) - {"filter", "parameters"}:
        raise UserError(f"{where}: a named filter has a filter and, if it takes values, parameters")
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UserError(f"{where}: parameters must be a mapping of names to types")
    for name, kind in parameters.items():
        if not isinstance(kind, str) or kind not in SAMPLES:
            raise UserError(
                f"{where}: unknown type {kind!r} of the parameter {name!r}",
                fix=f"choose from {', '.join(SAMPLES)}",
            )
    if not isinstance(given["filter"], Mapping) or "name" in given["filter"]:
        raise UserError(f"{where}: the filter must be an expression with must, should or must_not")
    used: set[str] = set()
    _filled(given["filter"], {name: SAMPLES[kind] for name, kind in parameters.items()}, used)
    undeclared, unused = used - set(parameters), set(parameters) - used
    if undeclared:
        raise UserError(
            f"{where}: the parameter {min(undeclared)!r} is not declared", fix="list it under parameters"
        )
    if unused:
        raise UserError(f"{where}: the parameter {min(unused)!r} is not used", fix="remove it")
    return Definition(dict(parameters), given["filter"])


def _filled(template: Any, values: Mapping[str, Any], used: set[str] | None = None) -> Any:
    """Returns the template with values in place of ``$name``; adds the names that it has to ``used``."""
    if isinstance(template, Mapping):
        return {key: _filled(child, values, used) for key, child in template.items()}
    if isinstance(template, list):
        return [_filled(child, values, used) for child in template]
    if not isinstance(template, str) or not template.startswith("$"):
        return template
    name = template[1:]
    if name.startswith("$"):
        return name
    if used is not None:
        used.add(name)
    return values.get(name)


def _check_names(use: NamedFilter, parameters: Mapping[str, str]) -> None:
    """Raises UserError if a parameter is missing or unknown."""
    known = ", ".join(f"{name} ({kind})" for name, kind in parameters.items()) or "none"
    missing, extra = set(parameters) - set(use.parameters), set(use.parameters) - set(parameters)
    if missing or extra:
        problem = f"needs the parameter {min(missing)!r}" if missing else f"has no parameter {min(extra)!r}"
        raise UserError(f"the filter {use.name!r} {problem}", cause=f"its parameters: {known}")


def _fits(value: Any, kind: str) -> bool:
    """Whether a value of parsed JSON has the type of a parameter."""
    if kind.startswith("list of "):
        one = kind.removeprefix("list of ").removesuffix("s")
        return isinstance(value, list) and all(_fits(part, one) for part in value)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if kind == "boolean":
        return isinstance(value, bool)
    return isinstance(value, str) and (kind == "string" or microseconds(value) is not None)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
