"""``cemg-data``: inspect a dataset, prepare it, generate the synthetic one, or export that of a service."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Annotated

import typer

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
from cemg.data.choices import Duplicates, Format, SplitBy, Ties
from cemg.errors import UserError
from cemg.storage import files

if TYPE_CHECKING:
    from cemg.data import Dataset

app = command.command_line(
    name="cemg-data",
    help="Read, check and prepare interaction data.",
    no_args_is_help=True,
    epilog=command.examples(
        "cemg-data stats raw/beauty",
        "cemg-data prepare raw/beauty data/beauty",
        "cemg-data synthetic data/synthetic",
        "cemg-data export --run runs/demo data/next",
    ),
)

FormatOption = Annotated[Format, typer.Option(help="Format of the source; auto detects it.")]
MinCountOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Drop users and items with fewer interactions, until all have enough; 0 keeps all.",
        show_default="5, or 0 for the sequence format",
    ),
]
MinRatingOption = Annotated[float | None, typer.Option(help="Drop interactions with a lower rating.")]
TiesOption = Annotated[
    Ties, typer.Option(help="Order of a user's interactions at the same time: as in the source, or shuffled.")
]
SplitOption = Annotated[
    SplitBy,
    typer.Option(
        help="Test targets: the last item of each user, or the first one after a time, the same for all."
    ),
]
DuplicatesOption = Annotated[
    Duplicates,
    typer.Option(
        help="Interactions to keep if a user has an item several times: all (keep), the first or the last."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Random seed.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT if it is a prepared folder.")]


@app.callback()
def _about(version: command.VersionOption = False) -> None: ...


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-data stats data/beauty",
        "cemg-data stats --interactions orders.csv --columns user=uid,item=sku,timestamp=ts",
    ),
)
def stats(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="Folder or file in any supported format, or a prepared folder."),
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
    """Print the statistics of a dataset.

    These are the number of users, items and interactions, the average length of a history, and the sparsity.
    """
    from cemg.data.readers import ColumnNames, read_dataset

    source = one_source(path, interactions, option="the argument")
    if source is None:
        raise UserError(
            "no dataset is named", fix="cemg-data stats PATH, or cemg-data stats --interactions FILE"
        )
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
    _print_notes(data)


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-data prepare raw/yelp data/yelp --min-rating 4",
        "cemg-data prepare --interactions orders.csv --columns user=uid,item=sku,timestamp=ts data/shop",
    ),
)
def prepare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SOURCE] OUT",
            help="SOURCE: folder or file in any supported format; leave it out with --interactions. "
            "OUT: folder to write.",
        ),
    ],
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    images: ImagesOption = None,
    columns: ColumnsOption = "",
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    format: FormatOption = "auto",
    name: Annotated[
        str | None, typer.Option(help="Name of the dataset. Default: that of the source.")
    ] = None,
    min_count: MinCountOption = None,
    min_rating: MinRatingOption = None,
    times: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of times for the sequence format: its lines with a number in place of each item.",
        ),
    ] = None,
    ties: TiesOption = "source",
    duplicates: DuplicatesOption = "keep",
    drop_duplicates: DropDuplicatesOption = False,
    split: SplitOption = "leave-one-out",
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Convert a dataset to a prepared folder of Parquet files.

    The interactions are filtered and sorted by time.
    """
    from cemg.data.readers import ColumnNames, read_dataset

    source, out = _source_and_out(paths, interactions)
    _check_output(out, force=force, source=source)
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
        times=times,
        ties=ties,
        duplicates=duplicates,
        drop_duplicates=drop_duplicates,
        split=split,
        seed=seed,
    )
    with _renamed_when_complete(out) as folder:
        data.save(folder)
    _print_written(data, out)


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-data synthetic data/synthetic",
        "cemg-data synthetic data/synthetic --users 2000 --items 800 --seed 1",
    ),
)
def synthetic(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 1200,
    items: Annotated[int, typer.Option(help="Number of items.")] = 400,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Generate the synthetic dataset.

    Its pictures, texts and purchases follow known rules.
    """
    from cemg.data import synthetic_dataset

    _check_output(out, force=force)
    with _renamed_when_complete(out) as folder:
        drawn = synthetic_dataset(folder, users=users, items=items, seed=seed)
        final_images = [out / path.relative_to(folder) if path else None for path in drawn.images]
        data = dataclasses.replace(drawn, images=final_images)
        data.save(folder)
    _print_written(data, out)


@app.command(
    cls=command.Command,
    epilog=command.examples("cemg-data synth data/large --items 1e7 --users 1e7"),
)
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    users: Annotated[str, typer.Option(metavar="N", help="Number of users, as 50000 or 1e7.")],
    items: Annotated[str, typer.Option(metavar="N", help="Number of items, as 50000 or 1e7.")],
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Generate a dataset of any size, with texts and without pictures, in bounded memory.

    Items are in clusters that follow each other in most histories.
    """
    from cemg.data.large import write_large

    counts = {"users": _count(users, "--users"), "items": _count(items, "--items")}
    _check_output(out, force=force)
    with _renamed_when_complete(out) as folder:
        interactions = write_large(folder, **counts, seed=seed)
    numbers = f"{counts['users']:,} users, {counts['items']:,} items, {interactions:,} interactions"
    print(f"wrote {out}: {numbers}", file=sys.stderr)
    print(out)


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-data export --run runs/demo data/next", "cemg-train --data data/next --run runs/next"
    ),
)
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    run: command.RunOption,
    store: Annotated[
        str,
        typer.Option(metavar="PATH", help="Store of cemg-serve: a path or URL. Default: that in the run."),
    ] = "",
    name: Annotated[
        str | None, typer.Option(help="Name of the dataset. Default: that of the run's data.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Export what cemg-serve has stored as a prepared folder.

    It has the run's data with the served events and items, for the next cemg-train. Deleted users and removed
    items are left out. The service may run meanwhile.
    """
    try:
        from cemg.serve import export as served
        from cemg.serve.database import STORE_FILE
    except ModuleNotFoundError as error:
        raise UserError(
            f"the export needs the package {error.name}", fix="pip install -e '.[serve]'"
        ) from error

    _check_output(out, force=force, source=run)
    with _renamed_when_complete(out) as folder:
        data = served.export(run, store or run / STORE_FILE, folder, name=name or "")
    _print_written(data, out)


def main() -> None:
    """Run ``cemg-data`` on the command line's arguments."""
    command.run(app)


def _count(text: str, option: str) -> int:
    """Parse a whole number, as 50000 or 1e7."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value.is_integer() or value < 0:
        raise UserError(f"{option} must be a whole number, got {text!r}", fix=f"{option} 1e6")
    return int(value)


def _source_and_out(paths: list[Path], interactions: Path | None) -> tuple[Path, Path]:
    """Split the arguments into source and output folder; --interactions may name the source instead."""
    source = one_source(paths[0] if len(paths) > 1 else None, interactions, option="SOURCE")
    if len(paths) > 2 or source is None:
        raise UserError(
            f"expected SOURCE and OUT, got {join(map(str, paths))}",
            fix="cemg-data prepare SOURCE OUT, or cemg-data prepare --interactions FILE OUT",
        )
    return source, paths[-1]


def _as_table(data: Dataset) -> str:
    """Format the statistics with the columns of Table 1 of the CEMG paper."""
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


def _print_notes(data: Dataset) -> None:
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)


def _print_written(data: Dataset, out: Path) -> None:
    _print_notes(data)
    print(f"wrote {out}: {data.num_users:,} users, {data.num_items:,} items", file=sys.stderr)
    print(out)


def _check_output(out: Path, *, force: bool, source: Path | None = None) -> None:
    """Raise UserError if ``out`` exists, unless ``force`` is set and it is a prepared folder.

    The source, or a folder that contains it, is never overwritten.
    """
    if source and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out} contains the source", fix="choose another folder for the prepared data")
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} already exists", fix="choose another folder, or replace it with --force")
    if not (out / "dataset.json").is_file():
        raise UserError(
            f"{out} already exists and is not a prepared folder",
            fix="choose another folder, or remove this one yourself",
        )


@contextmanager
def _renamed_when_complete(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that is renamed to ``out`` if the block succeeds."""
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        files.make_folder(part)
        yield part
        files.replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
