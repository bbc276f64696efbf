"""``cemg-recommend --histories``: one output line per input line, in the same order.

An input line is a JSON list of item ids, oldest first, or an object: ``{"history": [...]}``, ``{"user": ID}``
for the history of that user in the run's data, or both, in which case ``history`` is used. The output line
has the keys ``history``, ``ranked_by`` (generator, mixture or popularity), ``certified`` and ``items``,
``user`` if the input has one, and ``unknown`` if the history has items that are not in the catalog (these are
left out). A line that cannot be served (blank, empty, not valid JSON, an unknown
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
from typing import TYPE_CHECKING, Any

from cemg.errors import UserError

if TYPE_CHECKING:
    from cemg.artifacts import RunArtifacts

SOME_FAILED = 3  # exit code if a line got an error
STDIN = Path("-")
HISTORY_FIX = """write it as --history "12 7 105", or --history '["12", "a, b"]'"""


@dataclass(frozen=True, slots=True)
class Request:
    """One input line: the history to recommend for, or the error to print.

    Attributes:
        line: Line number, from 1.
        history: Item ids in the catalog, oldest first.
        user: User id, if the line has one.
        unknown: Item ids of the line that are not in the catalog.
        error: Why the line cannot be served; None if it can.
    """

    line: int
    history: list[str] = field(default_factory=list)
    user: str | None = None
    unknown: list[str] = field(default_factory=list)
    error: str | None = None


def parse_history(text: str) -> list[str]:
    """Parse the value of ``--history``: a JSON list, or item ids separated by spaces or commas.

    An empty text or list is the empty history.

    Raises:
        UserError: The text is not valid JSON, or is not empty but contains no item.
    """
    if not text.lstrip().startswith("["):
        items = text.replace(",", " ").split()
        if text.strip() and not items:
            raise UserError("--history names no item", fix=HISTORY_FIX)
        return items
    try:
        return _ids(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--history is not a valid JSON list of item ids: {error}") from None


def no_history(artifacts: RunArtifacts) -> UserError:
    """The error for an empty ``--history`` of a search without the memory, which ranks by popularity."""
    popular = "--memory gate ranks by popularity"
    return UserError(
        "the history is empty",
        cause="the generator alone has no list for an empty history",
        fix=f"{HISTORY_FIX}; {popular}" if artifacts.has_gate() else HISTORY_FIX,
    )


def read_requests(
    path: Path,
    known: Set[str],
    history_of: Callable[[str], list[str] | None],
    *,
    popularity: bool = False,
) -> Iterator[Request | None]:
    """Yield one request per line.

    Args:
        path: File, plain or gzip; "-" is stdin.
        known: Item ids of the catalog.
        history_of: Returns the history of a user; None for an unknown user.
        popularity: Whether an empty history is a request, which popularity ranks, instead of an error.

    Returns:
        The requests. None is yielded when the next line of stdin is not written yet, because the caller may
        wait for an answer before it writes more.

    Raises:
        UserError: The file cannot be read.
    """
    number = 0
    try:
        for raw in _lines(path):
            number += raw is not None
            yield None if raw is None else _request(number, raw, known, history_of, popularity)
    except (OSError, EOFError, zlib.error) as error:
        location = f"{path}, line {number + 1}" if number else f"{path}"
        raise UserError(f"{location}: the file cannot be read", cause=str(error)) from error


def in_batches(requests: Iterable[Request | None], size: int) -> Iterator[list[Request]]:
    """Group requests into batches, in order.

    A batch has at most ``size`` requests with a history, and as many without one. It ends early at a None.
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


def output_line(request: Request, recommendations: dict[str, Any] | None) -> dict[str, Any]:
    """Return the JSON object to print for a request; ``recommendations`` is None if it has an error."""
    user: dict[str, Any] = {} if request.user is None else {"user": request.user}
    unknown = {"unknown": request.unknown} if request.unknown else {}
    if recommendations is None:
        return {"line": request.line, **user, "error": request.error, **unknown, "items": []}
    return {**user, **recommendations, **unknown}


def _lines(path: Path) -> Iterator[bytes | None]:
    if path == STDIN:
        if sys.stdin is None:
            raise UserError("--histories - reads stdin, which is closed", fix="pipe lines in, or name a file")
        yield from _lines_as_written(sys.stdin.fileno())
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _lines_as_written(stream: int) -> Iterator[bytes | None]:
    """Yield the lines of a file descriptor, and None when the next one is not there yet."""
    parts: list[bytes] = []  # of an incomplete line
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
    number: int,
    raw: bytes,
    known: Set[str],
    history_of: Callable[[str], list[str] | None],
    popularity: bool,
) -> Request:
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        value = json.loads(line) if line else None
        user, history = _user_and_history(value)
    except (ValueError, RecursionError) as error:
        return Request(number, error=f"not a valid line of UTF-8 JSON: {error}")
    if history is None and user is not None:
        history = history_of(user)
        if history is None:
            return Request(number, user=user, error=f"user {user!r} is not in the data of this run")
    if not history and (not popularity or value is None):
        return Request(number, user=user, error="the history is empty")
    history = history or []
    unknown = [item for item in history if item not in known]
    items = [item for item in history if item in known]
    if unknown and not items:
        return Request(number, user=user, unknown=unknown, error="no item of the history is in the catalog")
    return Request(number, items, user, unknown)


def _user_and_history(value: Any) -> tuple[str | None, list[str] | None]:
    """Return user and history of a parsed line. Raises ValueError for any other JSON value."""
    if value is None:
        return None, []
    if isinstance(value, list):
        return None, _ids(value)
    if not isinstance(value, dict) or not {"user", "history"} & value.keys():
        raise ValueError('expected a list of item ids, or an object with "history" or "user"')
    user, history = value.get("user"), value.get("history")
    return None if user is None else _id(user), None if history is None else _ids(history)


def _ids(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of item ids, got {type(value).__name__}")
    return [_id(item) for item in value]


def _id(value: Any) -> str:
    """Return an id as text: numbers as they are written, but whole floats as integers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:40]!r} is not a valid id")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
