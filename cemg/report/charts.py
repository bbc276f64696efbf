"""Charts as inline SVG, drawn by matplotlib. Text and axes take the color of the page, so dark mode works."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from cycler import cycler
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cemg.report.blocks import Chart
from cemg.report.logs import Curve

INK = "#010203"  # replaced by the page's text color
PALETTE = ("#2f8fd8", "#e08214", "#1b9e77", "#d6457f", "#8e6fd1", "#9a8c2c", "#5f9ea0", "#b0604a")
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
STYLE: Any = {  # matplotlib types the keys as literals
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": True, "axes.axisbelow": True, "grid.color": INK, "grid.alpha": 0.12, "legend.frameon": False,
}  # fmt: skip


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    *,
    x_label: str = "epoch",
    log_scale: bool = False,
) -> Chart:
    """One line per curve, with the legend above the axes."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for name, curve in curves.items():
            marker = "o" if len(curve) < 30 else None  # a line through one point is invisible
            axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.4, marker=marker, markersize=3)
        axes.set_yscale("log" if log_scale else "linear")
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _add_legend(figure, len(curves))
        described = "; ".join(f"{name} from {c[0][1]:.4g} to {c[-1][1]:.4g}" for name, c in curves.items())
        return Chart(title, f"{title} by {x_label}: {described}", _svg(figure, title))


def interval_chart(
    title: str,
    rows: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    x_label: str,
) -> Chart:
    """One line per model with a dot per series, at a value with half the width of its interval.

    Args:
        title: Title of the chart.
        rows: Model: series: value and half the width of its interval.
        x_label: What the values are.
    """
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.0 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(rows))[::-1]
        for number, name in enumerate(series):
            shift = 0.12 * (number - (len(series) - 1) / 2)
            points = [
                (row[name], y - shift) for row, y in zip(rows.values(), places, strict=True) if name in row
            ]
            values, halves = zip(*(value for value, _ in points), strict=True)
            axes.errorbar(values, [y for _, y in points], xerr=halves, fmt="o", markersize=4, label=name)
        axes.set_yticks(places, labels=list(rows))
        axes.set(xlabel=x_label, ylim=(-0.6, len(rows) - 0.4))
        _add_legend(figure, len(series))
        described = "; ".join(
            f"{model} " + ", ".join(f"{value:.4f} {name}" for name, (value, _) in row.items())
            for model, row in rows.items()
        )
        return Chart(title, f"{x_label}: {described}", _svg(figure, title))


def bar_chart(title: str, heights: np.ndarray, *, x_label: str, y_label: str, description: str) -> Chart:
    """One bar per value, without gaps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        axes.stairs(heights, fill=True, color=PALETTE[0])
        axes.set(xlabel=x_label, ylabel=y_label)
        return Chart(title, description, _svg(figure, title))


def histogram(
    title: str, values: Mapping[str, np.ndarray], *, x_label: str, y_label: str, description: str
) -> Chart:
    """Overlaid histograms of shares from 0 to 1, with the legend above the axes."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for name, shares in values.items():
            axes.hist(shares, bins=50, range=(0, 1), alpha=0.6, label=name)
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1))
        _add_legend(figure, len(values))
        return Chart(title, description, _svg(figure, title))


def _figure() -> tuple[Figure, Any]:
    """A figure with one pair of axes, not registered with pyplot."""
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    return figure, figure.add_subplot()


def _add_legend(figure: Figure, entries: int) -> None:
    """A legend outside the axes: it covers no data."""
    figure.legend(loc="outside upper left", ncols=min(entries, 4), fontsize=8, handlelength=1.4)


def _svg(figure: Figure, salt: str) -> Markup:
    """The figure as an SVG element. ``salt`` keeps ids that the SVG refers to unique in the page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(text.getvalue())
    _drop(root, ("metadata", "style"))
    _drop_unused_ids(root)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")  # the element around it has the description
    return Markup(ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor"))


def _drop(element: ElementTree.Element, names: tuple[str, ...]) -> None:
    for child in list(element):
        if child.tag in {f"{{{SVG}}}{name}" for name in names}:
            element.remove(child)
        else:
            _drop(child, names)


def _drop_unused_ids(root: ElementTree.Element) -> None:
    """Remove the ids that nothing in the SVG refers to: they occur in every chart of the page."""
    values = [value for element in root.iter() for name, value in element.items() if name != "id"]
    used = {value.rpartition("#")[2].rstrip(")") for value in values if "#" in value}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
