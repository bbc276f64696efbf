"""The values that the options of the readers accept.

The commands list them in ``--help``, so this module imports no library.
"""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal[
    "auto",
    "prepared",
    "sequence",
    "amazon-2014",
    "amazon-2018",
    "amazon-2023",
    "yelp",
    "movielens",
    "recbole",
    "inter-json",
    "csv",
    "parquet",
]
Ties = Literal["source", "shuffle"]
Texts = Literal["all", "titles"]
Duplicates = Literal["keep", "first", "last"]
SplitBy = Literal["leave-one-out", "time"]
FORMATS: tuple[str, ...] = get_args(Format)
TIES: tuple[str, ...] = get_args(Ties)
TEXTS: tuple[str, ...] = get_args(Texts)
DUPLICATES: tuple[str, ...] = get_args(Duplicates)
SPLITS: tuple[str, ...] = get_args(SplitBy)
