"""What the codes learn on the synthetic set: planted clusters share prefixes, and each modality counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cemg.data import synthetic_dataset
from cemg.data.synthetic import planted_clusters
from cemg.graph import GraphConfig
from cemg.graph.lightgcn import train_lightgcn
from cemg.tokenizer import Tokenizer, TokenizerConfig
from cemg.tokenizer.training import train_tokenizer

pytestmark = pytest.mark.medium

ITEMS = 240
CONFIG = TokenizerConfig(
    levels=3, codebook_size=32, dim=32, latent=16, hidden=(128,), epochs=60, batch_size=128
)


class World:
    """Features that hold the planted visual and textual clusters, and graph embeddings of purchases."""

    def __init__(self, folder: Path) -> None:
        data = synthetic_dataset(folder, users=500, items=ITEMS, seed=0)
        self.planted = planted_clusters(folder)
        generator = torch.Generator().manual_seed(0)
        noise = {k: 0.2 * torch.randn(ITEMS, 6, generator=generator) for k in ("image", "text")}
        made = train_lightgcn(
            data.split().train, ITEMS, config=GraphConfig(dim=16, epochs=40, batch_size=512)
        )
        hot = {
            k: torch.nn.functional.one_hot(self.labels(n), 6).float()
            for k, n in (("image", "visual"), ("text", "textual"))
        }
        self.values = {k: hot[k] + noise[k] for k in hot} | {"collab": made.values}
        self.present = {k: torch.ones(ITEMS, dtype=torch.bool) for k in hot} | {"collab": made.present}

    def labels(self, kind: str) -> torch.Tensor:
        values = self.planted[kind].to_list()
        names = sorted(set(values))
        return torch.tensor([names.index(v) for v in values])

    def tokenize(self, *without: str) -> tuple[Tokenizer, torch.Tensor]:
        made = train_tokenizer(self.values, self.present, config=CONFIG, without=without)
        return made, made.tokenize(made.features(self.values, self.present))[0]

    def lift(self, codes: torch.Tensor, kind: str) -> float:
        """How much more often two items share their first code inside a planted cluster than across."""
        same_code = (codes[:, None, 0] == codes[None, :, 0]).float()
        same = self.labels(kind)[:, None] == self.labels(kind)[None]
        pairs = ~torch.eye(ITEMS, dtype=torch.bool)
        return (same_code[same & pairs].mean() / same_code[~same].mean().clamp_min(1e-9)).item()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def whole(world: World) -> torch.Tensor:
    return world.tokenize()[1]


@pytest.mark.parametrize("kind", ["visual", "textual"])
def test_items_of_a_planted_cluster_share_first_codes_far_above_chance(
    world: World, whole: torch.Tensor, kind: str
) -> None:
    assert world.lift(whole, kind) > 3


@pytest.mark.parametrize("modality, kind", [("image", "visual"), ("text", "textual")])
def test_without_a_modality_codes_change_and_its_clusters_fall_apart(
    world: World, whole: torch.Tensor, modality: str, kind: str
) -> None:
    _, codes = world.tokenize(modality)
    assert (codes != whole).any(1).float().mean() > 0.5
    assert world.lift(codes, kind) < 0.5 * world.lift(whole, kind)


def test_without_the_graph_codes_change(world: World, whole: torch.Tensor) -> None:
    _, codes = world.tokenize("collab")
    assert (codes != whole).any(1).float().mean() > 0.5


def test_no_level_collapses(whole: torch.Tensor) -> None:
    for level in range(CONFIG.levels):
        share = torch.bincount(whole[:, level], minlength=CONFIG.codebook_size) / ITEMS
        perplexity = torch.exp(-torch.xlogy(share, share).sum()).item()
        assert perplexity > CONFIG.codebook_size / 4
