"""The pages of the experiments in results/experiments/: tables as Markdown, and the report with its charts.

`generate.py` writes docs/experiments/NAME.md, and `hooks.py` adds NAME-report.html to the site.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speed_tables import table

from cemg.experiments import Store
from cemg.experiments.plan import QUESTIONS, plan
from cemg.experiments.report import experiment_sections
from cemg.report.blocks import Section, Table, Text
from cemg.report.page import render

# The questions of each data set, with the number of seeds; a page names the tasks that were not run.
BOTH = ("leave-one-out", "time")
PLANNED: dict[str, list[tuple[list[str], int, Sequence[str]]]] = {
    "beauty": [(["rq1", "rq3"], 1, BOTH), (["rq2", "rq4", "rq5"], 1, BOTH[:1])],
    "sports": [(["rq1", "rq3"], 1, BOTH), (["rq5"], 1, BOTH[:1])],
    "yelp": [(["rq1", "rq3", "rq5"], 1, BOTH[:1])],
    "ml-100k": [(["rq1", "rq3", "rq4"], 1, BOTH[:1]), (["rq2"], 3, BOTH[:1])],
}
NARROW = "\u00a0±\u00a0"  # no line break inside a figure
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "experiments"
TITLES = {"beauty": "Amazon Beauty", "sports": "Amazon Sports", "yelp": "Yelp", "ml-100k": "MovieLens 100K"}


def experiments() -> list[Path]:
    """The folders of the experiments, by name."""
    return sorted(path for path in FOLDER.glob("*") if (path / "tasks").is_dir())


def markdown(folder: Path) -> str:
    """The tables of an experiment."""
    title = TITLES.get(folder.name, folder.name)
    parts = [f"# Experiments: {title}\n", INTRODUCTION.format(name=folder.name)]
    for section in sections(folder):
        parts.append(f"## {section.title}\n")
        for block in section.blocks:
            if isinstance(block, Text):
                parts.append(f"{block.text}\n")
            if isinstance(block, Table):
                rows = [[cell.replace(" ± ", NARROW) for cell in row] for row in block.rows]
                parts += [f"**{block.caption}**\n", table(block.columns, rows)]
    return "\n".join(parts)


INTRODUCTION = """\
Made by [`cemg-experiment`](../experiments.md); the same tables
[with charts]({name}-report.html). Every number comes from a file in `results/experiments/{name}/`.
"""


def html(folder: Path) -> str:
    """The report of an experiment."""
    title = TITLES.get(folder.name, folder.name)
    return render(f"Experiments: {title}", sections(folder), kind="experiment")


def sections(folder: Path) -> list[Section]:
    """The sections of the questions that were planned, with the tasks that were not run."""
    store = Store(folder)
    tasks = {task.name: task for task in store.tasks()}
    questions = {name for names, _, _ in PLANNED[folder.name] for name in names}
    for names, seeds, splits in PLANNED[folder.name]:
        for task in plan(names, {folder.name: Path()}, seeds=seeds, splits=splits):
            tasks.setdefault(task.name, task)
    asked = [name for name in QUESTIONS if name in questions]
    return experiment_sections(store, list(tasks.values()), asked)
