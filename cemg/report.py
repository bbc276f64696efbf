"""The report of a run: what people would rather see than read, drawn from what the stages left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import FiniteFloat
from torch import Tensor

from cemg.errors import DamagedError, UserError
from cemg.evaluation import result_markdown, results_of
from cemg.storage import files
from cemg.storage.manifest import STAGES, Manifest, check_origin, verify
from cemg.storage.read import parse_json, read_bytes, read_json
from cemg.tokenizer import CONTENT, MODALITIES, Catalog, read_items

ALIKE = 1e-6  # values that differ by less, relatively, are the same up to rounding
TSNE_ITEMS = 2000  # t-SNE of more items takes minutes and shows no more
LOSSES = {  # title of a plot: its stage, and how the names it shows begin
    "LightGCN": ("graph", ("graph/bpr", "graph/l2")),
    "RQ-VAE": ("tokenizer", ("rqvae/loss", "rqvae/recon", "rqvae/commit")),
    "diversity loss": ("tokenizer", ("rqvae/diversity",)),
    "explained variance": ("tokenizer", ("rqvae/explained_",)),
    "perplexity": ("tokenizer", ("rqvae/perplexity_",)),
    "dead codes": ("tokenizer", ("rqvae/dead_",)),
    "generator": ("generator", ("generator/loss",)),
    "validation": ("generator", ("generator/ndcg@10",)),
}
LOGARITHMIC = ("LightGCN",)  # its l2 grows to a hundred times its bpr
PLOTS_A_ROW = 4


def write_report(run: Path) -> Path:
    """Draw ``run/report`` anew: losses, codebooks, t-SNE of z, attention, and ``report.md`` that ties them.

    A part whose stage is missing is left out, and the report says so.
    """
    fresh = run / ".report.part"
    shutil.rmtree(fresh, ignore_errors=True)
    files.make_folder(fresh)
    parts: dict[str, Callable[[Path, Path], str]] = {
        "Results": _results, "Stages": _stages, "Unique codes": _uniqueness, "Losses": _losses,
        "Codebooks": _codebooks, "Items by first code": _tsne, "Fusion": _fusion,
    }  # fmt: skip
    lines = [f"# {run.name}\n"]
    for title, draw in parts.items():
        lines.append(f"## {title}\n\n{_or_missing(draw, run, fresh)}\n")
    files.write_text(fresh / "report.md", "\n".join(lines))
    done = run / "report"
    files.replace_folder(fresh, done)
    return done


def _or_missing(draw: Callable[[Path, Path], str], run: Path, folder: Path) -> str:
    try:
        return draw(run, folder)
    except UserError as error:  # a drawing must not fail the run that it is made of
        return "Left out: " + " ".join(str(error).replace(str(run), "RUN").split())


def _results(run: Path, folder: Path) -> str:
    paths, wrong = results_of(run / "results", "*-test.json", generator=_generator_key(run))
    said = [f"Left out: {what.replace(str(run), 'RUN')}." for what in wrong]
    if paths:
        said.insert(0, result_markdown(paths))
    return "\n\n".join(said) or "No test has been run: `cemg-eval --run RUN`."


def _generator_key(run: Path) -> str:
    return Manifest.read(run / "generator").key if (run / "generator").exists() else ""


def _stages(run: Path, folder: Path) -> str:
    if not any((run / name).is_dir() for name in STAGES):
        return "Left out: no stage is finished."
    rows, said = ["| stage | seconds |", "|---|---:|"], []
    for name in STAGES:
        try:
            rows.append(f"| {name} | {_manifest(run, name).seconds} |")
        except UserError as error:
            said.append(f"Left out: {error.message.replace(str(run), 'RUN')}.")
    return "\n".join([*rows, "", *said])


def _manifest(run: Path, stage: str) -> Manifest:
    """The manifest of a stage. DamagedError where it is missing, altered or of other inputs."""
    if not (run / stage).is_dir():
        raise DamagedError(f"{run / stage} is missing")
    manifest = Manifest.read(run / stage)
    other = check_origin(lambda name: run / name, manifest)
    if other is not None:
        raise DamagedError(f"{run / stage} was not made of the {other} that is there now")
    return manifest


def _uniqueness(run: Path, folder: Path) -> str:
    facts = read_json(_file(run, "catalog", "uniqueness.json"), dict[str, int | float])
    rows = [f"| {name.replace('_', ' ')} | {_number(value)} |" for name, value in facts.items()]
    return "\n".join(["| codes | |", "|---|---:|", *rows])


def _file(run: Path, stage: str, name: str) -> Path:
    """The path of a file of a finished stage, verified."""
    _manifest(run, stage)
    verify(run / stage, (name,))
    return run / stage / name


def _number(value: float) -> str:
    return f"{value:.2%}" if isinstance(value, float) else str(value)


def _losses(run: Path, folder: Path) -> str:
    logs, said = {}, []
    for stage in dict.fromkeys(stage for stage, _ in LOSSES.values()):
        try:
            logs[stage] = _log_of(run, stage)
        except UserError as error:
            logs[stage] = []
            said.append(f"Left out: {error.message.replace(str(run), 'RUN')}.")
        else:
            said += [] if logs[stage] else [f"Left out: {stage}/log.jsonl is missing or empty."]
    shown = [title for title, (stage, names) in LOSSES.items() if _curves(logs[stage], names)]
    if shown:
        figure, axes = _figure(len(shown))
        for axis, title in zip(axes, shown, strict=True):
            stage, names = LOSSES[title]
            _plot(axis, _curves(logs[stage], names))
            axis.set_yscale("log" if title in LOGARITHMIC else "linear")
            axis.set_title(title)
            axis.set_xlabel("step" if stage == "generator" else "epoch")
        said.append(_saved(figure, folder, "losses.png"))
    return "\n\n".join(said)


def _log_of(run: Path, stage: str) -> list[dict[str, float]]:
    """The log of a stage, or of one that is still under way; empty where there is none."""
    if (run / stage).is_dir():
        return read_log(_file(run, stage, "log.jsonl"))
    path = run / f".{stage}.part" / "log.jsonl"
    return read_log(path) if path.is_file() else []


def _curves(log: list[dict[str, float]], beginnings: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) points of every name that begins so, in the order of the beginnings."""
    names = sorted({name for row in log for name in row})
    wanted = [name for begin in beginnings for name in names if name.startswith(begin)]
    return {name: [(row["step"], row[name]) for row in log if name in row] for name in wanted}


def _plot(axis: Any, curves: dict[str, list[tuple[float, float]]]) -> None:
    for name, points in curves.items():
        marker = "o" if len(points) < 3 else None  # a line of one point is invisible
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker)
    axis.legend(fontsize=7)


def _codebooks(run: Path, folder: Path) -> str:
    for name in Catalog.FILES:
        _file(run, "catalog", name)
    catalog = Catalog.load(run / "catalog")
    figure, axes = _figure(catalog.levels)
    for level, axis in enumerate(axes):
        counts = torch.bincount(catalog.codes[:, level], minlength=catalog.codebook_size)
        share = counts / counts.sum()
        perplexity = float(torch.exp(-torch.xlogy(share, share).sum()))
        axis.stairs(counts.sort(descending=True).values.numpy(), fill=True)
        axis.set_title(f"level {level}: perplexity {perplexity:.0f}, {int((counts == 0).sum())} dead")
        axis.set_xlabel("codes, most used first")
        axis.set_ylabel("items")
    return _saved(figure, folder, "codebooks.png")


def _tsne(run: Path, folder: Path) -> str:
    from sklearn.manifold import TSNE

    items = _items(run)
    rows = torch.randperm(len(items["z"]), generator=torch.Generator().manual_seed(0))[:TSNE_ITEMS]
    if len(rows) < 5:
        return f"Left out: {len(rows)} items are too few for t-SNE."
    perplexity, z = min(30.0, (len(rows) - 1) / 3), items["z"][rows].numpy()
    if np.ptp(z, axis=0).max() <= ALIKE * np.abs(z).max():  # scikit-learn crashes on it
        return "Left out: all items have the same z."
    start = "pca" if z.shape[1] > 1 else "random"  # PCA to two dimensions needs two
    flat = TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(z)
    figure, (axis,) = _figure(1)
    axis.scatter(*np.asarray(flat).T, c=items["codes"][rows, 0].numpy(), s=5, cmap="nipy_spectral")
    axis.set_title(f"t-SNE of z, {len(rows)} items, colour: first code")
    axis.set_axis_off()
    return _saved(figure, folder, "tsne.png")


def _fusion(run: Path, folder: Path) -> str:
    items = _items(run)
    facts = fusion_facts(items["attention"], items["present"])
    files.write_text(folder / "fusion.json", json.dumps(facts, indent=1, ensure_ascii=False))
    figure, (axis,) = _figure(1)
    for column, name in enumerate(CONTENT):
        axis.hist(items["attention"][:, column].numpy(), bins=50, range=(0, 1), alpha=0.6, label=name)
    axis.set_xlabel("α, the weight of a modality in an item")
    axis.set_ylabel("items")
    axis.legend()
    has = ", ".join(f"{name} {count}" for name, count in facts["present"].items())
    said = f"{facts['verdict']} Of {facts['items']} items these many have: {has}."
    return f"{said}\n\n{_saved(figure, folder, 'attention.png')}"


def fusion_facts(attention: Tensor, present: Tensor) -> dict[str, Any]:
    """Presence of each modality, mean and spread of α (``attention`` [N, 2]), and whether α says anything.

    α is constant where no item has both an image and a text: there is nothing to weigh.
    """
    has = {name: int(present[:, i].sum()) for i, name in enumerate(MODALITIES)}
    both = present[:, 0] & present[:, 1]
    spread = float(attention[both, 0].std(correction=0)) if bool(both.any()) else 0.0
    verdict = (
        f"α differs from item to item: its standard deviation is {spread:.3f} over {int(both.sum())} items."
    )
    if not bool(both.any()):
        verdict = "α is constant: no item has both an image and a text, so there is nothing to weigh."
        verdict += "".join(f" It is 1 on {name} for {has[name]} items." for name in CONTENT if has[name])
    elif spread < 1e-3:
        verdict = f"α is all but constant (standard deviation {spread:.1e}): the query decides nothing."
    return {
        "verdict": verdict,
        "items": len(present),
        "present": has,
        "mean_alpha": {name: float(attention[:, i].mean()) for i, name in enumerate(CONTENT)},
        "alpha_std_where_both": spread,
    }


def _items(run: Path) -> dict[str, Tensor]:
    return read_items(_file(run, "tokenizer", "items.safetensors"))


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a ``log.jsonl``; a line torn by a killed run is passed over, a step logged twice kept once."""
    rows: dict[tuple[float, tuple[str, ...]], dict[str, float]] = {}
    for line in read_bytes(path).splitlines():
        try:
            row = parse_json(line, dict[str, FiniteFloat], name=str(path))
        except DamagedError:
            continue
        if "step" in row:
            rows[(row["step"], tuple(sorted(row)))] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def _figure(plots: int) -> tuple[Figure, list[Any]]:
    """A figure of its own, outside pyplot's register, with so many axes in rows of PLOTS_A_ROW."""
    columns = min(plots, PLOTS_A_ROW)
    rows = -(-plots // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(plots)]


def _saved(figure: Figure, folder: Path, name: str) -> str:
    with files.durable(folder / name) as part:
        figure.savefig(part, dpi=110, format="png")
    return f"![{name}]({name})"
