"""What the store holds: events, items, changes of the catalog and deletions of users, and their limits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cemg.data.dataset import check_ids
from cemg.errors import UserError

MAX_ID = 256  # characters of an id, and of the name of an attribute
MAX_TYPE = 64  # characters of the type of an event
MAX_TITLE = 1_000  # characters
MAX_TEXT = 100_000  # characters
MAX_IMAGE = 16 * 2**20  # bytes of an image file
MAX_ATTRIBUTES = 64 * 2**10  # bytes of the attributes of an item as JSON
MAX_LEVELS = 64  # codes of a semantic ID
MAX_INTEGER = 2**63 - 1  # what databases and Polars can compare
NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL has no NUL, and UTF-8 has no surrogates

Attribute = str | int | float | bool | list[str]
State = Literal["active", "pending", "removed"]
Kind = Literal["put", "patch", "remove", "place", "catalog"]
STATES: tuple[State, ...] = ("active", "pending", "removed")
PATCHABLE = ("title", "text", "image", "attributes")


class UnknownItemError(UserError):
    """The item is not in the catalog."""


class DroppedError(UserError):
    """Changes of the catalog are too old to be in the log, or of another store."""


@dataclass(frozen=True, slots=True)
class Event:
    """An interaction of a user with an item.

    Attributes:
        event_id: Identifies the event. An event with a known id is not stored again.
        user_id: The user.
        item_id: The item. It need not be in the catalog.
        timestamp: Seconds since 1970; None takes the time at which the store received the event.
        type: What the user did, for example "click".
    """

    event_id: str
    user_id: str
    item_id: str
    timestamp: float | None = None
    type: str = "interaction"


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event in the store.

    Attributes:
        number: Its place in the order of arrival. Numbers only grow and are never used again.
        event_id: See `Event`.
        user_id: The user.
        item_id: The item.
        timestamp: The timestamp that was given, or None.
        type: What the user did.
        received: When it was stored, in seconds since 1970.
    """

    number: int
    event_id: str
    user_id: str
    item_id: str
    timestamp: float | None
    type: str
    received: float

    @property
    def time(self) -> float:
        """The timestamp if given, else the time at which the event was stored."""
        return self.received if self.timestamp is None else self.timestamp


@dataclass(frozen=True, slots=True)
class Deletion:
    """A deletion of a user. Its number is in the same order as those of the events.

    Attributes:
        number: Events of the user with a smaller number are deleted.
        user_id: The user.
        events: How many events were deleted.
        time: When, in seconds since 1970.
    """

    number: int
    user_id: str
    events: int
    time: float


@dataclass(frozen=True, slots=True)
class Item:
    """An item as a client sends it.

    Attributes:
        item_id: The item.
        title: Its title, for people.
        text: Its description, for the encoder.
        image: The bytes of an image file.
        attributes: Values that filters read, for example ``{"price": 9.5, "tags": ["toy", "sale"]}``.
    """

    item_id: str
    title: str = ""
    text: str = ""
    image: bytes | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item in the store.

    Attributes:
        item: The item. Lists of items leave out the images unless told otherwise; see ``has_image``.
        state: "active", "pending" (it has no semantic ID yet) or "removed".
        codes: Its semantic ID if it was placed after the training, else None.
        version: The version of the catalog that last changed it.
        time: When that was, in seconds since 1970.
        has_image: Whether it has an image.
    """

    item: Item
    state: State
    codes: tuple[int, ...] | None
    version: int
    time: float
    has_image: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the catalog.

    Attributes:
        version: Its number, which is the version of the catalog after it.
        kind: "put", "patch" and "remove" change one item, "place" adds semantic IDs of many items, and
            "catalog" is another run.
        item_id: The item, or "" for many.
        payload: "put" and "patch": the new values, with ``"image": true`` in place of its bytes;
            "place": ``{"codes": {item_id: [code, …]}}``; "catalog": ``{"catalog": digest}``, with the
            ``model_version`` of the run that is served from then on.
        time: When, in seconds since 1970.
    """

    version: int
    kind: Kind
    item_id: str
    payload: Mapping[str, Any]
    time: float


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A run that a service was told to serve.

    Attributes:
        run: Its folder, an absolute path.
        version: The model version that it had.
        events: Number of the last stored event that its data have; 0 for none.
    """

    run: str
    version: str
    events: int = 0


@dataclass(frozen=True, slots=True)
class Models:
    """The run that is served, and the one that was served before it."""

    current: ServedModel
    previous: ServedModel | None = None


@dataclass(frozen=True, slots=True)
class ShadowModel:
    """A run that is compared with the one that answers.

    Attributes:
        model: The run.
        sample: Share of the requests that are compared, above 0 to 1.
    """

    model: ServedModel
    sample: float


def check_names(names: Sequence[str], kind: str, *, source: str, limit: int = MAX_ID) -> None:
    """Raise UserError for an id that is empty, too long or has control characters."""
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise UserError(f"{source}: {kind} id {wrong!r} is not text", fix="send ids as strings")
    check_ids(names, kind, source=source)
    long = next((name for name in names if len(name) > limit), None)
    if long is not None:
        raise UserError(
            f"{source}: {kind} id {long[:32]!r}… has {len(long)} characters", fix=f"use at most {limit}"
        )


def check_events(events: Sequence[Event]) -> None:
    """Raise UserError for the first event that cannot be stored."""
    check_names([event.event_id for event in events], "event", source="events")
    check_names([event.user_id for event in events], "user", source="events")
    check_names([event.item_id for event in events], "item", source="events")
    check_names([event.type for event in events], "type", source="events", limit=MAX_TYPE)
    for event in events:
        if event.timestamp is not None and not _is_finite_number(event.timestamp):
            raise UserError(
                f"event {event.event_id!r}: timestamp {event.timestamp!r} is not a finite number",
                fix="send seconds since 1970, or leave it out",
            )


def check_item(item: Item) -> Item:
    """Return the item with its attributes as plain values. Raises UserError if it cannot be stored."""
    check_names([item.item_id], "item", source="items")
    where = f"item {item.item_id!r}"
    _check_text(item.title, f"{where}: title", MAX_TITLE)
    _check_text(item.text, f"{where}: text", MAX_TEXT)
    if item.image is not None and not isinstance(item.image, bytes):
        raise UserError(f"{where}: image is {type(item.image).__name__}, not bytes")
    if item.image is not None and len(item.image) > MAX_IMAGE:
        raise UserError(f"{where}: image has {len(item.image)} bytes", fix=f"use at most {MAX_IMAGE}")
    attributes = {name: _attribute(name, value, where) for name, value in item.attributes.items()}
    size = len(to_json(attributes))
    if size > MAX_ATTRIBUTES:
        raise UserError(f"{where}: attributes have {size} bytes as JSON", fix=f"use at most {MAX_ATTRIBUTES}")
    return Item(item.item_id, item.title, item.text, item.image, attributes)


def patched(item: Item, changes: Mapping[str, object]) -> Item:
    """Return the item with new values. An attribute that is None is removed; others are kept.

    Raises:
        UserError: A field is unknown, or its value cannot be stored.
    """
    unknown = sorted(set(changes) - set(PATCHABLE))
    if unknown:
        raise UserError(
            f"item {item.item_id!r}: {unknown[0]!r} cannot be changed",
            fix=f"choose from {', '.join(PATCHABLE)}",
        )
    values: dict[str, Any] = {each.name: getattr(item, each.name) for each in fields(item)} | dict(changes)
    if "attributes" in changes:
        if not isinstance(changes["attributes"], Mapping):
            raise UserError(f"item {item.item_id!r}: attributes are not an object of names and values")
        merged = dict(item.attributes) | dict(changes["attributes"])
        values["attributes"] = {name: value for name, value in merged.items() if value is not None}
    return check_item(Item(**values))


def check_codes(codes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return semantic IDs as lists. Raises UserError for one that is empty, too long or negative."""
    check_names(list(codes), "item", source="semantic IDs")
    result = {}
    for item_id, levels in codes.items():
        values = [int(code) for code in levels]
        if not 0 < len(values) <= MAX_LEVELS or min(values) < 0:
            raise UserError(
                f"item {item_id!r}: {values} is not a semantic ID",
                fix=f"use 1 to {MAX_LEVELS} codes that are not negative",
            )
        result[item_id] = values
    return result


def describe(item: Item, names: Sequence[str] = PATCHABLE) -> dict[str, Any]:
    """The values of an item for the log of changes, without the bytes of the image."""
    values = {name: getattr(item, name) for name in names}
    if "image" in values:
        values["image"] = item.image is not None
    return values


def to_json(value: object) -> str:
    """Compact JSON in ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _check_text(value: object, where: str, limit: int) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where} is {type(value).__name__}, not text")
    if len(value) > limit:
        raise UserError(f"{where} has {len(value)} characters", fix=f"use at most {limit}")
    if NOT_STORABLE.search(value):
        raise UserError(f"{where} has a NUL character or half of a surrogate pair", fix="remove it")


def _attribute(name: object, value: object, where: str) -> Attribute:
    if not isinstance(name, str):
        raise UserError(f"{where}: the name of attribute {name!r} is not text")
    check_names([name], "attribute", source=where)
    problem = f"{where}: attribute {name!r}"
    if isinstance(value, str):
        _check_text(value, problem, MAX_TEXT)
        return value
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= MAX_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        for entry in value:
            _check_text(entry, problem, MAX_TEXT)
        return list(value)
    raise UserError(
        f"{problem} is {value!r:.80}",
        fix="use text, a finite number of 64 bits, true, false or a list of texts",
    )


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e308
