"""``cemg-data``: look at a dataset, prepare it for training, draw the synthetic one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cemg import files
from cemg.commands import console as command
from cemg.commands.sources import (
    ColumnsOption,
    DropDuplicatesOption,
    EncodingOption,
    ImagesOption,
    InteractionsOption,
    ItemsOption,
    SeparatorOption,
    one_source,
)
from cemg.data.dataset import Dataset
from cemg.data.filter import Duplicates, Ties
from cemg.data.readers import ColumnNames, Format, read_dataset
from cemg.data.synthetic import synthetic_dataset
from cemg.errors import UserError

app = command.command_line(
    name="cemg-data", help="Read, check and prepare interaction data.", no_args_is_help=True
)

FormatOption = Annotated[Format, typer.Option(help="How the source is written; auto looks at it.")]
MinCountOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Keep users and items with so many interactions, to a fixed point; 0 keeps all.",
        show_default="5, or 0 for the sequence format",
    ),
]
MinRatingOption = Annotated[float | None, typer.Option(help="Drop interactions rated lower.")]
TiesOption = Annotated[Ties, typer.Option(help="Order of one user's interactions of equal time.")]
DuplicatesOption = Annotated[Duplicates, typer.Option(help="What stays where a user has an item repeatedly.")]
SeedOption = Annotated[int, typer.Option(help="For all that is drawn at random.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT where it is a prepared folder.")]


@app.callback()
def _about(version: command.VersionOption = False) -> None: ...


@app.command(cls=command.Command, epilog="Example: cemg-data stats data/beauty")
def stats(
    path: Annotated[
        Path | None, typer.Argument(help="A folder or file of any format, or a prepared folder.")
    ] = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    images: ImagesOption = None,
    columns: ColumnsOption = "",
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    format: FormatOption = "auto",
    min_count: MinCountOption = None,
    min_rating: MinRatingOption = None,
    duplicates: DuplicatesOption = "keep",
    drop_duplicates: DropDuplicatesOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print users, items, interactions, average length and sparsity."""
    source = one_source(path, interactions, option="the argument")
    if source is None:
        raise UserError("no data is named", fix="cemg-data stats PATH, or --interactions FILE --items FILE")
    data = read_dataset(
        source,
        format=format,
        items=items,
        images=images,
        columns=ColumnNames.parse(columns) if columns else None,
        separator=separator,
        encoding=encoding,
        min_count=min_count,
        min_rating=min_rating,
        duplicates=duplicates,
        drop_duplicates=drop_duplicates,
    )
    print(_as_json(data) if as_json else _as_table(data))
    _say_notes(data)


@app.command(cls=command.Command, epilog="Example: cemg-data prepare raw/yelp data/yelp --min-rating 4")
def prepare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SOURCE] OUT",
            help="A folder or file of any format, unless --interactions names one; the folder to write.",
        ),
    ],
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    images: ImagesOption = None,
    columns: ColumnsOption = "",
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    format: FormatOption = "auto",
    name: Annotated[str | None, typer.Option(help="The dataset's name.")] = None,
    min_count: MinCountOption = None,
    min_rating: MinRatingOption = None,
    ties: TiesOption = "source",
    duplicates: DuplicatesOption = "keep",
    drop_duplicates: DropDuplicatesOption = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Read any format, filter, order by time, and write a prepared folder of Parquet files."""
    source, out = _source_and_out(paths, interactions)
    _check_free(out, force=force, source=source)
    data = read_dataset(
        source,
        format=format,
        name=name,
        items=items,
        images=images,
        columns=ColumnNames.parse(columns) if columns else None,
        separator=separator,
        encoding=encoding,
        min_count=min_count,
        min_rating=min_rating,
        ties=ties,
        duplicates=duplicates,
        drop_duplicates=drop_duplicates,
        seed=seed,
    )
    with _renamed_when_whole(out) as folder:
        data.save(folder)
    _say_written(data, out)


@app.command(cls=command.Command, epilog="Example: cemg-data synthetic data/synthetic --users 2000")
def synthetic(
    out: Annotated[Path, typer.Argument(help="The prepared folder to write.")],
    users: Annotated[int, typer.Option(help="How many users.")] = 1200,
    items: Annotated[int, typer.Option(help="How many items.")] = 400,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Draw the synthetic set: pictures, texts and purchases made by rule."""
    _check_free(out, force=force)
    with _renamed_when_whole(out) as folder:
        drawn = synthetic_dataset(folder, users=users, items=items, seed=seed)
        moved = [out / path.relative_to(folder) if path else None for path in drawn.images]
        data = dataclasses.replace(drawn, images=moved)
        data.save(folder)
    _say_written(data, out)


def main() -> None:
    """The entry point of ``cemg-data``."""
    command.run(app)


def _source_and_out(paths: list[Path], interactions: Path | None) -> tuple[Path, Path]:
    """SOURCE OUT, or OUT alone where --interactions names the source."""
    named = one_source(paths[0] if len(paths) > 1 else None, interactions, option="SOURCE")
    if len(paths) > 2 or named is None:
        raise UserError(
            f"wanted SOURCE and OUT, got {', '.join(map(str, paths))}",
            fix="cemg-data prepare SOURCE OUT, or cemg-data prepare --interactions FILE OUT",
        )
    return named, paths[-1]


def _as_table(data: Dataset) -> str:
    """The columns of the paper's Table 1."""
    numbers = data.stats()
    row = {
        "Dataset": f"{data.name} (synthetic)" if data.synthetic and data.name != "synthetic" else data.name,
        "#Users": f"{numbers['users']:,}",
        "#Items": f"{numbers['items']:,}",
        "#Interactions": f"{numbers['interactions']:,}",
        "Avg. Len.": f"{numbers['avg_length']:.1f}",
        "Sparsity": f"{100 * numbers['sparsity']:.2f} %",
    }
    widths = [max(len(head), len(value)) for head, value in row.items()]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for cells in (row.keys(), row.values())
    )


def _as_json(data: Dataset) -> str:
    about = {"name": data.name, "synthetic": data.synthetic, **data.stats()}
    coverage = {
        "items_with_text": sum(text is not None for text in data.texts),
        "items_with_image": sum(image is not None for image in data.images),
    }
    return json.dumps(about | coverage | {"tie_rule": data.tie_rule, "notes": data.notes}, indent=1)


def _say_notes(data: Dataset) -> None:
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)


def _say_written(data: Dataset, out: Path) -> None:
    _say_notes(data)
    print(f"wrote {out}: {data.num_users:,} users, {data.num_items:,} items", file=sys.stderr)
    print(out)


def _check_free(out: Path, *, force: bool, source: Path | None = None) -> None:
    """Refuse to overwrite what is there, unless forced and a prepared folder that is not the source."""
    if source and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out} holds the source", fix="choose another folder for the prepared data")
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} exists", fix="choose another folder, or replace it with --force")
    if not (out / "dataset.json").is_file():
        raise UserError(
            f"{out} exists and is no prepared folder", fix="choose another, or remove it yourself"
        )


@contextmanager
def _renamed_when_whole(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name, and its place, when the block ends well."""
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        files.make_folder(part)
        yield part
        files.replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
