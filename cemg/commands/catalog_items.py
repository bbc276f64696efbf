"""``cemg-catalog remove``, ``restore`` and ``list``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cemg.commands.items import read_ids
from cemg.errors import UserError
from cemg.progress import console, printable

RunOption = Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")]
ItemsOption = Annotated[
    str, typer.Option(metavar="IDS|FILE", help="Item ids between commas or spaces; a file has one per line.")
]


def remove(run: RunOption, items: ItemsOption) -> None:
    """Never recommend these items again; their semantic IDs stay, and histories may have them.

    Example: cemg-catalog remove --run runs/beauty --items "12 7"
    """
    _change(run, read_ids(items, option="--items"), adds=True)


def restore(run: RunOption, items: ItemsOption) -> None:
    """Recommend removed items again.

    Example: cemg-catalog restore --run runs/beauty --items "12 7"
    """
    _change(run, read_ids(items, option="--items"), adds=False)


def list_items(
    run: RunOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per item.")] = False,
) -> None:
    """Print every item: its id, semantic ID and title, between tabs.

    Example: cemg-catalog list --run runs/beauty
    """
    from cemg.generator import symbol
    from cemg.pipeline import Pipeline
    from cemg.recommender import item_titles
    from cemg.removed import read_removed

    pipeline = Pipeline.open(run)
    catalog, titles, removed = pipeline.load_catalog(), item_titles(pipeline), set(read_removed(run))
    ids: list[int | str] = [*catalog.item_ids]
    for item, codes in zip(ids, catalog.codes.tolist(), strict=True):
        title = titles.get(item) or ""
        if as_json:
            print(json.dumps({"item": item, "codes": codes, "title": title, "removed": item in removed}))
        else:
            name = " ".join(symbol(level, code) for level, code in enumerate(codes))
            mark = "\t(removed)" if item in removed else ""
            print(f"{printable(str(item))}\t{name}\t{printable(title)}{mark}")


def _change(run: Path, ids: list[str], *, adds: bool) -> None:
    from cemg.pipeline import Pipeline
    from cemg.removed import read_removed, write_removed
    from cemg.run import Run

    catalog = Pipeline.open(run).load_catalog()
    catalog.rows_of(ids)  # UserError for an unknown id
    with Run(run).locked():
        before = read_removed(run)
        stranger = next((item for item in ids if not adds and item not in before), None)
        if stranger is not None:
            raise UserError(f"item {stranger!r} was not removed", fix=f"cemg-catalog list --run {run}")
        after = list(dict.fromkeys([*before, *ids])) if adds else [i for i in before if i not in ids]
        write_removed(run, after)
    count = abs(len(after) - len(before))
    what = f"{count} item{'' if count == 1 else 's'} {'removed' if adds else 'restored'}"
    left = len(catalog) - len(set(after) & set(catalog.item_ids))
    console.print(f"{what}; {left:,} of {len(catalog):,} are recommended", soft_wrap=True)
