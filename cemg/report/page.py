"""Writes the page of a report: ``RUN/report/report.html``, one file with everything inline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path

import jinja2

import cemg
from cemg.progress import printable
from cemg.report.blocks import Block, Section
from cemg.report.samples import samples_section
from cemg.report.sections import (
    codebooks_section,
    fusion_section,
    losses_section,
    map_section,
    results_section,
    run_section,
    stages_section,
)
from cemg.report.sources import or_left_out
from cemg.storage import files

PAGE = "report.html"


def write_report(run: Path, *, device: str = "cpu") -> Path:
    """Write the report of a run anew, and return the path of its page.

    A section whose files are missing or damaged says so, and the others are complete. ``device`` computes
    the sample recommendations. Raises StorageError where the disk is full or read-only.
    """
    builders: dict[str, Callable[[Path], list[Block]]] = {
        "Run": run_section,
        "Results": results_section,
        "Sample recommendations": partial(samples_section, device=device),
        "Stages": stages_section,
        "Losses": losses_section,
        "Codebooks": codebooks_section,
        "Item map": map_section,
        "Fusion": fusion_section,
    }
    sections = [Section(title, or_left_out(build, run)) for title, build in builders.items()]
    unfinished = run / ".report.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    files.make_folder(unfinished)
    files.write_text(unfinished / PAGE, render(printable(run.name), sections))
    files.replace_folder(unfinished, run / "report")
    return run / "report" / PAGE


def render(name: str, sections: list[Section], *, kind: str = "run") -> str:
    """The page as HTML. Every text of the sections is escaped. ``kind`` is what the report is of."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files("cemg.report").joinpath("page.html").read_text(encoding="utf-8")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.from_string(template).render(
        name=name, sections=sections, kind=kind, written=written, version=cemg.__version__
    )
