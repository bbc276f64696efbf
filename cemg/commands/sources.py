"""The options that name the data files and their format; they are the same in every command."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from cemg.errors import UserError

InteractionsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Interactions file (.csv, .tsv, .parquet, .gz), or a folder of Parquet files."
    ),
]
ItemsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Items file. Default: the one found next to the interactions."),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of images named by item id; subfolders are searched too."),
]
ColumnsOption = Annotated[
    str,
    typer.Option(
        metavar="ROLE=NAME,…",
        help="Names of the columns, as in user=uid,item=sku. Interactions have the roles user, item, "
        "timestamp and rating; items id, title, text (several: text=a+b) and image. Without a header: #1, …",
    ),
]
SeparatorOption = Annotated[
    str,
    typer.Option(metavar="CHARACTER", help="Field separator of csv files, or tab. Default: detected."),
]
EncodingOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Encoding of text files: cp1252, latin-1, utf-16, … Default: UTF-8, unless marked.",
    ),
]
DropDuplicatesOption = Annotated[
    bool, typer.Option("--drop-duplicates", help="Drop rows that exactly repeat another row.")
]


def one_source(path: Path | None, interactions: Path | None, *, option: str) -> Path | None:
    """Return the data source that is given, or None. Raises UserError if both are.

    Args:
        path: Value of the argument or option named ``option``.
        interactions: Value of ``--interactions``.
        option: Name of the first one, for the error.
    """
    if path is not None and interactions is not None:
        raise UserError(
            f"{option} {path} and --interactions {interactions} both name the data",
            fix=f"use one of them, for example --interactions {quote(str(interactions))}",
        )
    return path or interactions
