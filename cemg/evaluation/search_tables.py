"""The studies of a run's search (``search.py``) as tables, made of what a result file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from cemg.evaluation.metrics import Metrics
from cemg.evaluation.search import DEPTHS


def search_tables(record: Mapping[str, Any]) -> list[Table]:
    """A table for each study that a result file holds."""
    makers: dict[str, Callable[[Any], Table]] = {
        "exact": _exact_table,
        "certificate": _certificate_table,
        "engines": _engine_table,
    }
    return [make(record[name]) for name, make in makers.items() if name in record]


def _exact_table(study: Mapping[str, Any]) -> Table:
    names = list(study["metrics"])
    table = _table(f"{study['users']:,} users, all items scored", ["ranking", *names])
    for label, suffix in (("", ""), (", history removed", "_history_removed")):
        exact, beam = study[f"metrics{suffix}"], study[f"beam_metrics{suffix}"]
        _metric_row(table, f"exact{label}", exact)
        _metric_row(table, f"{study['beams']} beams{label}", beam)
        table.add_row("- difference", *(f"{beam[name] - exact[name]:+.4f}" for name in names))
    lists = [
        f"the first {k}: {study[f'equal@{k}']:.1%} of lists exact, mean overlap {study[f'overlap@{k}']:.4f}"
        for k in DEPTHS
    ]
    certified = f"certified: {study['certified']:.1f} of {study['beams']} on average, "
    certified += f"{study['certified_wrong']} of all wrong"
    seconds, beam_seconds = (study[name] / study["users"] for name in ("seconds", "beam_seconds"))
    cost = f"{seconds:.3f} s a user, {beam_seconds:.3f} s with beams; "
    cost += f"scores differ by {study['worst_score_difference']:.1e} at most"
    table.caption = "\n".join([*lists, certified, cost])
    return table


def _certificate_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        f"proven, {rows[0]['users']:,} users", ["beams", "of the first 10", "of the list", "ms a user"]
    )
    for row in rows:
        each = 1e3 * row["seconds"] / row["users"]
        table.add_row(str(row["beams"]), f"{row['first_ten']:.1%}", f"{row['whole_list']:.1%}", f"{each:.1f}")
    return table


def _engine_table(study: Mapping[str, Any]) -> Table:
    engines = study["engines"]
    names = list(engines["cemg"]["metrics"])
    table = _table(f"{study['users']:,} users, {study['beams']} beams", ["engine", *names, "seconds"])
    for name, engine in engines.items():
        _metric_row(table, name, engine["metrics"], f"{engine['seconds']:.1f}")
    table.caption = (
        f"cemg is {study['times_as_fast']:.1f} times as fast; lists differ beyond ties for "
        f"{study['users_that_differ']} users, scores by {study['worst_score_difference']:.1e} at most"
    )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=0, caption_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _metric_row(table: Table, label: str, metrics: Metrics, *more: str) -> None:
    table.add_row(label, *(f"{value:.4f}" for value in metrics.values()), *more)
