"""What the columns of a table are called, and the ``--columns`` option that says it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cemg.errors import UserError

POSITION = re.compile(r"^#[1-9]\d*$")  # "#3": the third column of a file without a header
COLUMNS_FIX = (
    "--columns user=uid,item=sku,timestamp=ts,text=title+description; or, in a file without a header, "
    "--columns user=#1,item=#2,timestamp=#3"
)
ITEM_IDS = ("item", "item_id", "parent_asin", "movieId", "asin")


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """What the columns are called.

    ``user``, ``item``, ``timestamp`` and ``rating`` are columns of the interactions; ``id`` (the item's id,
    None where it is called as in the interactions), ``title``, ``text`` (one column or several, which are
    joined) and ``image`` of the items file. None takes the column of the role's own name where there is one.
    "#3" is the third column of a file without a header; all names of one file are positions, or none is.
    """

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    rating: str | None = None
    id: str | None = None
    title: str | None = None
    text: str | tuple[str, ...] | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        required = (self.user, self.item, self.timestamp)
        if len(set(required)) < len(required) or not all(required):
            raise UserError(f"user, item and timestamp must be three columns, got {', '.join(required)}")
        _check_alike("the interactions", (*required, *_given(self.rating)))
        _check_alike("the items", self._of_items())

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text, () where none was named."""
        return (self.text,) if isinstance(self.text, str) else self.text or ()

    @property
    def headerless(self) -> bool:
        """Whether the interactions have no header."""
        return bool(POSITION.match(self.user))

    @property
    def items_headerless(self) -> bool:
        """Whether the items file has no header."""
        return any(POSITION.match(name) for name in self._of_items())

    def _of_items(self) -> tuple[str, ...]:
        return (*_given(self.id), *_given(self.title), *self.texts, *_given(self.image))

    @classmethod
    def parse(cls, roles: str) -> ColumnNames:
        """Of ``user=uid,item=sku,text=title+description``, or of a JSON object with the same keys.

        The JSON object is for names that hold a comma, an equals sign or a plus. Raises UserError.
        """
        pairs = _json_roles(roles) if roles.lstrip().startswith("{") else _plain_roles(roles)
        known = {field.name for field in dataclasses.fields(cls)}
        if not pairs or not pairs.keys() <= known:
            raise _not_understood(roles)
        return cls(**pairs)


def _given(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _check_alike(what: str, names: tuple[str, ...]) -> None:
    positions = [name for name in names if POSITION.match(name)]
    if positions and len(positions) < len(names):
        raise UserError(
            f"columns of {what} are given by name and by position: {', '.join(names)}",
            fix="a file with a header takes names, one without takes positions such as #1",
        )


def _plain_roles(roles: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for part in roles.split(","):
        role, sign, name = (word.strip() for word in part.partition("="))
        if not sign or not name or role in pairs:
            raise _not_understood(roles)
        pairs[role] = tuple(word.strip() for word in name.split("+")) if role == "text" else name
    return pairs


def _json_roles(roles: str) -> dict[str, Any]:
    try:
        pairs = json.loads(roles)
    except (ValueError, RecursionError):
        raise _not_understood(roles) from None
    texts = pairs.get("text")
    named = [name for role, name in pairs.items() if role != "text" or not isinstance(texts, list)]
    if not all(isinstance(name, str) for name in (*named, *(texts if isinstance(texts, list) else ()))):
        raise _not_understood(roles)
    return pairs | ({"text": tuple(texts)} if isinstance(texts, list) else {})


def _not_understood(roles: str) -> UserError:
    known = ", ".join(field.name for field in dataclasses.fields(ColumnNames))
    return UserError(
        f"--columns {roles} is not understood",
        cause=f"wanted role=name, separated by commas, each role once; roles: {known}",
        fix=COLUMNS_FIX,
    )


COMMON_NAMES = (
    ColumnNames(),
    ColumnNames(user="user_id", item="item_id"),
    ColumnNames(user="user_id", item="parent_asin"),
    ColumnNames(user="userId", item="movieId"),
)


def guess_names(columns: Iterable[str]) -> ColumnNames:
    """The first of the usual names that are all there."""
    there = set(columns)
    fitting = (names for names in COMMON_NAMES if {names.user, names.item, names.timestamp} <= there)
    return next(fitting, ColumnNames())
