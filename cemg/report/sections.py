"""The sections of a report, each made from the files of one or two stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from cemg.artifacts import own_settings
from cemg.config import RunConfig
from cemg.errors import UserError
from cemg.evaluation import read_result, result_rows
from cemg.progress import printable
from cemg.report.blocks import Block, Chart, Charts, ItemMap, Point, Table, Text
from cemg.report.charts import bar_chart, histogram, line_chart
from cemg.report.logs import Log, curves_of, read_log, steps_per_epoch
from cemg.report.sources import (
    catalog_of,
    dataset_of,
    file_of,
    items_of,
    left_out,
    manifest_of,
    or_left_out,
    test_results,
)
from cemg.settings import flat
from cemg.storage.manifest import STAGES
from cemg.storage.read import read_json
from cemg.storage.run import Run
from cemg.tokenizer import CONTENT, MODALITIES, Catalog

SAME_Z = 1e-6  # values that differ by less, relative to the largest, are equal up to rounding
MAP_ITEMS = 2000  # t-SNE of more items takes minutes and shows no more
MAP_SIDE = 1000  # units of the map's view box
CURVES = {  # title of a chart: its stage, and the prefixes of the logged names that it shows
    "LightGCN": ("graph", ("graph/bpr", "graph/l2")),
    "RQ-VAE": ("tokenizer", ("rqvae/loss", "rqvae/recon", "rqvae/commit")),
    "Diversity loss": ("tokenizer", ("rqvae/diversity",)),
    "Contrastive loss": ("tokenizer", ("rqvae/collab",)),
    "Explained variance": ("tokenizer", ("rqvae/explained_",)),
    "Perplexity": ("tokenizer", ("rqvae/perplexity_",)),
    "Dead codes": ("tokenizer", ("rqvae/dead_",)),
    "Generator": ("generator", ("generator/loss",)),
    "Validation": ("generator", ("generator/ndcg@10",)),
}
LOG_SCALE = ("LightGCN",)  # its l2 grows to a hundred times its bpr
TERMS = {  # title of a chart: what it shows, for readers who do not know the term
    "Explained variance": "Explained variance is the share of the variance of the item features that the "
    "RQ-VAE reconstructs from the codes.",
    "Perplexity": "Perplexity is the number of codes of a level that are used, weighted by their frequency; "
    "at most the size of the codebook.",
    "Dead codes": "Dead codes are codes that no item uses.",
}


def run_section(run: Path) -> list[Block]:
    """The data, the command, the hardware, and the settings that differ from the defaults."""
    return [
        *or_left_out(_data_facts, run),
        *or_left_out(_test_facts, run),
        *or_left_out(_changed_settings, run),
    ]


def _data_facts(run: Path) -> list[Block]:
    data = dataset_of(run)
    stats = data.stats()
    rows = [
        ["name", printable(data.name) + (" (synthetic)" if data.synthetic else "")],
        ["users", f"{data.num_users:,}"],
        ["items", f"{data.num_items:,}"],
        ["interactions", f"{data.num_interactions:,} ({stats['avg_length']:.1f} per user)"],
        ["density", f"{1 - stats['sparsity']:.3%}"],
        ["items with a text", f"{sum(text is not None for text in data.texts):,}"],
        ["items with an image", f"{sum(image is not None for image in data.images):,}"],
    ]
    return [Table("Data", [], rows), *(Text(f"Note on the data: {printable(note)}.") for note in data.notes)]


def _test_facts(run: Path) -> list[Block]:
    records = [read_result(path) for path in test_results(run)[0] if "popularity" not in path.name]
    if not records:
        return [left_out(run, "command and hardware, which are part of the result of a test")]
    command, hardware = records[0].get("command", "unknown"), records[0].get("hardware")
    machine = ", ".join(f"{name} {value}" for name, value in hardware.items()) if hardware else "unknown"
    return [
        Table("Evaluation run", [], [["command", printable(str(command))], ["hardware", printable(machine)]])
    ]


def _changed_settings(run: Path) -> list[Block]:
    own, default = flat(own_settings(Run(run)).to_dict()), flat(RunConfig().to_dict())
    rows = [[n, printable(str(own[n])), str(default.get(n))] for n in own if own[n] != default.get(n)]
    if not rows:
        return [Text("All settings have their default values.")]
    return [Table("Settings that differ from the defaults", ["setting", "value", "default"], rows)]


def results_section(run: Path) -> list[Block]:
    """HR and NDCG of the model and of popularity, with the history kept, removed and excluded."""
    paths, wrong = test_results(run)
    blocks: list[Block] = [left_out(run, reason) for reason in wrong]
    if paths:
        board = result_rows(paths)
        blocks = [Table(board.title, board.columns, board.rows), *_cold_targets(paths), *blocks]
    return blocks or [Text("No test has been run: cemg-eval --run RUN.")]


def _cold_targets(paths: Sequence[Path]) -> list[Block]:
    """What the rows of cold targets count, from the first result that has them."""
    cold = next((c for c in (read_result(path).get("cold") for path in paths) if c), None)
    if not cold or not {"targets", "at_most_training_interactions"} <= cold.keys():
        return []
    return [
        Text(
            f"Cold targets: {cold['targets']:,} test items with at most "
            f"{cold['at_most_training_interactions']} training interactions."
        )
    ]


def stages_section(run: Path) -> list[Block]:
    """Wall-clock seconds of each stage."""
    if not any((run / name).is_dir() for name in STAGES):
        return [left_out(run, "no stage is finished")]
    rows, missing = [], []
    for name in STAGES:
        try:
            rows.append([name, f"{manifest_of(run, name).seconds:,.2f}"])
        except UserError as error:
            missing.append(left_out(run, error.message))
    return [Table("Seconds per stage", ["stage", "seconds"], rows), *missing]


def losses_section(run: Path) -> list[Block]:
    """Losses and validation metrics of the three trained stages, over epochs."""
    logs: dict[str, Log] = {}
    missing: list[Block] = []
    for stage in dict.fromkeys(stage for stage, _ in CURVES.values()):
        try:
            logs[stage] = _log_of(run, stage)
        except UserError as error:
            logs[stage] = []
            missing.append(left_out(run, error.message))
        else:
            missing += [] if logs[stage] else [left_out(run, f"{stage}/log.jsonl is missing or empty")]
    epoch_steps = _generator_steps_per_epoch(run, logs["generator"])
    charts, terms = [], []
    for title, (stage, prefixes) in CURVES.items():
        steps = epoch_steps if stage == "generator" else 1.0
        curves = curves_of(logs[stage], prefixes, steps_per_epoch=steps or 1.0)
        if curves:
            x_label = "epoch" if steps else "step"
            charts.append(line_chart(title, curves, x_label=x_label, log_scale=title in LOG_SCALE))
            terms += [TERMS[title]] if title in TERMS else []
    blocks: list[Block] = [Text(" ".join(terms))] if terms else []
    blocks += [Charts(charts)] if charts else []
    return [*blocks, *or_left_out(_best_epoch, run), *missing]


def _best_epoch(run: Path) -> list[Block]:
    training = _training_of(run)
    best, epochs, score = (training.get(name) for name in ("best_epoch", "epochs", "validation_ndcg10"))
    if score is None:
        return []
    return [
        Text(f"The generator has the weights of epoch {best} of {epochs}: validation NDCG@10 {score:.4f}.")
    ]


def _training_of(run: Path) -> dict[str, int | float | str]:
    """How the training of the generator ended."""
    return read_json(file_of(run, "generator", "training.json"), dict[str, int | float | str])


def _log_of(run: Path, stage: str) -> Log:
    """The log of a stage, or of one that is still being trained; empty where there is none."""
    if (run / stage).is_dir():
        return read_log(file_of(run, stage, "log.jsonl"))
    path = run / f".{stage}.part" / "log.jsonl"
    return read_log(path) if path.is_file() else []


def _generator_steps_per_epoch(run: Path, log: Log) -> float | None:
    """None where the number of epochs is not known, as during a training."""
    try:
        epochs = _training_of(run).get("epochs", 1)
    except UserError:
        return None
    return steps_per_epoch(log, int(epochs))


def codebooks_section(run: Path) -> list[Block]:
    """How often each code is used, per level, and how many items collided before codes were made unique."""
    catalog = catalog_of(run)
    charts = [_codebook_chart(catalog, level) for level in range(catalog.levels)]
    return [Charts(charts), *or_left_out(_uniqueness, run)]


def _codebook_chart(catalog: Catalog, level: int) -> Chart:
    counts = torch.bincount(catalog.codes[:, level], minlength=catalog.codebook_size)
    shares = counts / counts.sum()
    perplexity = float(torch.exp(-torch.xlogy(shares, shares).sum()))
    used = int((counts > 0).sum())
    title = f"Level {level}: {used / len(counts):.0%} of {len(counts)} codes used"
    described = f"Level {level}: {used} of {len(counts)} codes are used; the perplexity is {perplexity:.0f}"
    return bar_chart(
        f"{title}, perplexity {perplexity:.0f}",
        counts.sort(descending=True).values.numpy(),
        x_label="codes, most used first",
        y_label="items",
        description=described,
    )


def _uniqueness(run: Path) -> list[Block]:
    counts = read_json(file_of(run, "catalog", "uniqueness.json"), dict[str, int | float])
    rows = [[name.replace("_", " "), _count_or_share(value)] for name, value in counts.items()]
    explained = (
        "Items with equal codes collide and get other last codes. Moved items are those that got other first "
        "codes too, since all last codes after their own first codes were taken."
    )
    return [Table("Collisions", [], rows), Text(explained)]


def _count_or_share(value: float) -> str:
    return f"{value:.2%}" if isinstance(value, float) else f"{value:,}"


def map_section(run: Path) -> list[Block]:
    """The items in two dimensions: t-SNE of their latent vectors z."""
    items = items_of(run)
    total = len(items["z"])
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MAP_ITEMS]
    if len(rows) < 5:
        return [left_out(run, f"{len(rows)} items are too few for t-SNE")]
    z = items["z"][rows].numpy()
    if np.ptp(z, axis=0).max() <= SAME_Z * np.abs(z).max():  # scikit-learn crashes on it
        return [left_out(run, "all items have the same z")]
    shown = f"{total:,} items" if len(rows) == total else f"a random {len(rows):,} of {total:,} items"
    described = f"t-SNE of the latent vectors of {shown}. The color is the first code."
    points, notes = _points(run, rows, items["codes"][rows], _flattened(z))
    return [ItemMap(described, MAP_SIDE, points), *notes]


def _flattened(z: np.ndarray) -> np.ndarray:
    """t-SNE of z [n, D] in units of the map, [n, 2] integers."""
    from sklearn.manifold import TSNE

    start = "pca" if z.shape[1] > 1 else "random"  # PCA to two dimensions needs two
    perplexity = min(30.0, (len(z) - 1) / 3)
    flat_z = np.asarray(TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(z))
    low, extent = flat_z.min(axis=0), max(float(np.ptp(flat_z, axis=0).max()), 1e-12)
    margin = MAP_SIDE // 50
    places: np.ndarray = ((flat_z - low) / extent * (MAP_SIDE - 2 * margin) + margin).round().astype(int)
    return places


def _points(run: Path, rows: Tensor, codes: Tensor, places: np.ndarray) -> tuple[list[Point], list[Block]]:
    """One point per item of ``rows``; without the data set, labels have codes only and a note says so."""
    labels, notes = [f"item {row}" for row in rows.tolist()], list[Block]()
    try:
        data = dataset_of(run)
        labels = [f"{data.titles[row] or 'no title'} · {data.item_ids[row]}" for row in rows.tolist()]
    except (UserError, IndexError) as error:
        reason = error.message if isinstance(error, UserError) else "the data has fewer items"
        notes.append(left_out(run, f"titles on the map: {reason}"))
    palette = matplotlib.colormaps["hsv"]
    levels = max(int(codes[:, 0].max()) + 1, 1)
    points = [
        Point(int(x), int(y), matplotlib.colors.to_hex(palette(code[0] / levels)), _label(label, code))
        for label, code, (x, y) in zip(labels, codes.tolist(), places, strict=True)
    ]
    return points, notes


def _label(title: str, code: list[int]) -> str:
    return f"{printable(title)} · codes {', '.join(map(str, code))}"


def fusion_section(run: Path) -> list[Block]:
    """The weights that the fusion gives to images and texts."""
    items = items_of(run)
    facts = fusion_facts(items["attention"], items["present"])
    counts = ", ".join(f"{name} {count:,}" for name, count in facts["present"].items())
    if _concatenates(run):
        said = "Image, text and collaborative features are concatenated, so there are no weights."
        return [Text(f"{said} Items with each modality, of {facts['items']:,}: {counts}.")]
    shares = {name: items["attention"][:, column].numpy() for column, name in enumerate(CONTENT)}
    means = ", ".join(f"{name} {share:.3f}" for name, share in facts["mean_alpha"].items())
    chart = histogram(
        "Fusion weights",
        shares,
        x_label="α, the weight of a modality in an item",
        y_label="items",
        description=f"Histogram of the fusion weights. Mean: {means}.",
    )
    said = "α is the weight that the fusion gives to the image or the text of an item. "
    said += f"{facts['verdict']} Items with each modality, of {facts['items']:,}: {counts}. Mean α: {means}."
    return [Text(said), Charts([chart])]


def _concatenates(run: Path) -> bool:
    """Whether the fusion of a run has no weights. A run without settings is taken to have them."""
    try:
        return own_settings(Run(run)).tokenizer.fusion == "concat"
    except UserError:
        return False


def fusion_facts(attention: Tensor, present: Tensor) -> dict[str, Any]:
    """Counts of each modality, mean and spread of α, and whether α carries information.

    α is constant where no item has both an image and a text: there is nothing to weigh.

    Args:
        attention: [N, 2] float32, the weights α of image and text.
        present: [N, 3] bool, whether an item has an image, a text and a collaborative embedding.
    """
    counts = {name: int(present[:, i].sum()) for i, name in enumerate(MODALITIES)}
    both = present[:, 0] & present[:, 1]
    spread = float(attention[both, 0].std(correction=0)) if bool(both.any()) else 0.0
    verdict = f"α differs between items: its standard deviation is {spread:.3f} over {int(both.sum())} items."
    if not bool(both.any()):
        verdict = "α is constant: no item has both an image and a text, so there is nothing to weigh."
        verdict += "".join(
            f" It is 1 on {name} for {counts[name]} items." for name in CONTENT if counts[name]
        )
    elif spread < 1e-3:
        verdict = f"α is nearly constant (standard deviation {spread:.1e}): the query decides nothing."
    return {
        "verdict": verdict,
        "items": len(present),
        "present": counts,
        "mean_alpha": {name: float(attention[:, i].mean()) for i, name in enumerate(CONTENT)},
        "alpha_std_where_both": spread,
    }
