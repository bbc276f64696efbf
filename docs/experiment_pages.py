"""The pages of the experiments in results/experiments/: tables as Markdown, and the report with its charts.

`generate.py` writes docs/experiments/NAME.md, and `hooks.py` adds NAME-report.html to the site.
"""

from __future__ import annotations

from pathlib import Path

from speed_tables import table

from cemg.experiments import Store
from cemg.experiments.plan import QUESTIONS, Task
from cemg.experiments.report import experiment_sections
from cemg.report.blocks import Section, Table, Text
from cemg.report.page import render

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
    store = Store(folder)
    tasks = store.tasks()
    return experiment_sections(store, tasks, [name for name in QUESTIONS if _asked(name, tasks)])


def _asked(question: str, tasks: list[Task]) -> bool:
    """Whether a task belongs to this question and not only to rq1, whose tasks the others share."""
    own = {"rq2": "without ", "rq4": " = "}.get(question, "")
    return any(task.belongs_to(question) and own in task.variant for task in tasks)
