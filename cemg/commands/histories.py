"""``cemg-recommend --histories``: one line in, one line out, in the same order.

A line is a JSON list of item ids, oldest first, or an object: ``{"history": [...]}``, ``{"user": ID}`` for
all that the run's data has of that user, or both, where the history counts. Its answer has ``history``,
``certified`` and ``items``, ``user`` where one was named, and ``unknown``: the items of the history that the
catalog lacks and that were left out. A line that cannot be served (blank, empty, not valid JSON, an unknown
user, only unknown items) gets ``{"line": N, "error": REASON, "items": []}``.
"""

from __future__ import annotations

import gzip
import json
import os
import select
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cemg.errors import UserError

SOME_FAILED = 3  # exit code where a line got an error
STDIN = Path("-")
HISTORY_FIX = """write it as --history "12 7 105", or --history '["12", "a, b"]'"""


@dataclass(frozen=True, slots=True)
class Request:
    """A line: the ``history`` to serve, or the ``error`` that it gets."""

    line: int
    history: list[str] = field(default_factory=list)
    user: str | None = None
    unknown: list[str] = field(default_factory=list)
    error: str | None = None


def parse_history(text: str) -> list[str]:
    """Item ids of ``--history``: a JSON list, or ids between blanks and commas. Raises UserError."""
    if not text.lstrip().startswith("["):
        items = text.replace(",", " ").split()
    else:
        try:
            items = _ids(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--history is not a valid JSON list of item ids: {error}") from None
    if not items:
        raise UserError("--history names no item", fix=HISTORY_FIX)
    return items


def read_requests(
    path: Path, known: Set[str], history_of: Callable[[str], list[str] | None]
) -> Iterator[Request | None]:
    """A request for each line of a file, plain or gzip, or of stdin where ``path`` is "-".

    None is yielded where the next line of stdin is not written yet: who writes it may wait for an answer.
    ``known`` are the items of the catalog; ``history_of`` returns a user's history, None for an unknown user.
    Raises UserError where the file cannot be read.
    """
    number = 0
    try:
        for raw in _lines(path):
            number += raw is not None
            yield None if raw is None else _request(number, raw, known, history_of)
    except (OSError, EOFError, zlib.error) as error:
        where = f"{path}, line {number + 1}" if number else f"{path}"
        raise UserError(f"{where}: the file cannot be read", cause=str(error)) from error


def in_batches(requests: Iterable[Request | None], size: int) -> Iterator[list[Request]]:
    """Requests in order: ``size`` that have a history per list, and at most as many that have none.

    A list ends early where ``requests`` has None.
    """
    batch: list[Request] = []
    for request in requests:
        batch += [] if request is None else [request]
        served = sum(one.error is None for one in batch)
        if served == size or len(batch) == 2 * size or (batch and request is None):
            yield batch
            batch = []
    if batch:
        yield batch


def answer_of(request: Request, found: dict[str, Any] | None) -> dict[str, Any]:
    """The line printed for a request; ``found`` is what was recommended, None where it has an error."""
    said: dict[str, Any] = {} if request.user is None else {"user": request.user}
    unknown = {"unknown": request.unknown} if request.unknown else {}
    if found is None:
        return {"line": request.line, **said, "error": request.error, **unknown, "items": []}
    return {**said, **found, **unknown}


def _lines(path: Path) -> Iterator[bytes | None]:
    if path == STDIN:
        if sys.stdin is None:
            raise UserError("--histories - reads stdin, which is closed", fix="pipe lines in, or name a file")
        yield from _written(sys.stdin.fileno())
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _written(stream: int) -> Iterator[bytes | None]:
    """The lines of a file descriptor, and None where the next one is not there yet."""
    parts: list[bytes] = []  # of a line that has not ended
    while chunk := os.read(stream, 1 << 16):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = others[-1:]
            if not select.select([stream], [], [], 0)[0]:
                yield None
    if any(parts):
        yield b"".join(parts)


def _request(
    number: int, raw: bytes, known: Set[str], history_of: Callable[[str], list[str] | None]
) -> Request:
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        value = json.loads(line) if line else None
        user, history = _parts(value)
    except (ValueError, RecursionError) as error:
        return Request(number, error=f"not a valid line of UTF-8 JSON: {error}")
    if history is None and user is not None:
        history = history_of(user)
        if history is None:
            return Request(number, user=user, error=f"user {user!r} is not in the data of this run")
    if not history:
        return Request(number, user=user, error="the history is empty")
    unknown = [item for item in history if item not in known]
    served = [item for item in history if item in known]
    if not served:
        return Request(number, user=user, unknown=unknown, error="no item of the history is in the catalog")
    return Request(number, served, user, unknown)


def _parts(value: Any) -> tuple[str | None, list[str] | None]:
    """User and history of a parsed line; ValueError for another shape."""
    if value is None:
        return None, []
    if isinstance(value, list):
        return None, _ids(value)
    if not isinstance(value, dict) or not {"user", "history"} & value.keys():
        raise ValueError('wanted a list of item ids, or an object with "history" or "user"')
    user, history = value.get("user"), value.get("history")
    return None if user is None else _id(user), None if history is None else _ids(history)


def _ids(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"wanted a list of item ids, got {type(value).__name__}")
    return [_id(item) for item in value]


def _id(value: Any) -> str:
    """An id as text: numbers as they are written, whole floats as integers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:40]!r} is not an id")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
