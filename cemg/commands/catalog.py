"""``cemg-catalog``: inspect, extend, restrict and export the catalog of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from cemg.commands import catalog_items
from cemg.commands import console as command
from cemg.commands.shards import (
    ADDED,
    FeatureShardOption,
    RayOption,
    load_features,
    read_shard,
    write_features,
)
from cemg.commands.sources import ColumnsOption, EncodingOption, ImagesOption, SeparatorOption
from cemg.errors import UserError
from cemg.progress import console
from cemg.storage import files

if TYPE_CHECKING:
    import polars as pl


app = command.command_line(
    help="Inspect and change the catalog of a run: its items and their semantic IDs.",
    epilog=command.examples(
        "cemg-catalog list --run runs/beauty",
        "cemg-catalog add --run runs/beauty --items new.csv",
        'cemg-catalog remove --run runs/beauty --items "12 7"',
    ),
)


@app.callback()
def _about(version: command.VersionOption = False) -> None: ...


@app.command(
    cls=command.Command, epilog=command.examples("cemg-catalog show --run runs/beauty --item B0014EC9QS")
)
def show(
    run: command.RunOption,
    item: Annotated[str, typer.Option(metavar="ID", help="Id of the item.")],
    no_verify: command.NoVerifyOption = False,
) -> None:
    """Print the semantic ID of one item."""
    from cemg.storage.manifest import verify
    from cemg.storage.run import Run
    from cemg.tokenizer import Catalog, symbol

    existing = Run.existing(run)
    folder = existing.path("catalog")
    if not no_verify:
        existing.check_whole()
        verify(folder, Catalog.FILES)
    catalog = Catalog.load(folder)
    codes = catalog.codes[catalog.rows_of([item])[0]].tolist()
    print(" ".join(symbol(level, code) for level, code in enumerate(codes)))


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-catalog add --run runs/beauty --items new.csv",
        "cemg-catalog add --run runs/beauty --items new.csv --columns item=sku,text=title+description",
    ),
)
def add(
    run: command.RunOption,
    items: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Table of the new items (.csv, .tsv, .gz, .parquet): column item, and at least one of "
            "title, text and image.",
        ),
    ],
    columns: ColumnsOption = "",
    images: ImagesOption = None,
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    shard: FeatureShardOption = "",
    join: Annotated[
        bool, typer.Option("--join", help="Add the items with the features that --shard 1/N to N/N computed.")
    ] = False,
    ray: RayOption = "",
    no_verify: command.NoVerifyOption = False,
) -> None:
    """Add new items to the catalog, without retraining.

    The encoders and the tokenizer of the run compute their semantic IDs. Existing ones do not change. The
    item memory connects new items with those of similar texts.
    """
    from cemg.artifacts import ADDED_TEXTS, ADDED_TITLES, RunArtifacts
    from cemg.data.readers.pictures import image_paths
    from cemg.features import FeatureCache
    from cemg.features.shards import FeatureWork
    from cemg.recommender import Recommender
    from cemg.storage.run import Run
    from cemg.tokenizer import symbol

    one_shard = read_shard(shard, join=join, ray=ray)
    table = _read(items, columns, separator=separator, encoding=encoding, pictures=images is not None)
    artifacts = RunArtifacts.open(run, verify=not no_verify)  # before the lock, which would create a folder
    pictures, notes = image_paths(table, items.parent, images)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    settings = artifacts.config

    def work() -> FeatureWork:
        return FeatureWork(table["text"].to_list(), pictures, text=settings.text, image=settings.image)

    if one_shard:
        write_features(work(), run / ADDED, shard=one_shard, ray=ray)
        return
    with Run(run).locked(), TemporaryDirectory() as folder_of_cache:
        recommender = Recommender.from_run(run, verify=not no_verify)
        known = set(map(str, recommender.catalog.item_ids))
        existing = next((item for item in table["item"] if item in known), None)
        if existing is not None:
            raise UserError(f"{items}: item {existing} is already in the catalog")
        for note in _similar_ids(table["item"], known, items):
            console.print(f"note: {note}", highlight=False)
        cache = FeatureCache(folder_of_cache) if join or ray else None
        if cache is not None:
            load_features(work(), run / ADDED, cache, ray=ray)
        codes = recommender.encode_items(table["text"].to_list(), pictures, cache=cache)
        titles = recommender.artifacts.added_titles()
        titles |= {i: t for i, t in zip(table["item"], table["title"], strict=True) if t}
        texts = recommender.artifacts.added_texts()
        texts |= {i: t for i, t in zip(table["item"], table["text"], strict=True) if t}
        extended = recommender.catalog.extended(codes, table["item"].to_list())
        memory = recommender.artifacts.extended_memory(extended, table["text"].to_list())
        stages = ("catalog",) if memory is None else ("catalog", "memory")
        with Run(run).revised(*stages) as folder:  # with the same stage keys: later stages stay valid
            extended.save(folder / "catalog")
            files.write_json(folder / "catalog" / ADDED_TITLES, titles)
            files.write_json(folder / "catalog" / ADDED_TEXTS, texts)
            if memory is not None:
                memory.save(folder / "memory")
    for item, item_codes in zip(table["item"], codes.tolist(), strict=True):
        print(item, " ".join(symbol(level, code) for level, code in enumerate(item_codes)))
    console.print(f"{len(table)} items added, {len(known) + len(table)} in the catalog", highlight=False)


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-catalog export --run runs/beauty codes.parquet",
        "cemg-catalog export --run runs/beauty beauty.index.json",
    ),
)
def export(
    run: command.RunOption,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .csv, .parquet or .index.json.")],
    no_verify: command.NoVerifyOption = False,
) -> None:
    """Write the semantic IDs of all items to a file.

    A table has the columns item, code_0, code_1, …; an index.json has the format of LETTER and LC-Rec.
    """
    from cemg.artifacts import RunArtifacts

    catalog = RunArtifacts.open(run, verify=not no_verify).load_catalog()
    catalog.write_codes(out)
    console.print(f"{len(catalog)} items in {out}", highlight=False, markup=False)


def _read(path: Path, columns: str, *, separator: str, encoding: str, pictures: bool) -> pl.DataFrame:
    """Read the new items into the columns item, title, text and image; texts are composed as in training."""
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
        repeated = table["item"].filter(table["item"].is_duplicated())[0]
        raise UserError(f"{path}: item {repeated} occurs more than once")
    if table.select(pl.all_horizontal(pl.col("text", "image").is_null().all())).item() and not pictures:
        raise UserError(
            f"{path} needs a title, text or image column in addition to the item ids",
            fix="name the columns: --columns item=sku,text=title+description,image=picture",
        )
    check_ids(table["item"].to_list(), "item", source=str(path))
    return table


def _similar_ids(added: pl.Series, known: Iterable[object], path: Path) -> list[str]:
    """Return a note if a new id differs from a known one only in how it is written, as 0108 and 108."""
    import polars as pl

    from cemg.data.readers.values import other_forms

    forms = other_forms(pl.Series("item", sorted(map(str, known)), dtype=pl.String), added)
    if forms.is_empty():
        return []
    old, new = forms.row(0)
    return [f"{path.name}: {new!r} is added as a new item, although the catalog has {old!r} "
            f"({forms.height:,} such ids)"]  # fmt: skip


for name, function, options in (
    ("list", catalog_items.list_items, "--run runs/beauty --json"),
    ("remove", catalog_items.remove, '--run runs/beauty --items "12 7"'),
    ("restore", catalog_items.restore, '--run runs/beauty --items "12 7"'),
):
    epilog = command.examples(f"cemg-catalog {name} {options}")
    app.command(name, cls=command.Command, epilog=epilog)(function)


def main() -> None:
    """Run ``cemg-catalog`` on the command line's arguments."""
    command.run(app)
