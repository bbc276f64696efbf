"""CEMG: collaborative-enhanced multimodal generative recommendation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cemg.version import __version__

if TYPE_CHECKING:
    from cemg.recommender import Recommender as Recommender
    from cemg_kernels import ItemPrior as ItemPrior

__all__ = ["ItemPrior", "Recommender", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Recommender":  # late: torch and transformers take seconds to import
        from cemg.recommender import Recommender

        return Recommender
    if name == "ItemPrior":
        from cemg_kernels import ItemPrior

        return ItemPrior
    raise AttributeError(f"module 'cemg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "ItemPrior", "Recommender"]
