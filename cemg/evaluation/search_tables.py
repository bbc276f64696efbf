"""Tables of the studies of a search (see ``search.py``), made from a result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from cemg.evaluation.metrics import Metrics
from cemg.evaluation.search import DEPTHS


def search_tables(record: Mapping[str, Any]) -> list[Table]:
    """Build a table for each study in a result file."""
    makers: dict[str, Callable[[Any, str], Table]] = {
        "exact": _exact_table,
        "certificate": _certificate_table,
        "engines": _engine_table,
    }
    normalize = f"normalize={record.get('studies_normalize')}"
    return [make(record[name], normalize) for name, make in makers.items() if name in record]


def _exact_table(study: Mapping[str, Any], normalize: str) -> Table:
    names = list(study["metrics"])
    table = _table(f"{study['users']:,} users, all items scored, {normalize}", ["ranking", *names])
    for label, suffix in (("", ""), (", history removed", "_history_removed")):
        exact, beam = study[f"metrics{suffix}"], study[f"beam_metrics{suffix}"]
        _metric_row(table, f"exact{label}", exact)
        _metric_row(table, f"{study['beams']} beams{label}", beam)
        table.add_row("- difference", *(f"{beam[name] - exact[name]:+.4f}" for name in names))
    lists = [
        f"the first {k}: {study[f'equal@{k}']:.1%} of lists exact, mean overlap {study[f'overlap@{k}']:.4f}"
        for k in DEPTHS
    ]
    certified = f"certified: {study['certified']:.1f} of {study['beams']} results on average; "
    certified += f"wrongly certified in total: {study['certified_wrong']}"
    milliseconds, beam_milliseconds = (
        1e3 * study[name] / study["users"] for name in ("seconds", "beam_seconds")
    )
    cost = f"{milliseconds:.1f} ms per user, {beam_milliseconds:.1f} with beams; "
    cost += f"scores differ by at most {study['worst_score_difference']:.1e}"
    table.caption = "\n".join([*lists, certified, cost])
    return table


def _certificate_table(rows: Sequence[Mapping[str, Any]], normalize: str) -> Table:
    columns = ["beams", "of the first 10", "of the whole list", "ms per user"]
    table = _table(f"share that is certified, {rows[0]['users']:,} users, {normalize}", columns)
    for row in rows:
        each = 1e3 * row["seconds"] / row["users"]
        table.add_row(str(row["beams"]), f"{row['first_ten']:.1%}", f"{row['whole_list']:.1%}", f"{each:.1f}")
    return table


def _engine_table(study: Mapping[str, Any], normalize: str) -> Table:
    engines = study["engines"]
    names = list(engines["cemg"]["metrics"])
    title = f"{study['users']:,} users, {study['beams']} beams, {normalize}"
    table = _table(title, ["engine", *names, "seconds"])
    for name, engine in engines.items():
        _metric_row(table, name, engine["metrics"], f"{engine['seconds']:.1f}")
    table.caption = (
        f"cemg is {study['times_as_fast']:.1f} times as fast; lists differ beyond ties for "
        f"{study['users_that_differ']} users, scores by at most {study['worst_score_difference']:.1e}"
    )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=0, caption_justify="left")
    for column, name in enumerate(columns):
        table.add_column(name, justify="left" if column == 0 else "right", no_wrap=True)
    return table


def _metric_row(table: Table, label: str, metrics: Metrics, *more: str) -> None:
    table.add_row(label, *(f"{value:.4f}" for value in metrics.values()), *more)
