"""Errors as documents of the type application/problem+json.

Source: RFC 9457, https://www.rfc-editor.org/rfc/rfc9457.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cemg.errors import UserError
from cemg.serve.batching import FullError, LateError, StoppedError
from cemg.serve.rows import UnknownItemError
from cemg.storage.files import StorageError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = {"Retry-After": "1"}  # seconds
TAGS = ("body", "request", "batch")  # parts of a place that name no field
STATUS: Sequence[tuple[type[Exception], int]] = (
    (UnknownItemError, 404),
    (FullError, 503),
    (LateError, 503),
    (StoppedError, 503),
    (StorageError, 507),
    (UserError, 422),
)

log = logging.getLogger("cemg.serve")


def problem(
    status: int, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """A problem document."""
    about = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(about | more, status, dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of an application with a problem document."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            {
                "field": ".".join(str(part) for part in one["loc"] if part not in TAGS) or "body",
                "message": str(one["msg"]).removeprefix("Value error, "),
            }
            for one in error.errors()
        ]
        first = errors[0] if errors else {"field": "body", "message": "invalid"}
        return problem(422, f"{first['field']}: {first['message']}", errors=errors)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
        if status == 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
            return problem(500, "the server failed; its log says why")
        fix = {"fix": error.fix} if isinstance(error, UserError) and error.fix else {}
        text = error.message if isinstance(error, UserError) else str(error)
        return problem(status, text, headers=RETRY_AFTER if status == 503 else None, **fix)

    for kind, _ in STATUS:
        app.exception_handler(kind)(failed)
