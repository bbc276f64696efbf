"""The endpoints of the service."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from cemg.errors import UserError
from cemg.serve import browse, images, problems, schemas
from cemg.serve.engine import Answer
from cemg.serve.engine import Request as Asked
from cemg.serve.metrics import Metrics, Observed
from cemg.serve.paths import Cursor, EncodedSlashes, PathId
from cemg.serve.rows import MAX_INTEGER, DroppedError, ServedModel, StoredItem, UnknownItemError
from cemg.serve.security import LOOPBACK, Guard, Keys, requires
from cemg.serve.service import Service
from cemg.version import __version__

GONE = 499  # status in the log of a request whose client has gone
Limit = Annotated[int, Query(ge=1, le=1_000)]


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the endpoints.

    Attributes:
        keys: API keys with their roles; without any, every request may do everything.
        hosts: Names that the Host header may have.
        timeout: Seconds that a request may wait for its search.
        max_bytes: Largest size of a body.
        rate: Requests per second that are answered per client; 0 for no limit.
    """

    keys: Keys = field(default_factory=lambda: Keys({}))
    hosts: Sequence[str] = LOOPBACK
    timeout: float = 10.0
    max_bytes: int = 4 << 20
    rate: float = 0.0


def create_app(service: Service, settings: Settings | None = None) -> FastAPI:
    """Create the application of a service, which it closes when it ends."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close, timeout=settings.timeout)  # or what is left of that of `drain`

    app = FastAPI(
        title="CEMG", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Recommendations from a catalog and a memory that change while they are served.",
        responses=problems.RESPONSES,
    )  # fmt: skip
    app.state.keys, app.state.metrics = settings.keys, Metrics(service)
    problems.install(app)
    app.add_middleware(EncodedSlashes)
    app.add_middleware(
        Guard, hosts=settings.hosts, max_bytes=settings.max_bytes, keys=settings.keys, rate=settings.rate
    )
    app.add_middleware(
        Observed, metrics=app.state.metrics, status=service.status
    )  # outermost: sees all answers
    _add_health(app, service)
    _add_recommendations(app, service, settings)
    _add_users(app, service)
    browse.add(app, service)  # before the items, whose ids may have slashes
    _add_items(app, service)
    _add_models(app, service)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """The process runs; also while it shuts down."""
        return {"status": "draining" if service.status.draining else "live"}

    @app.get("/health/ready", tags=["health"])
    async def ready() -> dict[str, str]:
        """Requests are answered; 503 while the service starts or shuts down, or lags behind its replicas."""
        if not service.status.ready:
            state = "shuts down" if service.status.draining else "starts"
            raise HTTPException(503, f"the service {state}", problems.RETRY_AFTER)
        if service.status.behind:
            raise HTTPException(503, service.status.behind, problems.RETRY_AFTER)
        return {"status": "ready"}

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse, dependencies=[requires("read")])
    def metrics() -> Response:
        """Metrics in the format of Prometheus."""
        return Response(*app.state.metrics.page())


def _add_recommendations(app: FastAPI, service: Service, settings: Settings) -> None:
    async def answered(
        asked: Sequence[schemas.RecommendRequest], request: Request
    ) -> list[schemas.Recommendation]:
        futures: list[asyncio.Future[Answer]] = []
        gone = asyncio.create_task(_until_gone(request))
        try:
            for one in asked:
                queued = service.recommend(_asked(one), timeout=settings.timeout)
                futures.append(asyncio.wrap_future(queued))
            together = asyncio.gather(*futures)
            first: set[asyncio.Future[Any]] = {together, gone}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not together.done():
                together.cancel()
                raise HTTPException(GONE, "the client has gone")
            answers = await together
        finally:
            gone.cancel()
            for future in futures:  # after a failure, the others need no search
                future.cancel()
        for one, answer in zip(asked, answers, strict=True):
            if one.strict and answer.skipped:
                raise UnknownItemError(f"history: there is no item {answer.skipped[0]}")
            if one.strict and one.user_id is not None and not answer.known_user:
                raise UnknownItemError(f"there is no user {one.user_id}")
        return [_answer(one, answer) for one, answer in zip(asked, answers, strict=True)]

    @app.post("/v1/recommend", tags=["recommendations"], dependencies=[requires("read")])
    async def recommend(
        body: schemas.RecommendBody, request: Request
    ) -> schemas.Recommendation | schemas.RecommendationBatch:
        """Recommend the next items, for a known user or for a history; several requests in one call."""
        if isinstance(body, schemas.RecommendBatch):
            most = service.model.max_queue
            if len(body.requests) > most:
                raise UserError(
                    f"requests: at most {most} fit into the queue of the service, got {len(body.requests)}",
                    fix="send fewer in a call, or start cemg-serve with a larger --max-queue",
                )
            return schemas.RecommendationBatch(recommendations=await answered(body.requests, request))
        return (await answered([body], request))[0]


async def _until_gone(request: Request) -> None:
    """Wait until the client closes its connection."""
    with suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _asked(body: schemas.RecommendRequest) -> Asked:
    return Asked(
        user=body.user_id or "", history=tuple(body.history or ()), limit=body.limit, beams=body.beams,
        exclude_history=body.exclude_history, exact=body.exact, filter=body.filter, explain=body.explain,
    )  # fmt: skip


def _answer(body: schemas.RecommendRequest, answer: Answer) -> schemas.Recommendation:
    none = [None] * len(answer.items)
    shares: Sequence[dict[str, float] | None] = none if answer.shares is None else answer.shares
    events: Sequence[list[schemas.EventShareAnswer] | None] = none if answer.events is None else [
        [schemas.EventShareAnswer(position=e.position, item_id=e.item, share=e.share) for e in own]
        for own in answer.events
    ]  # fmt: skip
    rows = zip(answer.items, answer.scores, answer.titles, answer.codes, shares, events, strict=True)
    return schemas.Recommendation(
        recommendation_id=uuid.uuid4().hex,
        items=[
            schemas.RecommendedItem(
                item_id=item, score=score, title=title, codes=codes, shares=share, events=rests_on
            )
            for item, score, title, codes, share, rests_on in rows
        ],
        certified=answer.certified,
        strategy=answer.strategy,
        catalog_version=answer.catalog_version,
        model_version=answer.model_version,
        complete=len(answer.items) == body.limit,
        skipped=answer.skipped,
    )


def _add_users(app: FastAPI, service: Service) -> None:
    @app.post("/v1/events", tags=["events"], dependencies=[requires("write")])
    def add_events(body: schemas.EventsBody) -> schemas.EventsAnswer:
        """Store interactions. The next recommendations for their users reflect them."""
        stored = service.add_events([one.event() for one in body.events])
        known = [one.event_id for one, new in zip(body.events, stored, strict=True) if not new]
        items = dict.fromkeys(one.item_id for one in body.events)
        unknown = [item for item in items if service.codes(item) is None]
        return schemas.EventsAnswer(stored=sum(stored), known=known, unknown_items=unknown)

    @app.get("/v1/users/{user_id:path}", tags=["users"], dependencies=[requires("read")])
    def get_user(user_id: PathId) -> schemas.UserAnswer:
        """The history of a user."""
        history = service.history(user_id)
        if history is None:
            raise HTTPException(404, f"there is no user {user_id}")
        return schemas.UserAnswer(user_id=user_id, history=history)

    @app.delete("/v1/users/{user_id:path}", tags=["users"], dependencies=[requires("write")])
    def delete_user(user_id: PathId) -> schemas.DeletedAnswer:
        """Delete a user with all events; the item memory forgets them."""
        if service.history(user_id) is None:
            raise HTTPException(404, f"there is no user {user_id}")
        return schemas.DeletedAnswer(deleted=service.delete_user(user_id))


def _add_items(app: FastAPI, service: Service) -> None:
    def item_answer(stored: StoredItem) -> schemas.ItemAnswer:
        item, codes = stored.item, service.codes(stored.item.item_id)
        failed, problem = service.status.failed_items.get(item.item_id, (None, None))
        placing = stored.state == "active" and codes is None  # stored, but not searched yet
        return schemas.ItemAnswer(
            item_id=item.item_id, title=item.title, text=item.text, attributes=dict(item.attributes),
            state="pending" if placing else stored.state, codes=codes, version=stored.version,
            image=service.has_picture(stored), problem=problem if failed == stored.version else None,
        )  # fmt: skip

    @app.get("/v1/items/{item_id:path}", tags=["catalog"], dependencies=[requires("read")])
    def get_item(item_id: PathId) -> schemas.ItemAnswer:
        """An item."""
        stored = service.get_item(item_id)
        if stored is None:
            raise UnknownItemError(f"there is no item {item_id}")
        return item_answer(stored)

    @app.get("/v1/items", tags=["catalog"], dependencies=[requires("read")])
    def list_items(
        cursor: Cursor = "",
        limit: Limit = 100,
        query: Annotated[
            str,
            Query(max_length=256, description="The beginning of an id or a part of a title, in any case."),
        ] = "",
    ) -> schemas.ItemPage:
        """Items in the order of their ids, a page at a time; with a query, the item with that id before."""
        found = service.find_items(query, cursor, limit) if query else service.list_items(cursor, limit)
        last = found[-1].item.item_id if len(found) >= limit else None
        return schemas.ItemPage(items=[item_answer(one) for one in found], next=last)

    @app.put("/v1/items/{item_id:path}", tags=["catalog"], dependencies=[requires("write")])
    def put_item(item_id: PathId, body: schemas.ItemFields) -> schemas.VersionAnswer:
        """Insert or replace an item. A new one is recommended once it has a semantic ID."""
        whole = schemas.ItemBody(item_id=item_id, **body.model_dump())
        return schemas.VersionAnswer(catalog_version=service.put_items([whole.item(_image(body.image))]))

    @app.post("/v1/items", tags=["catalog"], dependencies=[requires("write")])
    def put_items(body: schemas.ItemsBody) -> schemas.VersionAnswer:
        """Insert or replace items, all of them or none."""
        items = [one.item(_image(one.image, "items", n)) for n, one in enumerate(body.items)]
        return schemas.VersionAnswer(catalog_version=service.put_items(items))

    @app.patch("/v1/items/{item_id:path}", tags=["catalog"], dependencies=[requires("write")])
    def patch_item(item_id: PathId, body: schemas.ItemPatch) -> schemas.VersionAnswer:
        """Change some fields of an item."""
        values: dict[str, Any] = body.model_dump(exclude_unset=True)
        if "image" in values:
            values["image"] = _image(values["image"])
        return schemas.VersionAnswer(catalog_version=service.patch_item(item_id, values))

    @app.delete("/v1/items/{item_id:path}", tags=["catalog"], dependencies=[requires("write")])
    def remove_item(item_id: PathId) -> schemas.VersionAnswer:
        """Remove an item: no request from now on gets it."""
        return schemas.VersionAnswer(catalog_version=service.remove_item(item_id))

    @app.get("/v1/catalog", tags=["catalog"], dependencies=[requires("read")])
    def catalog() -> schemas.CatalogAnswer:
        """Versions and sizes."""
        return schemas.CatalogAnswer(model_version=service.model_version, **service.sizes())

    @app.get("/v1/catalog/changes", tags=["catalog"], dependencies=[requires("read")])
    def changes(
        after: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0, limit: Limit = 100
    ) -> schemas.ChangesAnswer:
        """The numbered log of changes, which replicas follow."""
        found = service.store.changes_after(after, limit)
        if after > (last := service.store.version):
            raise DroppedError(
                f"the catalog is at version {last}, not {after} or later: the store was restored or replaced",
                fix="read all items again, then the changes after the version that the catalog had before",
            )
        rows = [
            schemas.ChangeAnswer(
                version=one.version,
                kind=one.kind,
                item_id=one.item_id,
                payload=dict(one.payload),
                time=one.time,
            )
            for one in found
        ]
        return schemas.ChangesAnswer(changes=rows, catalog_version=service.store.version)


def _image(text: str | None, *place: str | int) -> bytes | None:
    """The image of an item. It is decoded here, beside the event loop, and refused as a field of the body."""
    try:
        return None if text is None else images.decoded(text)
    except ValueError as error:
        raise RequestValidationError([{"loc": ("body", *place, "image"), "msg": str(error)}]) from error


def _add_models(app: FastAPI, service: Service) -> None:
    def answer() -> schemas.ModelsAnswer:
        models, last = service.models(), service.loader.last
        return schemas.ModelsAnswer(
            current=_model(models.current),
            previous=None if models.previous is None else _model(models.previous),
            shadow=_shadow(service),
            last=None if last is None else schemas.LoadAnswer(
                run=str(last.run), state=last.state, reason=last.reason, started=last.started,
                seconds=last.seconds,
            ),
        )  # fmt: skip

    @app.get("/v1/models", tags=["models"], dependencies=[requires("admin")])
    def models() -> schemas.ModelsAnswer:
        """The run that is served, the one before it, and how far another one is loaded."""
        return answer()

    @app.post("/v1/models", tags=["models"], status_code=202, dependencies=[requires("admin")])
    def load(body: schemas.ModelBody) -> schemas.ModelsAnswer:
        """Load another run in the background. It answers all requests from some moment on.

        A shadow answers none: a sample of the requests is searched by it, too, and compared.
        """
        if body.shadow:
            service.check_number(body.events)
            service.shadows.load(body.run, sample=body.sample, events=body.events)
        else:
            service.load_model(body.run, events=body.events)
        return answer()

    @app.delete("/v1/models/shadow", tags=["models"], dependencies=[requires("admin")])
    def stop_shadow() -> schemas.ModelsAnswer:
        """End the comparison with a shadow."""
        if not service.shadows.stop():
            raise HTTPException(404, "there is no shadow")
        return answer()

    @app.post("/v1/models/rollback", tags=["models"], status_code=202, dependencies=[requires("admin")])
    def rollback() -> schemas.ModelsAnswer:
        """Load the run that was served before, with everything that changed since."""
        service.roll_back()
        return answer()


def _model(served: ServedModel) -> schemas.ModelAnswer:
    return schemas.ModelAnswer(run=served.run, model_version=served.version)


def _shadow(service: Service) -> schemas.ShadowAnswer | None:
    shadow = service.shadows.current
    if shadow is None:
        return None
    done = shadow.compared
    return schemas.ShadowAnswer(
        run=str(shadow.loaded.run), model_version=shadow.loaded.engine.model_version, sample=shadow.sample,
        compared=done.requests, overlap=done.overlaps / done.requests if done.requests else None,
        left_out=done.left_out, failed=done.failed,
    )  # fmt: skip
