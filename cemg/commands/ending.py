"""How a training ends: the table, recommendations for one user, where the report is, what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cemg.evaluation import result_table
from cemg.pipeline import Pipeline
from cemg.progress import console, printable
from cemg.recommender import Recommender

SHOWN = 5  # recommendations


def say_result(pipeline: Pipeline, paths: Sequence[Path]) -> None:
    """Print what a finished training can show. ``paths`` are the result files of its test."""
    console.print(result_table(paths))
    user, table = example(pipeline)
    console.print(table)
    folder = pipeline.run.folder
    console.print(f"report: {folder / 'report' / 'report.md'}", soft_wrap=True)
    words = shlex.join(["cemg-recommend", "--run", str(folder), "--user", user, "--exclude-history"])
    console.print(f"next:   {printable(words)}", soft_wrap=True)


def example(pipeline: Pipeline) -> tuple[str, Table]:
    """The first tested user, and a table of what is recommended to them."""
    data = pipeline.load_data()
    row = int(data.split().users[0])
    user, history = data.user_ids[row], [data.item_ids[item] for item in data.sequences[row]]
    beams = max(pipeline.config.decoding.beams, SHOWN)
    found = Recommender(pipeline).recommend(history, top=SHOWN, beams=beams, exclude_history=True)
    table = Table("", "item", "title", title=f"for user {printable(user)}", title_justify="left")
    for place, (item, title) in enumerate(zip(found.ids[0], found.titles[0], strict=True), start=1):
        if item is not None:
            table.add_row(str(place), printable(str(item)), printable(title or ""))
    return user, table
