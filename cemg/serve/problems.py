"""Errors as documents of the type application/problem+json.

Source: RFC 9457, https://www.rfc-editor.org/rfc/rfc9457.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cemg.errors import DamagedError, UserError
from cemg.serve.batching import FullError, LateError, StoppedError
from cemg.serve.database import BusyError
from cemg.serve.models import LoadingError
from cemg.serve.rows import DroppedError, UnknownItemError
from cemg.storage.files import StorageError

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS, MAX_FIELD = 20, 300  # errors of an answer, and characters of the name of a field
RETRY_AFTER = {"Retry-After": "1"}  # seconds
STATUS: Sequence[tuple[type[Exception], int]] = (
    (UnknownItemError, 404),
    (DroppedError, 410),
    (FullError, 503),
    (LateError, 503),
    (StoppedError, 503),
    (BusyError, 503),
    (LoadingError, 409),
    (StorageError, 507),
    (DamagedError, 500),
    (UserError, 422),
)

_TEXT = {"type": "string"}
_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": _TEXT, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT, "fix": _TEXT,
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": _TEXT, "message": _TEXT},
            },
        },
    },
}  # fmt: skip
_REASONS = {
    400: "The body cannot be read",
    401: "An API key is missing or unknown",
    403: "The API key has not the role, or the request is from a page of another origin",
    404: "There is no such item, user or path",
    405: "The path has other methods",
    409: "Another model is being loaded, or there is none to go back to",
    410: "The changes are too old to be kept, or newer than the store",
    413: "The body is too large",
    421: "The Host header is not a name of this service",
    422: "A field is not valid; errors name it",
    429: "The client sends too many requests, see Retry-After",
    503: "Too many requests wait, or the service starts or shuts down",
    507: "The disk is full or fails",
}
RESPONSES: dict[int | str, dict[str, Any]] = {  # of every endpoint, for its documentation
    status: {"description": reason, "content": {MEDIA_TYPE: {"schema": _SCHEMA}}}
    for status, reason in _REASONS.items()
}


def problem(
    status: int, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """A problem document."""
    title = HTTPStatus(status).phrase if status in {*HTTPStatus} else "Client Closed Request"
    about = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(about | more, status, dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of an application with a problem document."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found: dict[str, list[str]] = {}
        for one in error.errors()[:MAX_ERRORS]:
            message = str(one["msg"]).removeprefix("Value error, ")
            if one.get("type") == "json_invalid":
                message = f"it is not JSON: {one['ctx']['error']}, at character {one['loc'][-1]}"
            if one.get("type") == "too_long" and isinstance(one.get("input"), str):
                message = f"must have at most {one['ctx']['max_length']} characters"
            if isinstance(error.body, bytes):
                message = "send JSON, with the header content-type: application/json"
            found.setdefault(_field(one, error.body), []).append(message)
        errors = [
            {"field": field[:MAX_FIELD], "message": "; or ".join(dict.fromkeys(messages))}
            for field, messages in found.items()
        ]
        first = errors[0] if errors else {"field": "body", "message": "invalid"}
        return problem(422, f"{first['field']}: {first['message']}", errors=errors)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, UserError)
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        fix = {"fix": error.fix} if error.fix else {}
        return problem(status, error.message, headers=RETRY_AFTER if status == 503 else None, **fix)

    for kind, _ in STATUS:
        app.exception_handler(kind)(failed)


def _field(error: Mapping[str, Any], body: object) -> str:
    """The place of an error in the body, without the names of the types that were tried there."""
    source, *parts = error["loc"]
    if source != "body" or "type" not in error:  # the latter is raised by the service itself
        return ".".join(str(part) for part in parts) or str(source)
    named: list[str] = []
    for number, part in enumerate(parts, start=1):
        is_key = isinstance(body, dict) and part in body
        is_place = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_key or is_place:
            body = body[part]  # type: ignore[index]
        if is_key or is_place or (number == len(parts) and error["type"] == "missing"):
            named.append(str(part))
    return ".".join(named) or "body"


def draining() -> JSONResponse:
    """The answer to a request that arrives after SIGTERM. The client connects again, to another process."""
    return problem(503, "the service shuts down", headers=RETRY_AFTER | {"Connection": "close"})
