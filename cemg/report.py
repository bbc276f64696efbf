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
from safetensors.torch import load_file
from torch import Tensor

from cemg.evaluation import result_markdown
from cemg.tokenizer import CONTENT, MODALITIES, Catalog

TSNE_ITEMS = 2000  # t-SNE of more items takes minutes and shows no more
LOSSES = {
    "LightGCN": ("graph", ("graph/bpr",)),
    "RQ-VAE": ("tokenizer", ("rqvae/recon", "rqvae/commit", "rqvae/loss")),
    "generator": ("generator", ("generator/loss",)),
    "validation": ("generator", ("generator/ndcg@10",)),
}


def write_report(run: Path) -> Path:
    """Draw ``run/report`` anew: losses, codebooks, t-SNE of z, attention, and ``report.md`` that ties them.

    A part whose stage is missing is left out, and the report says so.
    """
    fresh = run / ".report.part"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    parts: dict[str, Callable[[Path, Path], str]] = {
        "Results": _results, "Stages": _stages, "Losses": _losses, "Codebooks": _codebooks,
        "Items by first code": _tsne, "Fusion": _fusion,
    }  # fmt: skip
    lines = [f"# {run.name}\n"]
    for title, draw in parts.items():
        lines.append(f"## {title}\n\n{_or_missing(draw, run, fresh)}\n")
    (fresh / "report.md").write_text("\n".join(lines))
    done = run / "report"
    shutil.rmtree(done, ignore_errors=True)
    fresh.replace(done)
    return done


def _or_missing(draw: Callable[[Path, Path], str], run: Path, folder: Path) -> str:
    try:
        return draw(run, folder)
    except FileNotFoundError as error:
        return f"Left out: {Path(str(error.filename)).name} is missing."


def _results(run: Path, folder: Path) -> str:
    paths = sorted((run / "results").glob("*-test.json"))
    return result_markdown(paths) if paths else "No test has been run: `cemg-eval --run RUN`."


def _stages(run: Path, folder: Path) -> str:
    rows = ["| stage | seconds |", "|---|---|"]
    for path in sorted(run.glob("*/manifest.json")):
        rows.append(f"| {path.parent.name} | {json.loads(path.read_text()).get('seconds', '')} |")
    unique = json.loads((run / "catalog" / "uniqueness.json").read_text())
    facts = (
        f"{unique['items']} items, {unique['colliding_before']} collided before their codes were parted and "
        f"{unique['colliding_after']} do now; {unique['changed_codes_share']:.2%} of the codes were changed."
    )
    return "\n".join([*rows, "", facts])


def _losses(run: Path, folder: Path) -> str:
    figure, axes = _figure(len(LOSSES))
    for axis, (title, (stage, names)) in zip(axes, LOSSES.items(), strict=True):
        log = read_log(run / stage / "log.jsonl")
        for name in names:
            points = [(row["step"], row[name]) for row in log if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step" if stage == "generator" else "epoch")
        axis.legend(fontsize=7)
    return _saved(figure, folder, "losses.png")


def _codebooks(run: Path, folder: Path) -> str:
    catalog = Catalog.load(run / "catalog")
    figure, axes = _figure(catalog.levels)
    for level, axis in enumerate(axes):
        counts = torch.bincount(catalog.codes[:, level], minlength=catalog.codebook_size)
        share = counts / counts.sum()
        perplexity = float(torch.exp(-torch.xlogy(share, share).sum()))
        axis.bar(range(len(counts)), counts.sort(descending=True).values.tolist(), width=1.0)
        axis.set_title(f"level {level}: perplexity {perplexity:.0f}, {int((counts == 0).sum())} dead")
        axis.set_xlabel("codes, most used first")
    return _saved(figure, folder, "codebooks.png")


def _tsne(run: Path, folder: Path) -> str:
    from sklearn.manifold import TSNE

    items = _items(run)
    rows = torch.randperm(len(items["z"]), generator=torch.Generator().manual_seed(0))[:TSNE_ITEMS]
    if len(rows) < 5:
        return "Left out: too few items."
    perplexity = min(30.0, (len(rows) - 1) / 3)
    flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(items["z"][rows].numpy())
    figure, (axis,) = _figure(1)
    axis.scatter(*np.asarray(flat).T, c=items["codes"][rows, 0].numpy(), s=5, cmap="nipy_spectral")
    axis.set_title(f"t-SNE of z, {len(rows)} items, colour: first code")
    axis.set_axis_off()
    return _saved(figure, folder, "tsne.png")


def _fusion(run: Path, folder: Path) -> str:
    items = _items(run)
    facts = fusion_facts(items["attention"], items["present"])
    (folder / "fusion.json").write_text(json.dumps(facts, indent=1))
    figure, (axis,) = _figure(1)
    for column, name in enumerate(CONTENT):
        axis.hist(items["attention"][:, column].numpy(), bins=50, range=(0, 1), alpha=0.6, label=name)
    axis.set_xlabel("α, the weight of a modality in an item")
    axis.set_ylabel("items")
    axis.legend()
    return f"{facts['verdict']}\n\n{_saved(figure, folder, 'attention.png')}"


def fusion_facts(attention: Tensor, present: Tensor) -> dict[str, Any]:
    """Presence of each modality, mean and spread of α (``attention`` [N, 2]), and whether α says anything.

    α is constant where no item has both an image and a text: there is nothing to weigh.
    """
    both = present[:, 0] & present[:, 1]
    spread = float(attention[both, 0].std(correction=0)) if bool(both.any()) else 0.0
    verdict = (
        f"α differs from item to item: its standard deviation is {spread:.3f} over {int(both.sum())} items."
    )
    if not bool(both.any()):
        verdict = "α is constant: no item has both an image and a text, so there is nothing to weigh."
    elif spread < 1e-3:
        verdict = f"α is all but constant (standard deviation {spread:.1e}): the query decides nothing."
    return {
        "verdict": verdict,
        "items": len(present),
        "present": {name: int(present[:, i].sum()) for i, name in enumerate(MODALITIES)},
        "mean_alpha": {name: float(attention[:, i].mean()) for i, name in enumerate(CONTENT)},
        "alpha_std_where_both": spread,
    }


def _items(run: Path) -> dict[str, Tensor]:
    path = run / "tokenizer" / "items.safetensors"
    path.stat()  # load_file's own error does not carry the name
    return load_file(path)


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a ``log.jsonl``; a line torn by a killed run is passed over, a step logged twice kept once."""
    rows: dict[tuple[float, tuple[str, ...]], dict[str, float]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[(row["step"], tuple(sorted(row)))] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def _figure(plots: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.2 * plots, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, plots, squeeze=False)[0])


def _saved(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=110)
    return f"![{name}]({name})"
