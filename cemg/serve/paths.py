"""Ids in the paths of requests: a slash that is encoded as ``%2F`` belongs to the id and not to the path.

Servers decode a path before it is routed, and ``/v1/items/x%2Fsimilar`` would be the nearest items of ``x``.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

from fastapi import Path, Query
from pydantic import AfterValidator, BeforeValidator
from starlette.types import ASGIApp, Receive, Scope, Send

from cemg.serve.rows import MAX_ID
from cemg.serve.schemas import is_text


class EncodedSlashes:
    """Lets slashes that were encoded stay encoded in the path, and percent signs with them, see `PathId`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%" in raw:
            # what is not UTF-8 becomes surrogates, which no id has
            parts = (unquote(part, errors="surrogateescape") for part in raw.decode("latin-1").split("/"))
            scope["path"] = "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)
        await self.app(scope, receive, send)


def decoded(value: str) -> str:
    """A part of a path as `EncodedSlashes` leaves it, without its encoding."""
    return value.replace("%2F", "/").replace("%25", "%")


def is_cursor(value: str) -> str:
    """Return an id or nothing. Raises ValueError for control characters."""
    return is_text(value) if value else value


Cursor = Annotated[str, Query(max_length=MAX_ID), AfterValidator(is_cursor)]
PathId = Annotated[str, BeforeValidator(decoded), Path(max_length=MAX_ID), AfterValidator(is_text)]
