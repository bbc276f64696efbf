"""``cemg-catalog``: look at a run's catalog, and add items to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cemg import files
from cemg.commands import catalog_items
from cemg.commands import console as command
from cemg.commands.sources import ColumnsOption, EncodingOption, ImagesOption, SeparatorOption
from cemg.errors import UserError
from cemg.progress import console

if TYPE_CHECKING:
    import polars as pl


app = command.command_line(help="The catalog of a run: its items and their semantic IDs.")


@app.callback()
def _about(version: command.VersionOption = False) -> None: ...


@app.command(cls=command.Command)
def show(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    item: Annotated[str, typer.Option(help="One item id.")],
    no_verify: command.NoVerifyOption = False,
) -> None:
    """Print the semantic ID of an item.

    Example: cemg-catalog show --run runs/beauty --item 12
    """
    from cemg.generator import symbol
    from cemg.manifest import verify
    from cemg.run import Run
    from cemg.tokenizer import Catalog

    opened = Run.existing(run)
    folder = opened.path("catalog")
    if not no_verify:
        opened.check_whole()
        verify(folder, Catalog.FILES)
    catalog = Catalog.load(folder)
    codes = catalog.codes[catalog.rows_of([item])[0]].tolist()
    print(" ".join(symbol(level, code) for level, code in enumerate(codes)))


@app.command(cls=command.Command)
def add(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    items: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Table with the columns item and title, text or image (csv, tsv, .gz, parquet).",
        ),
    ],
    columns: ColumnsOption = "",
    images: ImagesOption = None,
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    no_verify: command.NoVerifyOption = False,
) -> None:
    """Give new items semantic IDs through the frozen features and tokenizer; existing IDs never change.

    Example: cemg-catalog add --run runs/beauty --items new.csv
    """
    from cemg.data.readers.pictures import image_paths
    from cemg.generator import symbol
    from cemg.pipeline import ADDED_TITLES, Pipeline
    from cemg.recommender import Recommender
    from cemg.run import Run

    table = _read(items, columns, separator=separator, encoding=encoding, pictures=images is not None)
    Pipeline.open(run, verify=not no_verify)  # before a typing error becomes a folder with a lock
    with Run(run).locked():
        recommender = Recommender.from_run(run, verify=not no_verify)
        known = set(map(str, recommender.catalog.item_ids))
        twice = next((i for i in table["item"] if i in known), None)
        if twice is not None:
            raise UserError(f"{items}: item {twice} is in the catalog already")
        pictures, notes = image_paths(table, items.parent, images)
        for note in (*notes, *_alike(table["item"], known, items)):
            console.print(f"note: {note}", highlight=False)
        codes = recommender.encode_items(table["text"].to_list(), pictures)
        titles = recommender.pipeline.added_titles()
        titles |= {i: t for i, t in zip(table["item"], table["title"], strict=True) if t}
        larger = recommender.catalog.extended(codes, table["item"].to_list())
        with Run(run).revised("catalog") as folder:  # with the same key: the run is unchanged
            larger.save(folder)
            files.write_json(folder / ADDED_TITLES, titles)
    for name, row in zip(table["item"], codes.tolist(), strict=True):
        print(name, " ".join(symbol(level, code) for level, code in enumerate(row)))
    console.print(f"{len(table)} items added, {len(known) + len(table)} in the catalog", highlight=False)


@app.command(cls=command.Command)
def export(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    out: Annotated[Path, typer.Argument(help="OUT.csv, OUT.parquet or OUT.index.json.")],
    no_verify: command.NoVerifyOption = False,
) -> None:
    """Write the codes of all items for other programs: columns item, code_0, code_1, …, or an index.json.

    Example: cemg-catalog export --run runs/beauty codes.parquet
    """
    from cemg.pipeline import Pipeline

    catalog = Pipeline.open(run, verify=not no_verify).load_catalog()
    catalog.write_codes(out)
    console.print(f"{len(catalog)} items in {out}", highlight=False, markup=False)


def _read(path: Path, columns: str, *, separator: str, encoding: str, pictures: bool) -> pl.DataFrame:
    """The new items, ``item``, ``title``, ``text`` and ``image``, their texts made as in training."""
    import polars as pl

    from cemg.data.dataset import check_ids
    from cemg.data.readers import ColumnNames
    from cemg.data.readers.items import read_items
    from cemg.data.readers.limits import check_source

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_source(path)
    names = ColumnNames.parse(columns) if columns else None
    table, notes = read_items(path, names, separator=separator, encoding=encoding)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    if table["item"].is_duplicated().any():
        twice = table["item"].filter(table["item"].is_duplicated())[0]
        raise UserError(f"{path}: item {twice} occurs more than once")
    if table.select(pl.all_horizontal(pl.col("text", "image").is_null().all())).item() and not pictures:
        raise UserError(
            f"{path} needs a column title, text or image beside the items",
            fix="--columns item=sku,text=title+description,image=picture",
        )
    check_ids(table["item"].to_list(), "item", source=str(path))
    return table


def _alike(added: pl.Series, known: Iterable[object], path: Path) -> list[str]:
    """A note where a new id differs from a known one only in form, as 0108 and 108."""
    import polars as pl

    from cemg.data.readers.values import other_forms

    forms = other_forms(pl.Series("item", sorted(map(str, known)), dtype=pl.String), added)
    if forms.is_empty():
        return []
    old, new = forms.row(0)
    return [f"{path.name}: {new!r} is a new item, though the catalog has {old!r} ({forms.height:,} such ids)"]


for name, act in (("list", catalog_items.list_items), ("remove", catalog_items.remove),
                  ("restore", catalog_items.restore)):  # fmt: skip
    app.command(name, cls=command.Command)(act)


def main() -> None:
    """Entry point of ``cemg-catalog``."""
    command.run(app)
