"""The files of LETTER, LC-Rec and MiniOneRec: ``X.inter.json`` and, optionally, ``X.item.json``.

``X.inter.json`` maps each user to a list of items, oldest first; ``X.item.json`` maps each item to its title,
description, brand and categories. ``Catalog.read`` reads the semantic IDs, ``X.index.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from cemg.data.readers.keyed_json import read_keyed, short
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.text import clean, phrases, sentences
from cemg.errors import UserError

INTER, ITEM = ".inter.json", ".item.json"
ORDER = "order of the source file, which has no timestamps"


def read_inter_json(path: Path, *, items: Path | None = None, encoding: str = "") -> Raw:
    """Read histories and items. Items are sorted by id. Users without items are left out, with a note.

    Args:
        path: ``X.inter.json``, or a folder with one.
        items: ``X.item.json``; None takes the one next to the histories.
        encoding: Encoding of the files; "" detects it.
    """
    file = _file(path)
    interactions, notes = _interactions(file, encoding)
    about = items or file.with_name(file.name.removesuffix(INTER) + ITEM)
    described = read_keyed(about, "item ids", encoding=encoding) if about.is_file() else {}
    described = {item.strip(): fields for item, fields in described.items()}
    for item, fields in described.items():
        if not isinstance(fields, dict):
            raise UserError(f"{about}, item {item!r}: expected an object, got {short(fields)}")
    used = interactions["item"].unique()
    if described:
        _check_known(file, about, interactions, described)
    catalog = sorted({*described, *used}, key=lambda item: (len(item), item))
    return Raw(
        name=file.name.removesuffix(INTER),
        interactions=interactions,
        describe=(lambda item_ids: _describe(described)) if described else no_items,
        order=ORDER,
        catalog=catalog,
        image_folder=file.parent / "images",
        notes=notes,
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.name.endswith(INTER):
            raise UserError(f"{path} is not named X{INTER}")
        return path
    candidates = sorted(path.glob(f"*{INTER}"))
    if len(candidates) != 1:
        raise UserError(f"{path} has {len(candidates)} files *{INTER}", fix="name one of them")
    return candidates[0]


def _interactions(file: Path, encoding: str) -> tuple[pl.DataFrame, list[str]]:
    """Return ``user``, ``item`` and ``timestamp`` (the position in the list), and notes."""
    users: list[str] = []
    items: list[str] = []
    positions: list[int] = []
    histories = read_keyed(file, "users", encoding=encoding)
    without_items = [user for user, history in histories.items() if history == []]
    if len(without_items) == len(histories):
        raise UserError(f"{file}: no user has an item")
    for user, history in histories.items():
        if not isinstance(history, list):
            raise UserError(f"{file}, user {user!r}: expected a list of item ids, got {short(history)}")
        for item in history:
            if isinstance(item, bool) or not isinstance(item, int | str):
                raise UserError(f"{file}, user {user!r}: {short(item)} is not a valid item id")
        users += [user.strip()] * len(history)
        items += [str(item).strip() for item in history]
        positions += range(len(history))
    schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    frame = pl.DataFrame({"user": users, "item": items, "timestamp": positions}, schema=schema)
    if not without_items:
        return frame, []
    counts = f"{len(without_items):,} of {len(histories):,} users have no items"
    return frame, [f"{counts} and are left out, such as user {without_items[0]!r}"]


def _check_known(file: Path, about: Path, interactions: pl.DataFrame, items: dict[str, Any]) -> None:
    unknown = interactions.filter(~pl.col("item").is_in(list(items))).head(1)
    for user, item, _ in unknown.iter_rows():
        cause = f"{about.name} describes {len(items):,} items"
        raise UserError(f"{file}, user {user!r}: item {item!r} is not in {about.name}", cause=cause)


def _describe(items: dict[str, Any]) -> pl.DataFrame:
    rows = [(item, clean(fields.get("title")), _text(fields), None) for item, fields in items.items()]
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _text(fields: dict[str, Any]) -> str | None:
    """Compose the text: title. Brand. Categories, separated by commas. Description."""
    categories = phrases(fields.get("categories"))
    description = " ".join(phrases(fields.get("description")))
    return sentences(
        [clean(fields.get("title")), clean(fields.get("brand")), ", ".join(categories), description]
    )
