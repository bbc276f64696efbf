"""The page at ``/`` and the endpoints that it reads beside those of the service."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException

from cemg.serve import images, schemas
from cemg.serve.metrics import SLOT, Recent, Slot
from cemg.serve.paths import Cursor, PathId
from cemg.serve.security import requires
from cemg.serve.service import Service
from cemg.version import __version__

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob:",  # pictures are read with the API key, which an <img> cannot send
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # assigning to innerHTML is an error
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CHECK = "no-cache"  # the browser asks whether its copy is still the same
KEEP = "public, max-age=31536000, immutable"  # of folders with a version in their name
Limit = Annotated[int, Query(ge=1, le=100)]


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str
    cache: str


def page_files() -> dict[str, PageFile]:
    """The files of the page by their paths, as the package has them."""
    found: dict[str, PageFile] = {}

    def read(folder: Traversable, path: PurePosixPath) -> None:
        for entry in folder.iterdir():
            here = path / entry.name
            if entry.is_dir():
                read(entry, here)
            elif here.suffix in MEDIA_TYPES:
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                cache = KEEP if here.parts[0] == "vendor" and len(here.parts) > 2 else CHECK
                found[str(here)] = PageFile(content, MEDIA_TYPES[here.suffix], etag, cache)

    read(resources.files("cemg.serve").joinpath("page"), PurePosixPath())
    return found


def add(app: FastAPI, service: Service) -> None:
    """Add the page and its endpoints to an application."""
    _add_page(app)
    _add_status(app, service)
    _add_endpoints(app, service)


def _add_page(app: FastAPI) -> None:
    files = page_files()

    def answer(request: Request, path: str) -> Response:
        file = files.get(path)
        if file is None:
            raise HTTPException(404, "there is no such page")
        headers = HEADERS | {"Cache-Control": file.cache, "ETag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(None, 304, headers)
        return Response(file.content, 200, headers, file.media_type)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> Response:
        return RedirectResponse("./#/api")  # relative: a proxy may serve below another path

    @app.api_route("/page/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def part(path: str, request: Request) -> Response:
        return answer(request, path)


def _add_status(app: FastAPI, service: Service) -> None:
    def point(slot: Slot, start: float) -> schemas.PointAnswer:
        return schemas.PointAnswer(time=start, requests=slot.requests, errors=slot.errors, **slot.quantiles())

    @app.get("/v1/status", tags=["health"], dependencies=[requires("read")])
    def status() -> schemas.StatusAnswer:
        """State, versions, sizes, and the requests of the last minutes."""
        figures, state = service.model.figures, service.status
        recent: Recent = app.state.metrics.recent
        slots = recent.series()
        return schemas.StatusAnswer(
            state="draining" if state.draining else "ready" if state.ready else "starting",
            version=__version__, uptime_seconds=time.time() - state.started,
            model_version=service.model_version, **service.sizes(), waiting=service.model.waiting,
            searches=figures.searches, searched_requests=figures.queries, late_requests=figures.late,
            cancelled_requests=figures.cancelled, interval_seconds=SLOT,
            recent=point(Recent.total(slots), slots[0].number * SLOT),
            points=[point(slot, slot.number * SLOT) for slot in slots],
        )  # fmt: skip


def _add_endpoints(app: FastAPI, service: Service) -> None:
    @app.get("/v1/items/{item_id:path}/similar", tags=["catalog"], dependencies=[requires("read")])
    def similar(item_id: PathId, limit: Limit = 10) -> schemas.SimilarAnswer:
        """The items that the memory connects most with an item, by transitions and by texts."""
        found = []
        for name, share in service.similar(item_id, limit):
            stored = service.get_item(name)
            title = "" if stored is None else stored.item.title
            found.append(schemas.SimilarItem(item_id=name, title=title, share=share))
        return schemas.SimilarAnswer(items=found)

    @app.get(
        "/v1/items/{item_id:path}/image", tags=["catalog"], dependencies=[requires("read")],
        response_class=Response,
        responses={200: {"content": {media_type: {} for media_type in images.PICTURES.values()}}},
    )  # fmt: skip
    def image(item_id: PathId) -> Response:
        """The picture of an item."""
        content = service.picture(item_id)
        kind = None if content is None else images.media_type(content)
        if content is None or kind is None:
            raise HTTPException(404, f"item {item_id} has no picture that can be shown")
        headers = {
            "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "private, max-age=60",
        }  # fmt: skip
        return Response(content, 200, headers, kind)

    @app.get("/v1/users", tags=["users"], dependencies=[requires("read")])
    def list_users(
        query: Annotated[str, Query(max_length=256, description="The beginning of an id.")] = "",
        cursor: Cursor = "",
        limit: Limit = 20,
    ) -> schemas.UserPage:
        """Ids of users with a history, in their order, a page at a time."""
        found = service.users(query, cursor, limit)
        return schemas.UserPage(users=found, next=found[-1] if len(found) == limit else None)
