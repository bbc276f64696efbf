"""``cemg-recommend``: the next items for a history, with titles, scores and codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cemg.commands import console as command
from cemg.errors import UserError
from cemg.generator import symbol
from cemg.recommender import Recommender

app = typer.Typer(add_completion=False)


@app.command()
def recommend(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    history: Annotated[str, typer.Option(help="Item ids, oldest first, parted by spaces or commas.")],
    top: Annotated[int, typer.Option(help="How many items.")] = 10,
    beams: Annotated[int, typer.Option(help="Width of the beam search.")] = 50,
    engine: Annotated[str, typer.Option(help="cemg; transformers, the yardstick; or vllm.")] = "cemg",
    exclude_history: Annotated[bool, typer.Option(help="Leave out the items of the history.")] = False,
    exact: Annotated[bool, typer.Option(help="Search on until the list is proven to be the top.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recommend the next items after a history.

    Example: cemg-recommend --run runs/beauty --history "12 7 105" --top 10
    """
    command.check_device(device)
    if beams < 1:
        raise UserError(f"--beams must be at least 1, got {beams}")
    items = history.replace(",", " ").split()
    if not items:
        raise UserError("--history names no item", fix='write it as --history "12 7 105"')
    recommender = Recommender.from_run(run, device=device, engine=engine)
    found = recommender.recommend(
        [items], top=top, beams=max(beams, top), exclude_history=exclude_history, exact=exact
    )
    titles = recommender.titles()
    rows = [
        {
            "item": item,
            "title": titles.get(item) or "",
            "score": score,
            "codes": [symbol(m, c) for m, c in enumerate(codes)],
        }
        for item, score, codes in zip(
            recommender.item_ids(found)[0], found.scores[0].tolist(), found.codes[0].tolist(), strict=True
        )
        if item is not None
    ]
    if as_json:
        json.dump(
            {"history": items, "certified": int(found.certified[0]), "items": rows}, sys.stdout, indent=1
        )
        print()
    else:
        table = _table(rows)
        if engine != "transformers":  # which proves nothing
            proven = int(found.certified[0])
            table.caption = f"the first {proven} of {len(rows)} are proven to be the best"
            table.caption += "; --exact searches on" if proven < len(rows) and not exact else ""
        Console().print(table)


def _table(rows: list[dict[str, object]]) -> Table:
    table = Table("", "item", "title", "log-prob", "codes", caption_justify="left")
    for place, row in enumerate(rows, start=1):
        codes = " ".join(row["codes"])  # type: ignore[arg-type]
        table.add_row(str(place), str(row["item"]), str(row["title"]), f"{row['score']:.3f}", codes)
    return table


def main() -> None:
    """Entry point of ``cemg-recommend``."""
    command.run(app)
