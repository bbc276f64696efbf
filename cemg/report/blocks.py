"""The parts of a report's page. ``page.html`` renders each block by its ``kind`` and escapes every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Text:
    """One paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first cell of a row is its header. Without ``columns`` there is no header row."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """An inline SVG; ``description`` is what a screen reader reads."""

    title: str
    description: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts side by side, as many as the window is wide enough for."""

    kind: ClassVar[str] = "charts"
    charts: list[Chart]


@dataclass(frozen=True, slots=True)
class Point:
    """An item on the map. ``x`` and ``y`` are in the units of the map's view box."""

    x: int
    y: int
    color: str
    label: str


@dataclass(frozen=True, slots=True)
class ItemMap:
    """A scatter plot whose points show their label on hover. ``side`` is that of its square view box."""

    kind: ClassVar[str] = "map"
    description: str
    side: int
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Card:
    """An item as a picture, where there is one (a data URI), with its title and what is said below it."""

    title: str
    picture: str | None = None
    note: str = ""
    certified: bool = False


@dataclass(frozen=True, slots=True)
class SampleUser:
    """A user's last items, the recommended items, and the item that the user took next."""

    user: str
    history: list[Card]
    earlier: int
    recommended: list[Card]
    outcome: str


@dataclass(frozen=True, slots=True)
class SampleUsers:
    """Recommendations for a few users. With ``pictures``, items that have none are marked."""

    kind: ClassVar[str] = "users"
    users: list[SampleUser]
    pictures: bool


Block = Text | Table | Charts | ItemMap | SampleUsers


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        """The id of the section in the page."""
        return self.title.lower().replace(" ", "-")
