"""The options that say which files hold the data and how they are written, alike in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cemg.errors import UserError

InteractionsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File of interactions (csv, tsv, parquet, .gz; a folder of Parquet)."),
]
ItemsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File that describes the items; else what lies beside.")
]
ImagesOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder of images named by item id, subfolders too.")
]
ColumnsOption = Annotated[
    str,
    typer.Option(
        metavar="ROLE=NAME,…",
        help="Columns of csv and parquet: user=uid,item=sku,timestamp=ts,rating=stars; of the items file: "
        "id=sku,title=name,text=title+description,image=picture. #1, #2, … in a file without a header.",
    ),
]
SeparatorOption = Annotated[
    str,
    typer.Option(metavar="CHARACTER", help="Between the fields of a csv, or tab; else the most frequent."),
]
EncodingOption = Annotated[
    str, typer.Option(metavar="NAME", help="Of text files: cp1252, latin-1, utf-16, …; else UTF-8.")
]
DropDuplicatesOption = Annotated[
    bool, typer.Option("--drop-duplicates", help="Drop rows that repeat another one exactly.")
]


def one_source(path: Path | None, interactions: Path | None, *, option: str) -> Path | None:
    """The one of both that is given; UserError where both are."""
    if path is not None and interactions is not None:
        raise UserError(
            f"{option} {path} and --interactions {interactions} both name the data", fix="give one"
        )
    return path or interactions
