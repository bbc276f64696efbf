"""The JSON of requests and answers, as FastAPI checks and documents it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from cemg.serve.expressions import FilterInput
from cemg.serve.rows import MAX_ID, MAX_INTEGER, MAX_TEXT, MAX_TITLE, MAX_TYPE, Attribute, Event, Item

MAX_HISTORY = 10_000  # items of a history
MAX_LIMIT = 1_000  # recommended items
MAX_BEAMS = 1_000  # of a request; a batch of searches has this many rows for each
MAX_REQUESTS = 256  # requests of a batch
MAX_EVENTS = 1_000  # events of a call
MAX_ITEMS = 1_000  # items of a call
UNKNOWN_NAMES = 10  # of an object; each is an error of its own

IMAGE = "Base64 of a PNG, JPEG, GIF or WebP file. Paths and URLs are not read."


def is_text(value: str) -> str:
    """Return an id. Raises ValueError if it is empty or has control characters."""
    if not value or not value.isprintable():
        raise ValueError("must be printable text on one line, not empty")
    return value


Id = Annotated[str, Field(max_length=MAX_ID), AfterValidator(is_text)]


def are_attributes(given: Any) -> Any:
    """Check the values of attributes: one error, however many are wrong."""
    for name, value in given.items() if isinstance(given, dict) else ():
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if value is not None and not is_list and not isinstance(value, str | bool | int | float):
            raise ValueError(f"{name[:100]!r} must be a text, a number, true, false or a list of texts")
    return given


class Strict(BaseModel):
    """JSON in which a name that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_names(cls, given: Any) -> Any:
        unknown = given.keys() - cls.model_fields.keys() if isinstance(given, dict) else ()
        if len(unknown) > UNKNOWN_NAMES:
            raise ValueError(f"{len(unknown)} names do not exist; one is {min(unknown)[:100]!r}")
        return given


class RecommendRequest(Strict):
    """A request for recommendations, for a known user or for a history."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": "u17", "limit": 3}]})

    user_id: Id | None = Field(None, examples=["u17"])
    history: list[Id] | None = Field(
        None,
        max_length=MAX_HISTORY,
        fail_fast=True,
        description="Item ids, oldest first.",
        examples=[["item-0012", "item-0007"]],
    )
    limit: int = Field(10, ge=1, le=MAX_LIMIT)
    filter: FilterInput | None = None
    exclude_history: bool | None = Field(
        None,
        description="Whether items of the history are left out; by default unless users return to items.",
    )
    exact: bool = Field(False, description="Whether the list is proven to be the true top of the catalog.")
    beams: int | None = Field(None, ge=1, le=MAX_BEAMS, description="Beams of the search.")
    explain: bool = Field(
        False, description="Whether each item says which sources and which events its probability is from."
    )
    strict: bool = Field(False, description="Whether an unknown user or item of the history is an error.")

    @model_validator(mode="after")
    def _one_history(self) -> RecommendRequest:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        return self


class RecommendBatch(Strict):
    """Several requests, answered together."""

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_REQUESTS, fail_fast=True)


def _kind(given: Any) -> str:
    """Which of both a body is, so that an error is about that one."""
    batch = "requests" in given if isinstance(given, dict) else isinstance(given, RecommendBatch)
    return "batch" if batch else "request"


RecommendBody = Annotated[
    Annotated[RecommendRequest, Tag("request")] | Annotated[RecommendBatch, Tag("batch")],
    Discriminator(_kind),
]


class EventShareAnswer(BaseModel):
    """An event that an item rests on."""

    position: int = Field(description="Its place in the history; 0 is the oldest.")
    item_id: str
    share: float = Field(description="The share of the item's probability that is from it.")


class RecommendedItem(BaseModel):
    """A recommended item."""

    item_id: str
    score: float = Field(description="Logarithm of its probability.")
    title: str | None = None
    codes: list[int] = Field(description="Its semantic ID.")
    shares: dict[str, float] | None = Field(
        None,
        description="With explain: how much of its probability is from the generator, the memory and other "
        "sources of the mixture, in sum 1; popularity for an empty history.",
        examples=[{"generator": 0.4, "memory": 0.6}],
    )
    events: list[EventShareAnswer] | None = Field(
        None,
        description="With explain: the events of the history that the memory's share rests on, the strongest "
        "first, at most ten. All of them sum to that share.",
    )


class Recommendation(BaseModel):
    """Recommendations, best first."""

    recommendation_id: str
    items: list[RecommendedItem]
    certified: int = Field(description="How many items at the front are proven to be the true top.")
    strategy: str = Field(description="What ranked them: mixture, generator or popularity.")
    catalog_version: int
    model_version: str
    complete: bool = Field(description="False if the catalog had fewer items than were asked for.")
    skipped: list[str] = Field(description="Items of the history that the catalog does not have.")


class RecommendationBatch(BaseModel):
    """Answers in the order of the requests."""

    recommendations: list[Recommendation]


class EventBody(Strict):
    """An interaction of a user with an item."""

    event_id: Id = Field(description="An event with a known id is not stored again.", examples=["e1"])
    user_id: Id = Field(examples=["u17"])
    item_id: Id = Field(examples=["item-0012"])
    timestamp: float | None = Field(None, description="Seconds since 1970; by default the time of the call.")
    type: Annotated[str, Field(max_length=MAX_TYPE), AfterValidator(is_text)] = "interaction"

    def event(self) -> Event:
        """As the store has it."""
        return Event(self.event_id, self.user_id, self.item_id, self.timestamp, self.type)


class EventsBody(Strict):
    """Events to store."""

    events: list[EventBody] = Field(min_length=1, max_length=MAX_EVENTS, fail_fast=True)


class EventsAnswer(BaseModel):
    """What was stored."""

    stored: int = Field(description="Number of new events.")
    known: list[str] = Field(description="Ids of the events that were stored before.")
    unknown_items: list[str] = Field(
        description="Items that the catalog does not have. Their events count once it has them."
    )


class ItemFields(Strict):
    """The fields of an item."""

    title: str = Field("", max_length=MAX_TITLE, examples=["Sturdy rudder"])
    text: str = Field("", max_length=MAX_TEXT, examples=["for the garden"])
    attributes: Annotated[dict[str, Attribute], BeforeValidator(are_attributes)] = Field(
        default_factory=dict,
        description="Values that filters read.",
        examples=[{"price": 9.5, "tags": ["toy"]}],
    )
    image: str | None = Field(None, description=IMAGE)


class ItemBody(ItemFields):
    """An item with its id."""

    item_id: Id = Field(examples=["new-1"])

    def item(self, image: bytes | None) -> Item:
        """As the store has it."""
        return Item(self.item_id, self.title, self.text, image, self.attributes)


class ItemPatch(Strict):
    """The fields to change; others stay."""

    title: str | None = Field(None, max_length=MAX_TITLE)
    text: str | None = Field(None, max_length=MAX_TEXT)
    attributes: Annotated[dict[str, Attribute | None] | None, BeforeValidator(are_attributes)] = Field(
        None, description="Attributes to change; null deletes one.", examples=[{"price": 8.5, "sale": None}]
    )
    image: str | None = Field(None, description=f"{IMAGE} null deletes it.")


class ItemsBody(Strict):
    """Items to insert or replace."""

    items: list[ItemBody] = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)


class ItemAnswer(BaseModel):
    """An item of the catalog."""

    item_id: str
    title: str
    text: str
    attributes: dict[str, Any]
    state: str = Field(description="active, pending (it has no semantic ID yet) or removed.")
    codes: list[int] | None
    version: int
    image: bool = Field(description="Whether GET /v1/items/{item_id}/image may have a picture.")
    problem: str | None = Field(None, description="Why a pending item cannot get a semantic ID.")


class ItemPage(BaseModel):
    """Items in the order of their ids."""

    items: list[ItemAnswer]
    next: str | None = Field(description="The cursor of the next page; null at the end.")


class SimilarItem(BaseModel):
    """An item that the memory connects with another one."""

    item_id: str
    title: str
    share: float = Field(description="Its share of the scores of all connected items.")


class SimilarAnswer(BaseModel):
    """The nearest items, best first."""

    items: list[SimilarItem]


class VersionAnswer(BaseModel):
    """The version of the catalog after a change."""

    catalog_version: int


class UserAnswer(BaseModel):
    """A user."""

    user_id: str
    history: list[str] = Field(description="Item ids, oldest first.")


class UserPage(BaseModel):
    """Ids of users in their order."""

    users: list[str]
    next: str | None = Field(description="The cursor of the next page; null at the end.")


class DeletedAnswer(BaseModel):
    """The result of a deletion."""

    deleted: int = Field(description="Number of interactions that were deleted.")


class CatalogAnswer(BaseModel):
    """The catalog."""

    catalog_version: int
    model_version: str
    items: int = Field(description="Items that may be recommended.")
    removed: int = Field(description="Removed items that had a semantic ID.")
    pending: int = Field(description="Items that the searches do not have yet.")
    events: int = Field(description="Stored events.")
    users: int = Field(description="Users with stored events.")


class ModelBody(Strict):
    """A run to load."""

    run: str = Field(
        min_length=1, max_length=4096, examples=["beauty-2"],
        description="The folder of a finished run, below the folder of --models.",
    )  # fmt: skip
    events: int | None = Field(
        None, ge=0, le=MAX_INTEGER,
        description="The data of the run have the stored events up to this number, so it does not learn them "
        "again. By default, the data say so: see cemg-data export.",
    )  # fmt: skip
    shadow: bool = Field(
        False,
        description="Whether the run is only compared with the one that answers: its lists are in the log.",
    )
    sample: float = Field(0.1, gt=0, le=1, description="Share of the requests that a shadow is compared on.")


class ModelAnswer(BaseModel):
    """A run."""

    run: str
    model_version: str


class LoadAnswer(BaseModel):
    """The last attempt to load a run."""

    run: str
    state: str = Field(description="loading, ready or failed.")
    reason: str | None = Field(description="Why it failed; the model before it is still served.")
    started: float = Field(description="In seconds since 1970.")
    seconds: float | None = Field(description="How long it took; null while it runs.")


class ShadowAnswer(ModelAnswer):
    """A run that is compared with the one that answers."""

    sample: float = Field(description="Share of the requests that are compared.")
    compared: int = Field(description="Number of requests that both have searched.")
    overlap: float | None = Field(description="Mean share of the answered items that are in its list, too.")
    left_out: int = Field(description="Requests that were not compared, because too many waited.")
    failed: int = Field(description="Requests that it could not search; the log says why.")


class ModelsAnswer(BaseModel):
    """The models of the service."""

    current: ModelAnswer
    previous: ModelAnswer | None = Field(description="What POST /v1/models/rollback returns to.")
    shadow: ShadowAnswer | None
    last: LoadAnswer | None


class PointAnswer(BaseModel):
    """Requests of some seconds."""

    time: float = Field(description="Start, in seconds since 1970.")
    requests: int = Field(description="Requests for /v1, without this one.")
    errors: int = Field(description="How many of them failed with a status of 500 or more.")
    p50_ms: float | None = Field(description="Median time of POST /v1/recommend.")
    p95_ms: float | None
    p99_ms: float | None


class StatusAnswer(CatalogAnswer):
    """The state of the service."""

    state: str = Field(description="starting, ready or draining.")
    version: str = Field(description="The version of CEMG.")
    uptime_seconds: float
    waiting: int = Field(description="Requests that wait for a search.")
    searches: int
    searched_requests: int
    late_requests: int
    cancelled_requests: int
    interval_seconds: float = Field(description="Seconds of a point.")
    recent: PointAnswer = Field(description="All points together.")
    points: list[PointAnswer] = Field(description="The last minutes, oldest first.")


class ChangeAnswer(BaseModel):
    """An entry of the log of changes."""

    version: int
    kind: str
    item_id: str
    payload: dict[str, Any]
    time: float


class ChangesAnswer(BaseModel):
    """Changes in order; those after the last one: ``after`` its version."""

    changes: list[ChangeAnswer]
    catalog_version: int
