"""Draws pipeline.png, the README's figure: python docs/figures/pipeline.py"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BOXES = {  # name: (x, y, text)
    "image": (0, 2, "images\nVGG → PCA"),
    "text": (0, 1, "texts\nBERT → PCA"),
    "graph": (0, 0, "interactions\nLightGCN"),
    "fusion": (1.6, 1, "fusion\nguided by the graph"),
    "rqvae": (3.2, 1, "RQ-VAE\n4 codes an item"),
    "catalog": (4.8, 1, "catalog\ntrie of real items"),
    "history": (4.8, 0, "history\n<a_12><b_7><c_1><d_9> …"),
    "generator": (6.6, 0.5, "generator\nT5 or decoder"),
    "decoding": (8.2, 0.5, "beam search\nunder the trie"),
}
ARROWS = [
    ("image", "fusion"), ("text", "fusion"), ("graph", "fusion"), ("fusion", "rqvae"), ("rqvae", "catalog"),
    ("catalog", "generator"), ("history", "generator"), ("generator", "decoding"),
]  # fmt: skip


def draw(path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for x, y, text in BOXES.values():
        axis.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.5", "fc": "#e8eef7"},
        )
    for start, end in ARROWS:
        (x0, y0, _), (x1, y1, _) = BOXES[start], BOXES[end]
        arrow = {"arrowstyle": "->", "shrinkA": 52, "shrinkB": 52}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
    axis.set_xlim(-0.8, 9.0)
    axis.set_ylim(-0.6, 2.6)
    axis.set_axis_off()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
