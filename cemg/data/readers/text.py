"""From the fields of an item to the one text that is encoded."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

TAG = re.compile(r"<[^<>]{1,200}>")
SPACE = re.compile(r"\s+")


def clean(value: Any) -> str:
    """One line of plain text: HTML entities and tags resolved; "" for what is no text."""
    if not isinstance(value, str):
        return ""
    return SPACE.sub(" ", TAG.sub(" ", html.unescape(value))).strip()


def phrases(value: Any) -> list[str]:
    """The distinct texts in a text or (nested) list of texts, in order; "Unknown" says nothing and goes."""
    nested = value if isinstance(value, list) else [value]
    flat = [text for part in nested for text in (phrases(part) if isinstance(part, list) else [clean(part)])]
    return [text for text in dict.fromkeys(flat) if text and text != "Unknown"]


def sentences(parts: Iterable[str]) -> str | None:
    """The parts that are not empty, each closed by a full stop; None where all are empty."""
    closed = [part if part[-1] in ".!?" else f"{part}." for part in parts if part]
    return " ".join(closed) or None


def item_text(title: str, parts: Iterable[str]) -> str | None:
    """The title and then the parts, all cleaned, as sentences; None where all are empty.

    The rule of every reader: a text begins with the title, once. A part that occurs twice counts once.
    """
    rest = [part for part in dict.fromkeys(parts) if part and part != title]
    opens = bool(title and rest) and re.match(rf"{re.escape(title)}(?!\w)", rest[0]) is not None
    return sentences(rest if opens else [title, *rest])
