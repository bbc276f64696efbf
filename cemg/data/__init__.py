"""Datasets: readers of public formats, the k-core filter, the splits, the synthetic set."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cemg.data.dataset import Dataset as Dataset
    from cemg.data.dataset import Split as Split
    from cemg.data.readers import read_dataset as read_dataset
    from cemg.data.synthetic import synthetic_dataset as synthetic_dataset

_MODULES = {
    "Dataset": "cemg.data.dataset",
    "Split": "cemg.data.dataset",
    "read_dataset": "cemg.data.readers",
    "synthetic_dataset": "cemg.data.synthetic",
}
__all__ = ["Dataset", "Split", "read_dataset", "synthetic_dataset"]


def __getattr__(name: str) -> object:
    if name in _MODULES:  # late: ``cemg-data --help`` needs no Polars
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'cemg.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
