"""Settings of the item memory, and the constants that a built memory uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cemg.errors import UserError
from cemg.memory.checks import check_count, check_number

FARTHEST = 10_000  # largest window


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """The item memory. Decays, weights and exponents are not settings: validation users choose them."""

    window: int = 10
    """Largest distance of two items of a history that counts as a transition."""
    history_items: int = 20
    """Number of items of a history, the newest, that a query reads."""
    transition_items: int = 200
    """Number of items per history item that a query takes from the transitions."""
    similar_items: int = 100
    """Number of items per history item that a query takes from the text similarity."""
    text: Literal["tfidf", "none"] = "tfidf"
    """Text similarity: tfidf (weighted words of the item texts), or none."""

    def __post_init__(self) -> None:
        check_count("memory.window", self.window, most=FARTHEST)
        for name in ("history_items", "transition_items", "similar_items"):
            check_count(f"memory.{name}", getattr(self, name))
        if self.text not in ("tfidf", "none"):
            raise UserError(f"memory.text must be tfidf or none, got {self.text!r}")


@dataclass(frozen=True, slots=True)
class Constants:
    """The constants of a memory. They are frozen when it is built, so live events do not change them.

    r is the recency of a history item, 0 for the newest, and n_i the number of training events of item i.

    Attributes:
        step_decay: Weight of a transition over d positions: ``step_decay ** (d - 1)``.
        backward: Weight of a transition from the later to the earlier item.
        exponent: Item i weighs ``max(n_i, 1) ** -exponent``.
        decay: A transition from history item r weighs ``decay ** r``.
        text_weight: Weight of the text similarity, in units of ``scale``.
        text_decay: The text similarity to history item r weighs ``text_decay ** r``.
        repeat_weight: Score of history item r itself: ``repeat_weight * scale * text_decay ** r``.
        scale: Median over items of the largest transition score from the item.
        power: Scores are raised to it before they are normalized to a distribution.

    Raises:
        UserError: A value is not finite or outside RANGES.
    """

    step_decay: float = 0.9
    backward: float = 0.5
    exponent: float = 0.3
    decay: float = 0.6
    text_weight: float = 1.0
    text_decay: float = 0.8
    repeat_weight: float = 0.0
    scale: float = 0.0
    power: float = 1.6

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            check_number(f"the constant {name}", getattr(self, name), low, high, above=name in POSITIVE)


RANGES = {
    "step_decay": (0.0, 1.0),
    "backward": (0.0, 1.0),
    "exponent": (0.0, 4.0),
    "decay": (0.0, 1.0),
    "text_weight": (0.0, 1e6),
    "text_decay": (0.0, 1.0),
    "repeat_weight": (0.0, 1e6),
    "scale": (0.0, 1e6),
    "power": (0.0, 100.0),
}  # of the constants
POSITIVE = ("step_decay", "decay", "text_decay", "power")  # constants that are not 0
