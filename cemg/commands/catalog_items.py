"""``cemg-catalog remove``, ``restore`` and ``list``."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from cemg.commands.console import RunOption
from cemg.commands.items import read_ids
from cemg.errors import UserError
from cemg.progress import console, printable

ItemsOption = Annotated[
    str,
    typer.Option(
        metavar="IDS|FILE",
        help="Item ids separated by commas or spaces, or a file with one id per line.",
    ),
]


def remove(run: RunOption, items: ItemsOption) -> None:
    """Stop recommending these items.

    They keep their semantic IDs and may still occur in histories; cemg-catalog restore undoes it.
    """
    _change_removed(run, read_ids(items, option="--items"), remove=True)


def restore(run: RunOption, items: ItemsOption) -> None:
    """Recommend removed items again."""
    _change_removed(run, read_ids(items, option="--items"), remove=False)


def list_items(
    run: RunOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per item.")] = False,
) -> None:
    """Print all items of the catalog.

    One item per line: id, semantic ID and title, separated by tabs. Removed items are marked.
    """
    from cemg.artifacts import RunArtifacts
    from cemg.storage.removed import read_removed
    from cemg.tokenizer import symbol

    artifacts = RunArtifacts.open(run)
    catalog, titles, removed = artifacts.load_catalog(), artifacts.titles(), set(read_removed(run))
    ids: list[int | str] = [*catalog.item_ids]
    for item, codes in zip(ids, catalog.codes.tolist(), strict=True):
        title = titles.get(item) or ""
        if as_json:
            print(json.dumps({"item": item, "codes": codes, "title": title, "removed": item in removed}))
        else:
            name = " ".join(symbol(level, code) for level, code in enumerate(codes))
            mark = "\t(removed)" if item in removed else ""
            print(f"{printable(str(item))}\t{name}\t{printable(title)}{mark}")


def _change_removed(run: Path, ids: list[str], *, remove: bool) -> None:
    from cemg.artifacts import RunArtifacts
    from cemg.storage.removed import read_removed, write_removed
    from cemg.storage.run import Run

    catalog = RunArtifacts.open(run).load_catalog()
    catalog.rows_of(ids)  # UserError for an unknown id
    with Run(run).locked():
        before = read_removed(run)
        not_removed = next((item for item in ids if not remove and item not in before), None)
        if not_removed is not None:
            raise UserError(
                f"item {not_removed!r} is not a removed item",
                fix=f"list the items: cemg-catalog list --run {quote(str(run))}",
            )
        after = list(dict.fromkeys([*before, *ids])) if remove else [i for i in before if i not in ids]
        write_removed(run, after)
    count = abs(len(after) - len(before))
    change = f"{count} item{'' if count == 1 else 's'} {'removed' if remove else 'restored'}"
    active = len(catalog) - len(set(after) & set(catalog.item_ids))
    console.print(f"{change}; {active:,} of {len(catalog):,} are recommended", soft_wrap=True)
