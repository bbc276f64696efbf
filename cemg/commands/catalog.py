"""``cemg-catalog``: look at a run's catalog, and add items to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cemg import files
from cemg.commands import console as command
from cemg.errors import UserError
from cemg.progress import console

if TYPE_CHECKING:
    import polars as pl

    from cemg.tokenizer import Catalog

app = command.command_line(help="The catalog of a run: its items and their semantic IDs.")


@app.callback()
def _about(version: command.VersionOption = False) -> None: ...


@app.command(cls=command.Command)
def show(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    item: Annotated[str, typer.Option(help="One item id.")],
) -> None:
    """Print the semantic ID of an item.

    Example: cemg-catalog show --run runs/beauty --item 12
    """
    from cemg.generator import symbol
    from cemg.tokenizer import Catalog

    catalog = Catalog.load(run / "catalog")
    codes = catalog.codes[catalog.rows_of([item])[0]].tolist()
    print(" ".join(symbol(level, code) for level, code in enumerate(codes)))


@app.command(cls=command.Command)
def add(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    items: Annotated[
        Path, typer.Option(help="CSV with columns item and text or image, and title if there is one.")
    ],
) -> None:
    """Give new items semantic IDs through the frozen features and tokenizer; existing IDs never change.

    Example: cemg-catalog add --run runs/beauty --items new.csv
    """
    from cemg.generator import symbol
    from cemg.pipeline import Pipeline
    from cemg.recommender import Recommender
    from cemg.run import Run

    table = _read(items)
    Pipeline.open(run)  # before a typing error becomes a folder with a lock
    with Run(run).locked():
        recommender = Recommender.from_run(run)
        known = set(recommender.catalog.item_ids)
        twice = next((i for i in table["item"] if i in known), None)
        if twice is not None:
            raise UserError(f"{items}: item {twice} is in the catalog already")
        images = [items.parent / p if p else None for p in table["image"]]
        codes = recommender.encode_items(table["text"].to_list(), images)
        _replace(run / "catalog", recommender.catalog.extended(codes, table["item"].to_list()), table)
    for name, row in zip(table["item"], codes.tolist(), strict=True):
        print(name, " ".join(symbol(level, code) for level, code in enumerate(row)))
    console.print(f"{len(table)} items added, {len(known) + len(table)} in the catalog", highlight=False)


def _read(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        table = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read as CSV", cause=str(error).splitlines()[0]) from error
    if "item" not in table.columns or not {"text", "image"} & set(table.columns):
        raise UserError(f"{path} needs the columns item and text or image, has {', '.join(table.columns)}")
    if table["item"].is_null().any():
        raise UserError(f"{path}: row {table['item'].is_null().arg_max() + 2} has no item")  # type: ignore[operator]
    if table["item"].is_duplicated().any():
        twice = table["item"].filter(table["item"].is_duplicated())[0]
        raise UserError(f"{path}: item {twice} occurs more than once")
    wanted = ("text", "image", "title")
    missing = [pl.lit(None, dtype=pl.String).alias(name) for name in wanted if name not in table.columns]
    return table.with_columns(missing)


def _replace(folder: Path, catalog: Catalog, added: pl.DataFrame) -> None:
    """Write the larger catalog beside the old one and swap; its manifest stays: the run is unchanged.

    Killed between the two renamings, the fresh one is what `Run.stage` takes for a stage to be placed.
    """
    from cemg.recommender import ADDED_TITLES

    fresh, old = folder.with_name(".catalog.part"), folder.with_name(".catalog.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder, fresh)
    catalog.save(fresh)
    path = fresh / ADDED_TITLES
    titles = json.loads(path.read_text()) if path.is_file() else {}
    files.write_json(path, titles | {i: t for i, t in zip(added["item"], added["title"], strict=True) if t})
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old)


def main() -> None:
    """Entry point of ``cemg-catalog``."""
    command.run(app)
