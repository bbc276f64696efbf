"""CEMG: collaborative-enhanced multimodal generative recommendation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cemg.recommender import Recommender as Recommender

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Recommender":  # late: torch and transformers take seconds to import
        from cemg.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'cemg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "Recommender"]
