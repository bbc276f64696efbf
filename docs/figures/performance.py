"""Draws the figures of docs/performance-cpu.md from the result files of the scripts in ``bench/``.

python bench/latency.py --models tiger --profile runs/profile
python docs/figures/performance.py trace runs/profile/tiger-B1-W50.json docs/figures/trace.png
python docs/figures/performance.py growth bench/results docs/figures/growth.png
python docs/figures/performance.py operations bench/results docs/figures/operations.png
python docs/figures/performance.py latency bench/results docs/figures/latency.png
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

LANES = {  # lane of the timeline: pattern of the event names in it
    "steps": r"decode: ",
    "projections": r"projection$",
    "feed-forward": r"feed-forward$",
    "attention": r"attention$|packing$",
    "head": r"head$",
    "norms, rotation, embedding": r"norm$|rotation$|embedding$",
    "selection": r"trie_beam_step",
}
DICT_TRIE = "transformers + dict trie"
AXES = {"items": r" N(1e\+\d+)", "beams": r" W(\d+)", "batch": r" B(\d+)", "history": r" H(\d+)"}

OPERATIONS = {  # result file: the case that is drawn
    "quantize-cpu.json": "N 100,000 D 64 K 256 M 4",
    "trie-step-cpu.json": "K 256 N 1e+06",
    "propagate-cpu.json": "Gowalla-shaped, forward",
    "trie-build-cpu.json": "N 1e+06 K 256, sorting included",
}


def last_run(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Returns begin and end of the last recorded search, in microseconds."""
    begin = max(e["ts"] for e in events if e["name"] == "decode: prefill")
    return begin, max(e["ts"] + e["dur"] for e in events if e["name"] == "trie_beam_step")


def draw_trace(source: Path, target: Path) -> None:
    """Draws a timeline of one search, one lane per kind of work."""
    events = [e for e in json.loads(source.read_text())["traceEvents"] if e.get("ph") == "X"]
    begin, end = last_run(events)
    shown = [e for e in events if begin <= e["ts"] < end]
    figure, axes = plt.subplots(figsize=(11, 3.4), layout="constrained")
    labels = []
    for lane, (name, pattern) in enumerate(LANES.items()):
        events_of_lane = [e for e in shown if re.match(pattern, e["name"]) and "encoder" not in e["name"]]
        bars = [((e["ts"] - begin) / 1e3, e["dur"] / 1e3) for e in events_of_lane]
        axes.broken_barh(bars, (-lane - 0.4, 0.8), color=f"C{lane}")
        labels.append(name if lane == 0 else f"{name}  {sum(width for _, width in bars):.1f} ms")
        for event, (left, width) in zip(events_of_lane, bars, strict=True):
            if lane == 0:
                axes.text(left + width / 2, 0, event["name"][8:], ha="center", va="center", fontsize=7)
    axes.set_yticks([-lane for lane in range(len(LANES))], labels)
    axes.set(xlabel="milliseconds, including the cost of the profiler", title=source.stem.replace("-", " "))
    figure.savefig(target, dpi=150)


def draw_growth(folder: Path, target: Path) -> None:
    """Draws medians (``latency-full*.json``) over items, beams, batch and history, one at a time.

    The others stay at one user, 50 beams, a history of 20 items and a catalog of 12,101 items.
    ``generate`` with a dict trie is drawn where it was measured.
    """
    files = sorted(folder.glob("latency-full*.json"))
    rows = [row for file in files for row in rows_of(file) if row["p50_ms"] is not None]
    ours = {row["case"]: row["p50_ms"] for row in rows}
    theirs = {row["case"]: row["peer_p50_ms"] for row in rows if row["peer"] == DICT_TRIE and row["ratio"]}
    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 3.6), layout="constrained", sharey=True)
    for panel, (axis, pattern) in zip(panels, AXES.items(), strict=True):
        for number, model in enumerate(dict.fromkeys(case.split()[0] for case in ours)):
            for medians, line, who in ((ours, "o-", "CEMG"), (theirs, "x:", DICT_TRIE)):
                points = sorted(points_of(medians, model, axis, pattern))
                if len(points) > 1:
                    panel.plot([x for x, _ in points], [y for _, y in points], line, color=f"C{number}",
                               label=f"{model}, {who}", markersize=4)  # fmt: skip
        panel.set(xlabel=axis, yscale="log", ylabel="milliseconds per batch" if axis == "items" else "")
        if axis in ("items", "batch"):
            panel.set_xscale("log")
    drawn = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(handles=list(drawn.values()), fontsize=7, ncols=5, loc="outside lower center")
    figure.savefig(target, dpi=150)


def rows_of(source: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(source.read_text())["rows"]
    return rows


def draw_operations(folder: Path, target: Path) -> None:
    """Draws one panel per operation: medians of backends and peers over our fastest, and the floor."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 5), layout="constrained")
    for panel, (name, case) in zip(panels.flat, OPERATIONS.items(), strict=True):
        rows = [row for row in rows_of(folder / name) if row["case"] == case and row["p50_ms"] is not None]
        ours = {f"CEMG, {row['backend']}": row["p50_ms"] for row in rows}
        peers = {row["peer"]: row["peer_p50_ms"] for row in rows if row["peer_p50_ms"] is not None}
        best, floor = min(ours.values()), rows[0]["floor_ms"]
        bars = sorted((ours | peers).items(), key=lambda pair: pair[1], reverse=True)
        for row, (who, median) in enumerate(bars):
            label = f" {brief(median)} ms, {brief(median / best)} ×"
            panel.barh(row, median / best, color="C0" if who in ours else "0.7")
            panel.text(median / best, row, label, va="center", fontsize=7)
        panel.axvline(floor / best, color="black", linestyle="dashed", label="floor")
        panel.set_yticks(range(len(bars)), [who for who, _ in bars], fontsize=7)
        panel.set_title(f"{rows[0]['op']}: {case}", fontsize=9)
        left, right = 0.8 * min(floor, best) / best, bars[0][1] / best
        panel.set(xscale="log", xlim=(left, right * (right / left) ** 0.4))  # room for the labels
        panel.tick_params(axis="x", labelsize=7)
    panels.flat[0].legend(fontsize=7, loc="upper right")
    figure.supxlabel("median, as a multiple of our fastest", fontsize=8)
    figure.savefig(target, dpi=150)


def brief(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def points_of(rows: dict[str, float], model: str, axis: str, pattern: str) -> list[tuple[float, float]]:
    """Returns (value of the axis, ms) of the cells that differ from the base only in this axis."""
    base = {"batch": " B1", "beams": " W50"}
    points = []
    for case, median in rows.items():
        others = re.sub(pattern, "", case)
        plain = model + "".join(text for name, text in base.items() if name != axis)
        if others == plain and (re.search(pattern, case) or axis == "history"):
            match = re.search(pattern, case)
            points.append((float(match.group(1)) if match else 20.0, median))
    return points


def draw_latency(folder: Path, target: Path) -> None:
    """Draws the latency of each cell and engine, as ``bench/latency.py`` does after a run."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    from latency import latency_plot

    result = json.loads((folder / "latency-cpu.json").read_text())
    machine = result["machine"]
    latency_plot(result["rows"], target, cpu=machine["cpu"], threads=machine["threads"])


DRAWINGS = {
    "trace": draw_trace,
    "growth": draw_growth,
    "operations": draw_operations,
    "latency": draw_latency,
}

if __name__ == "__main__":
    DRAWINGS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
