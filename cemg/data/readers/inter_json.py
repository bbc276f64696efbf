"""The files of LETTER, LC-Rec and MiniOneRec: ``X.inter.json`` and, where there is one, ``X.item.json``.

``X.inter.json`` maps each user to a list of items, oldest first; ``X.item.json`` maps each item to its title,
description, brand and categories. ``X.index.json``, the semantic IDs, is read by ``Catalog.read``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from cemg.data.keyed_json import read_keyed, short
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.text import clean, phrases, sentences
from cemg.errors import UserError

INTER, ITEM = ".inter.json", ".item.json"
ORDER = "order of the source file, which has no timestamps"


def read_inter_json(path: Path, *, items: Path | None = None, encoding: str = "") -> Raw:
    """Read a folder with one ``X.inter.json``, or that file. Ids stay as they are; items are in id order.

    ``items`` None is the ``X.item.json`` beside it. Users without items are counted and left out.
    """
    file = _file(path)
    interactions, notes = _interactions(file, encoding)
    about = items or file.with_name(file.name.removesuffix(INTER) + ITEM)
    described = read_keyed(about, "item ids", encoding=encoding) if about.is_file() else {}
    described = {item.strip(): fields for item, fields in described.items()}
    for item, fields in described.items():
        if not isinstance(fields, dict):
            raise UserError(f"{about}, item {item!r}: an object is needed, got {short(fields)}")
    bought = interactions["item"].unique()
    if described:
        _check_known(file, about, interactions, described)
    catalog = sorted({*described, *bought}, key=lambda item: (len(item), item))
    return Raw(
        name=file.name.removesuffix(INTER),
        interactions=interactions,
        describe=(lambda wanted: _describe(described)) if described else no_items,
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
    found = sorted(path.glob(f"*{INTER}"))
    if len(found) != 1:
        raise UserError(f"{path} has {len(found)} files *{INTER}", fix="name one of them")
    return found[0]


def _interactions(file: Path, encoding: str) -> tuple[pl.DataFrame, list[str]]:
    """``user``, ``item``, ``timestamp`` = place in the list; and a note on users without items."""
    users: list[str] = []
    items: list[str] = []
    places: list[int] = []
    histories = read_keyed(file, "users", encoding=encoding)
    bare = [user for user, history in histories.items() if history == []]
    if len(bare) == len(histories):
        raise UserError(f"{file}: no user has an item")
    for user, history in histories.items():
        if not isinstance(history, list):
            raise UserError(f"{file}, user {user!r}: a list of item ids is needed, got {short(history)}")
        for item in history:
            if isinstance(item, bool) or not isinstance(item, int | str):
                raise UserError(f"{file}, user {user!r}: {short(item)} is not an item id")
        users += [user.strip()] * len(history)
        items += [str(item).strip() for item in history]
        places += range(len(history))
    schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    said = f"{len(bare):,} of {len(histories):,} users have no items and are left out, such as {bare[:1]}"
    frame = pl.DataFrame({"user": users, "item": items, "timestamp": places}, schema=schema)
    return frame, [said] if bare else []


def _check_known(file: Path, about: Path, interactions: pl.DataFrame, items: dict[str, Any]) -> None:
    unknown = interactions.filter(~pl.col("item").is_in(list(items))).head(1)
    for user, item, _ in unknown.iter_rows():
        cause = f"{about.name} describes {len(items):,} items"
        raise UserError(f"{file}, user {user!r}: item {item!r} is not in {about.name}", cause=cause)


def _describe(items: dict[str, Any]) -> pl.DataFrame:
    rows = [(item, clean(fields.get("title")), _text(fields), None) for item, fields in items.items()]
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _text(fields: dict[str, Any]) -> str | None:
    """Title. Brand. Categories, separated by commas. Description."""
    categories = phrases(fields.get("categories"))
    description = " ".join(phrases(fields.get("description")))
    return sentences(
        [clean(fields.get("title")), clean(fields.get("brand")), ", ".join(categories), description]
    )
