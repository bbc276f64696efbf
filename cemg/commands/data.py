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
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        metavar="ROLE=NAME,…",
        help="Columns of csv and parquet: user=uid,item=sku,timestamp=ts; also rating, title, text, image.",
    ),
]
TiesOption = Annotated[Ties, typer.Option(help="Order of one user's interactions of equal time.")]
DuplicatesOption = Annotated[Duplicates, typer.Option(help="What stays where a user has an item repeatedly.")]
SeedOption = Annotated[int, typer.Option(help="For all that is drawn at random.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT where it is a prepared folder.")]


@app.callback()
def _about(version: command.VersionOption = False) -> None: ...


@app.command(cls=command.Command, epilog="Example: cemg-data stats data/beauty")
def stats(
    path: Annotated[Path, typer.Argument(help="A folder or file of any format, or a prepared folder.")],
    format: FormatOption = "auto",
    min_count: MinCountOption = None,
    min_rating: MinRatingOption = None,
    columns: ColumnsOption = None,
    duplicates: DuplicatesOption = "keep",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print users, items, interactions, average length and sparsity."""
    data = read_dataset(
        path,
        format=format,
        min_count=min_count,
        min_rating=min_rating,
        columns=_column_names(columns),
        duplicates=duplicates,
    )
    print(_as_json(data) if as_json else _as_table(data))
    _say_notes(data)


@app.command(cls=command.Command, epilog="Example: cemg-data prepare raw/yelp data/yelp --min-rating 4")
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder or file of any format.")],
    out: Annotated[Path, typer.Argument(help="The prepared folder to write.")],
    format: FormatOption = "auto",
    name: Annotated[str | None, typer.Option(help="The dataset's name.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images, named by item id.")] = None,
    min_count: MinCountOption = None,
    min_rating: MinRatingOption = None,
    columns: ColumnsOption = None,
    ties: TiesOption = "source",
    duplicates: DuplicatesOption = "keep",
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Read any format, filter, order by time, and write a prepared folder of Parquet files."""
    _check_free(out, force=force, source=source)
    data = read_dataset(
        source,
        format=format,
        name=name,
        images=images,
        min_count=min_count,
        min_rating=min_rating,
        columns=_column_names(columns),
        ties=ties,
        duplicates=duplicates,
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


def _column_names(roles: str | None) -> ColumnNames | None:
    """``user=uid,item=sku`` as ColumnNames."""
    if roles is None:
        return None
    pairs = dict(role.split("=", 1) for role in roles.split(",") if "=" in role)
    known = {field.name for field in dataclasses.fields(ColumnNames)}
    if len(pairs) != len(roles.split(",")) or not pairs.keys() <= known:
        raise UserError(
            f"--columns {roles} is not understood",
            cause=f"wanted role=name, separated by commas; roles: {', '.join(sorted(known))}",
            fix="--columns user=uid,item=sku,timestamp=ts",
        )
    return ColumnNames(**pairs)


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
