"""What cemg-train prints at its end: metrics, an example, the path of the report, and a next command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cemg.artifacts import RunArtifacts
from cemg.evaluation import result_table
from cemg.progress import console, print_table, printable
from cemg.recommender import Recommender

EXAMPLE_ITEMS = 5  # recommendations in the example


def print_summary(artifacts: RunArtifacts, results: Sequence[Path], report: Path) -> None:
    """Print the end of a finished training: the result files of its test, and the page of its report."""
    print_table(result_table(results))
    user, table = _example(artifacts)
    console.print(table)
    folder = artifacts.run.folder
    console.print(f"report: {report}", soft_wrap=True)
    arguments = shlex.join(["cemg-recommend", "--run", str(folder), "--user", user, "--exclude-history"])
    console.print(f"next:   {printable(arguments)}", soft_wrap=True)


def _example(artifacts: RunArtifacts) -> tuple[str, Table]:
    """Return the first test user, and a table of recommendations for that user."""
    data = artifacts.load_data()
    row = int(data.split().users[0])
    user, history = data.user_ids[row], [data.item_ids[item] for item in data.sequences[row]]
    beams = max(artifacts.config.decoding.beams, EXAMPLE_ITEMS)
    top = Recommender(artifacts).recommend(history, top=EXAMPLE_ITEMS, beams=beams, exclude_history=True)
    title = f"recommended to user {printable(user)}"
    table = Table("rank", "item", "title", title=title, title_justify="left")
    for rank, (item, name) in enumerate(zip(top.ids[0], top.titles[0], strict=True), start=1):
        if item is not None:
            table.add_row(str(rank), printable(str(item)), printable(name or ""))
    return user, table
