"""Composition of the text of an item from its fields."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

TAG = re.compile(r"<[^<>]{1,200}>")
SPACE = re.compile(r"\s+")
WORD = re.compile(r"\w")


def clean(value: Any) -> str:
    """Return one line of plain text, without HTML entities and tags; "" if ``value`` is not a text."""
    if not isinstance(value, str):
        return ""
    return SPACE.sub(" ", TAG.sub(" ", html.unescape(value))).strip()


def phrases(value: Any) -> list[str]:
    """Collect the distinct texts of a text or nested list of texts, in order, without "Unknown"."""
    nested = value if isinstance(value, list) else [value]
    flat = [text for part in nested for text in (phrases(part) if isinstance(part, list) else [clean(part)])]
    return [text for text in dict.fromkeys(flat) if text and text != "Unknown"]


def sentences(parts: Iterable[str]) -> str | None:
    """Join the parts that are not empty as sentences, with full stops; None if all are empty."""
    closed = [part if part[-1] in ".!?" else f"{part}." for part in parts if part]
    return " ".join(closed) or None


def item_text(title: str, parts: Iterable[str]) -> str | None:
    """Compose the text of an item: the title, once, and then the distinct parts, as sentences.

    Args:
        title: Cleaned title, "" if there is none.
        parts: Cleaned texts, such as a brand and a description.

    Returns:
        The text; None if title and parts are empty.
    """
    rest = [part for part in dict.fromkeys(parts) if part and part != title]
    begins = bool(title and rest) and rest[0].startswith(title)
    has_title = begins and WORD.match(rest[0], len(title)) is None  # not a longer word
    return sentences(rest if has_title else [title, *rest])
