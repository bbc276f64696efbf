"""Draws pipeline.png, the figure of the README: ``python docs/figures/pipeline.py``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BOXES = {  # name: (x, y, text)
    "image": (0, 2, "images\nvision encoder → PCA"),
    "text": (0, 1, "texts\ntext encoder → PCA"),
    "graph": (0, 0, "interactions\nLightGCN"),
    "fusion": (1.7, 1, "fusion\nguided by the graph"),
    "rqvae": (3.3, 1, "RQ-VAE\n4 codes per item"),
    "catalog": (4.9, 1, "catalog\ntrie of all items"),
    "history": (4.9, 0, "history\n<a_12><b_7><c_1><d_9> …"),
    "generator": (6.8, 0, "generator\nT5 or decoder"),
    "decoding": (6.8, 1, "beam search\nconstrained by the trie"),
    "items": (8.3, 1, "next items\nall from the catalog"),
}
ARROWS = [
    ("image", "fusion"), ("text", "fusion"), ("graph", "fusion"), ("fusion", "rqvae"), ("rqvae", "catalog"),
    ("catalog", "history"), ("history", "generator"), ("generator", "decoding"), ("catalog", "decoding"),
    ("decoding", "items"),
]  # fmt: skip


def draw(path: Path) -> None:
    """Writes the figure to ``path``. Arrows end at the borders of their boxes."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xlim(-0.9, 9.3)
    axis.set_ylim(-0.5, 2.5)
    axis.set_axis_off()
    style = {"boxstyle": "round,pad=0.5", "fc": "#e8eef7"}
    drawn = {
        name: axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)
        for name, (x, y, text) in BOXES.items()
    }
    figure.canvas.draw()  # computes the sizes of the boxes, where the arrows end
    for start, end in ARROWS:
        rims = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        arrow = {"arrowstyle": "->", "shrinkA": 2, "shrinkB": 2, **rims}
        axis.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops=arrow)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
