"""Names of the columns of a table, and the ``--columns`` option that sets them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cemg.errors import UserError

POSITION = re.compile(r"^#[1-9]\d*$")  # "#3" is the third column of a file without a header
COLUMNS_FIX = (
    "--columns user=uid,item=sku,timestamp=ts,text=title+description; or, in a file without a header, "
    "--columns user=#1,item=#2,timestamp=#3"
)
ITEM_IDS = ("item", "item_id", "parent_asin", "movieId", "asin")


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Names of the columns of the interactions and of the items file.

    "#3" is the third column of a file without a header. The names of one file are either all positions or
    all names. None takes the column named like the attribute, if there is one.

    Attributes:
        user: User ids, in the interactions.
        item: Item ids, in the interactions.
        timestamp: Times, in the interactions.
        rating: Ratings, in the interactions.
        id: Item ids in the items file; None if the name is the one in the interactions.
        title: Titles, in the items file.
        text: One or several columns of texts, in the items file.
        image: Paths of images, in the items file.
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
            raise UserError(
                f"user, item and timestamp must be three different columns, got {', '.join(required)}"
            )
        _check_positions("the interactions", (*required, *_given(self.rating)))
        _check_positions("the items", self._of_items())

    @property
    def texts(self) -> tuple[str, ...]:
        """The text columns, () if none is named."""
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
        """Parse the value of ``--columns``.

        Args:
            roles: ``user=uid,item=sku,text=title+description``, or a JSON object with the same keys, for
                names that contain a comma, an equals sign or a plus.

        Raises:
            UserError: The value is invalid.
        """
        pairs = _json_roles(roles) if roles.lstrip().startswith("{") else _plain_roles(roles)
        known = {field.name for field in dataclasses.fields(cls)}
        if not pairs or not pairs.keys() <= known:
            raise _invalid(roles)
        return cls(**pairs)


def _given(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _check_positions(table: str, names: tuple[str, ...]) -> None:
    """Raise UserError if some of the names are positions and some are not."""
    positions = [name for name in names if POSITION.match(name)]
    if positions and len(positions) < len(names):
        raise UserError(
            f"the columns of {table} mix names and positions: {', '.join(names)}",
            fix="use names for a file with a header, and positions such as #1 for a file without one",
        )


def _plain_roles(roles: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for part in roles.split(","):
        role, sign, name = (word.strip() for word in part.partition("="))
        if not sign or not name or role in pairs:
            raise _invalid(roles)
        pairs[role] = tuple(word.strip() for word in name.split("+")) if role == "text" else name
    return pairs


def _json_roles(roles: str) -> dict[str, Any]:
    try:
        pairs: dict[str, Any] = json.loads(roles)
    except (ValueError, RecursionError):
        raise _invalid(roles) from None
    texts = pairs.get("text")
    names = [name for role, name in pairs.items() if role != "text" or not isinstance(texts, list)]
    if not all(isinstance(name, str) for name in (*names, *(texts if isinstance(texts, list) else ()))):
        raise _invalid(roles)
    return pairs | ({"text": tuple(texts)} if isinstance(texts, list) else {})


def _invalid(roles: str) -> UserError:
    known = ", ".join(field.name for field in dataclasses.fields(ColumnNames))
    return UserError(
        f"--columns {roles} is not valid",
        cause=f"expected role=name pairs separated by commas, each role once; the roles are {known}",
        fix=COLUMNS_FIX,
    )


COMMON_NAMES = (
    ColumnNames(),
    ColumnNames(user="user_id", item="item_id"),
    ColumnNames(user="user_id", item="parent_asin"),
    ColumnNames(user="userId", item="movieId"),
)


def guess_names(columns: Iterable[str]) -> ColumnNames:
    """Return the first of the usual sets of names that the table has."""
    existing = set(columns)
    fitting = (names for names in COMMON_NAMES if {names.user, names.item, names.timestamp} <= existing)
    return next(fitting, ColumnNames())
