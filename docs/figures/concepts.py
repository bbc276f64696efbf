"""Draws the figures of docs/concepts: ``python docs/figures/concepts.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cemg_kernels import residual_quantize

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, GREY = "#3b6fb6", "#d9822b", "#3a8f5c", "#b03a3a", "#9aa3ad"
CODES = [(0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (3, 3)]  # the items of the small examples
LOG_PROB = {  # of each code after each prefix, for the example of a beam search
    (): {0: -1.2, 1: -0.5, 3: -2.3},
    (0,): {1: -0.4, 3: -1.6},
    (1,): {0: -1.9, 2: -0.3, 3: -2.2},
    (3,): {3: -0.1},
}
WIDTH = 2


def new_figure(width: float, height: float, panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def draw_semantic_ids() -> Figure:
    """Two levels of residual quantization in the plane, by ``cemg_kernels.residual_quantize``."""
    generator = torch.Generator().manual_seed(4)
    books = torch.tensor([[[-2.0, 1.5], [2.2, 1.2], [0.2, -1.8]], [[-0.7, 0.3], [0.7, 0.4], [0.0, -0.7]]])
    choice = torch.randint(3, (2, 90), generator=generator)
    noise = 0.22 * torch.randn(90, 2, generator=generator)
    z = books[0][choice[0]] + books[1][choice[1]] + noise
    codes, _ = residual_quantize(z, books)
    shown, colors = 7, [BLUE, ORANGE, GREEN]
    figure, (left, right) = new_figure(9, 3.6, 2)
    residual = z - books[0][codes[:, 0]]
    for panel, points, level in ((left, z, 0), (right, residual, 1)):
        panel.scatter(
            points[:, 0], points[:, 1], c=[colors[int(c)] for c in codes[:, level]], s=14, alpha=0.6
        )
        panel.scatter(books[level][:, 0], books[level][:, 1], marker="*", s=190, c=colors, edgecolors="black")
        for code, (x, y) in enumerate(books[level].tolist()):
            panel.annotate(f"{'ab'[level]}_{code}", (x, y), xytext=(7, 7), textcoords="offset points")
        panel.scatter(
            points[shown, 0], points[shown, 1], s=90, facecolors="none", edgecolors="black", linewidths=1.5
        )
        panel.set_aspect("equal", "datalim")
        panel.tick_params(labelsize=8)
    first, second = codes[shown].tolist()
    left.set_title("level 1: the vector of each item", fontsize=10)
    right.set_title("level 2: what level 1 left over", fontsize=10)
    figure.supxlabel(f"The circled item has the semantic ID <a_{first}><b_{second}>", fontsize=10)
    return figure


def tree_places() -> dict[tuple[int, ...], tuple[float, float]]:
    """Where each prefix of CODES is drawn: leaves in a row, parents above the middle of their children."""
    places: dict[tuple[int, ...], tuple[float, float]] = {c: (float(i), 0.0) for i, c in enumerate(CODES)}
    for depth in (1, 0):
        for prefix in dict.fromkeys(code[:depth] for code in CODES):
            below = [x for p, (x, _) in places.items() if len(p) == depth + 1 and p[:depth] == prefix]
            places[prefix] = (sum(below) / len(below), float(2 - depth))
    return places


def prefixes_in_order() -> list[tuple[int, ...]]:
    """All nodes, level by level, as the trie numbers them."""
    return [p for depth in range(3) for p in dict.fromkeys(code[:depth] for code in CODES)]


def draw_trie() -> Figure:
    """The trie of six items, and the arrays that store it."""
    figure, (left, right) = new_figure(10, 3.6, 2)
    places, nodes = tree_places(), prefixes_in_order()
    for prefix, (x, y) in places.items():
        if prefix:
            px, py = places[prefix[:-1]]
            left.plot([px, x], [py, y], color=GREY, zorder=1)
            left.text((px + x) / 2, (py + y) / 2, str(prefix[-1]), fontsize=9, color=BLUE, ha="center",
                      bbox={"fc": "white", "ec": "none", "pad": 1}, zorder=2)  # fmt: skip
        circle(left, x, y, str(nodes.index(prefix)), GREEN if y == 0 else "white")
    for rank, code in enumerate(CODES):
        left.text(rank, -0.42, f"item {rank}\n{code}", ha="center", va="top", fontsize=8)
    left.set(xlim=(-0.6, 5.6), ylim=(-1.05, 2.35))
    left.set_axis_off()
    left.set_title("node numbers in circles, codes on edges", fontsize=10)
    inner = [p for p in nodes if len(p) < 2]
    first = [nodes.index(next(n for n in nodes if n[:-1] == p and len(n) == len(p) + 1)) for p in inner]
    rows = [("code", [p[-1] for p in nodes[1:]]), ("first_child", [*first, len(nodes)])]
    for line, (name, values) in enumerate(rows):
        y = 1.5 - 1.1 * line
        right.text(-0.3, y, name, ha="right", va="center", fontsize=10, family="monospace")
        for column, value in enumerate(values):
            right.text(column, y, str(value), ha="center", va="center", fontsize=10,
                       bbox={"boxstyle": "square,pad=0.4", "fc": "#e8eef7"})  # fmt: skip
    right.text(-2.4, -0.6, "The children of node n are first_child[n] … first_child[n + 1] − 1.\n"
               "The code on the edge into node c is code[c − 1].", fontsize=9)  # fmt: skip
    right.set(xlim=(-2.6, 9), ylim=(-1, 2.2))
    right.set_axis_off()
    right.set_title("the arrays", fontsize=10)
    return figure


def circle(axes: Axes, x: float, y: float, text: str, color: str, edge: str = "black") -> None:
    size = {"boxstyle": "circle,pad=0.3", "fc": color, "ec": edge, "lw": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=size, zorder=3)


def search() -> tuple[dict[tuple[int, ...], float], set[tuple[int, ...]], float]:
    """Scores of all candidates, the prefixes that were kept, and the best score that was pruned."""
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    beams: list[tuple[int, ...]] = [()]
    kept: set[tuple[int, ...]] = {()}
    pruned = float("-inf")
    for _ in range(2):
        grown = {(*p, c): scores[p] + value for p in beams for c, value in LOG_PROB[p].items()}
        ranked = sorted(grown, key=lambda prefix: grown[prefix], reverse=True)
        beams, scores = ranked[:WIDTH], scores | grown
        pruned = max([pruned, *(grown[p] for p in ranked[WIDTH:])])
        kept |= set(beams)
    return scores, kept, pruned


def draw_beam_search() -> Figure:
    """A search with two beams in the trie of ``draw_trie``: kept, pruned and certified prefixes."""
    scores, kept, pruned = search()
    figure, (axes,) = new_figure(9, 3.8, 1)
    places = {p: (1.5 * x, y) for p, (x, y) in tree_places().items()}
    for prefix, (x, y) in places.items():
        if prefix:
            px, py = places[prefix[:-1]]
            line = "-" if prefix in kept else ":"
            axes.plot([px, x], [py, y], color=BLUE if prefix in kept else GREY, linestyle=line, zorder=1)
        certified = len(prefix) == 2 and prefix in kept and scores[prefix] > pruned + 1e-4
        color = GREEN if certified else "#cfe0f5" if prefix in kept else "#eceff2"
        text = "".join(f"<{'ab'[level]}_{code}>" for level, code in enumerate(prefix)) or "start"
        score = f"\n{scores[prefix]:.1f}" if prefix in scores else "\nnot scored"
        axes.text(x, y, text + score, ha="center", va="center", fontsize=9, zorder=2,
                  bbox={"boxstyle": "round,pad=0.4", "fc": color, "ec": "black"})  # fmt: skip
    legend = "green: certified, above it\nblue: kept by W = 2\ngrey: pruned or never reached"
    axes.text(7.9, 1.75, f"best pruned score: {pruned:.1f}\n\n{legend}", fontsize=9, va="top")
    axes.set(xlim=(-0.8, 10.6), ylim=(-0.4, 2.4))
    axes.set_axis_off()
    return figure


STEP = (  # what one decode step computes: title, text, the operation behind it
    ("hidden states", "W rows per user through the\ndecoder layers; attention over\nthe shared KV cache of "
     "the prompt\nand over each beam's own tokens", "attention"),
    ("logits", "the K columns of the level;\nfor vocab also the log-sum-exp\nover the vocabulary", "head"),
    ("selection", "mask by the trie, log-softmax,\nadd the scores of the beams,\nkeep the W best, record the "
     "best\npruned score", "trie_beam_step"),
)  # fmt: skip
BACKENDS = {
    "attention": "C++ (CPU) · Triton (GPU)",
    "head": "C++ (CPU) · PyTorch and Triton (GPU)",
    "trie_beam_step": "C++ (CPU) · Triton (GPU)\nPyTorch reference defines the result",
}


def draw_kernels() -> Figure:
    """The three parts of one decode step and the backends of each."""
    figure, (axes,) = new_figure(10, 2.9, 1)
    for column, (title, text, name) in enumerate(STEP):
        x = 3.4 * column
        axes.text(x, 1.75, title, ha="center", fontsize=11, weight="bold")
        axes.text(x, 0.95, text, ha="center", va="center", fontsize=9,
                  bbox={"boxstyle": "round,pad=0.6", "fc": "#e8eef7"})  # fmt: skip
        axes.text(x, 0.0, BACKENDS[name], ha="center", va="top", fontsize=8, color=RED)
        if column:
            axes.annotate("", (x - 1.35, 0.95), (x - 2.05, 0.95), arrowprops={"arrowstyle": "->", "lw": 1.5})
    axes.annotate("", (0, 2.05), (6.8, 2.05),
                  arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=0.08"})  # fmt: skip
    axes.text(3.4, 2.42, "next step: parents, codes, trie nodes", fontsize=8, ha="center")
    axes.set(xlim=(-1.7, 8.5), ylim=(-0.5, 2.6))
    axes.set_axis_off()
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "semantic-ids": draw_semantic_ids,
    "trie": draw_trie,
    "beam-search": draw_beam_search,
    "kernels": draw_kernels,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        draw().savefig(FOLDER / f"{name}.png", dpi=110)
