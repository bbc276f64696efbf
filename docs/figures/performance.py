"""Draws the figures of docs/performance.md from what ``bench/latency.py`` wrote.

python bench/latency.py --models tiger --profile runs/profile
python docs/figures/performance.py trace runs/profile/tiger-B1-W50.json docs/figures/trace.png
python docs/figures/performance.py growth bench/results/latency-growth-cpu.json docs/figures/growth.png
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LANES = {  # a lane of the timeline, and the names of the events in it
    "steps": r"decode: ",
    "projections": r"projection$",
    "feed-forward": r"feed-forward$",
    "attention": r"attention$|packing$",
    "head": r"head$",
    "norms, rotation, embedding": r"norm$|rotation$|embedding$",
    "selection": r"trie_beam_step",
}
AXES = {"items": r" N(1e\+\d+)", "beams": r" W(\d+)", "batch": r" B(\d+)", "history": r" H(\d+)"}


def last_run(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Begin and end of the last recorded search, in microseconds."""
    begin = max(e["ts"] for e in events if e["name"] == "decode: prompt and first code")
    return begin, max(e["ts"] + e["dur"] for e in events if e["name"] == "trie_beam_step")


def draw_trace(source: Path, target: Path) -> None:
    """A timeline of one search: a lane a kind of work."""
    events = [e for e in json.loads(source.read_text())["traceEvents"] if e.get("ph") == "X"]
    begin, end = last_run(events)
    shown = [e for e in events if begin <= e["ts"] < end]
    figure, axes = plt.subplots(figsize=(11, 3.4), layout="constrained")
    labels = []
    for lane, (name, pattern) in enumerate(LANES.items()):
        own = [e for e in shown if re.match(pattern, e["name"]) and "encoder" not in e["name"]]
        bars = [((e["ts"] - begin) / 1e3, e["dur"] / 1e3) for e in own]
        axes.broken_barh(bars, (-lane - 0.4, 0.8), color=f"C{lane}")
        labels.append(name if lane == 0 else f"{name}  {sum(width for _, width in bars):.1f} ms")
        for event, (left, width) in zip(own, bars, strict=True):
            if lane == 0:
                axes.text(left + width / 2, 0, event["name"][8:], ha="center", va="center", fontsize=7)
    axes.set_yticks([-lane for lane in range(len(LANES))], labels)
    axes.set(xlabel="milliseconds, with the profiler's own cost", title=source.stem.replace("-", " "))
    figure.savefig(target, dpi=150)


def draw_growth(source: Path, target: Path) -> None:
    """Our median over one thing at a time, from one user, 50 beams, 20 items of history, 12,101 items."""
    rows = {row["case"]: row["p50_ms"] for row in json.loads(source.read_text())["rows"]}
    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 3.2), layout="constrained")
    for panel, (axis, pattern) in zip(panels, AXES.items(), strict=True):
        for model in dict.fromkeys(case.split()[0] for case in rows):
            points = sorted(points_of(rows, model, axis, pattern))
            panel.plot([x for x, _ in points], [y for _, y in points], "o-", label=model)
        panel.set(xlabel=axis, ylim=(0, None), ylabel="milliseconds a batch" if axis == "items" else "")
        if axis == "items":
            panel.set_xscale("log")
    panels[0].legend(fontsize=8)
    figure.savefig(target, dpi=150)


def points_of(rows: dict[str, float], model: str, axis: str, pattern: str) -> list[tuple[float, float]]:
    """(value of the axis, ms) of the cells that differ from the base in this axis alone."""
    base = {"batch": " B1", "beams": " W50"}
    found = []
    for case, median in rows.items():
        others = re.sub(pattern, "", case)
        plain = model + "".join(text for name, text in base.items() if name != axis)
        if others == plain and (re.search(pattern, case) or axis == "history"):
            match = re.search(pattern, case)
            found.append((float(match.group(1)) if match else 20.0, median))
    return found


if __name__ == "__main__":
    {"trace": draw_trace, "growth": draw_growth}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
