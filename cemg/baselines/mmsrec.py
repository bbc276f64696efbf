"""MMSRec: one encoder over the modality tokens of a history, and of a single item as a candidate.

B samples, L items, Q masked items, D embedding, N items, P targets, M modalities, S drawn items. Frozen text
and image vectors are projected to tokens. The next item is a masked item at the end of the history: M mask
tokens, whose output is the state of the user. A candidate is encoded alone, by the same layers. Scores are
cosines divided by a temperature.

Source: Song et al., Self-Supervised Multi-Modal Sequential Recommendation, 2023,
https://arxiv.org/abs/2304.13277, without its pre-training. Differences: a mask follows each item in the same
pass, so an item reads earlier items only; attention depends on the distance of two items in place of their
positions; the loss is estimated from drawn items. Defaults for two CPU cores: width 128 instead of 512, 4
heads instead of 8, inner width 256 instead of 1,024, dropout 0.1 instead of 0.5, batches of 32 instead of
1,024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.baselines.features import item_features
from cemg.baselines.loop import LoopConfig, Loss
from cemg.baselines.multimodal import (
    STD,
    CatalogModel,
    Distances,
    Layer,
    Modalities,
    check_heads,
    draw_items,
    fit_model,
    sampled_cross_entropy,
)
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Batch, Samples
from cemg.dense import pad_histories
from cemg.dense.dropout import Dropout
from cemg.features import Features

CHUNK = 4096  # items of the catalog encoded at once


@dataclass(frozen=True, slots=True)
class MMSRecConfig(LoopConfig):
    """Settings of MMSRec; those that it shares with SASRec are explained at `DenseConfig`.

    Attributes:
        dropout: Of the tokens and of the output of each sublayer.
        temperature: Divides the cosines.
    """

    dim: int = 128
    layers: int = 2
    heads: int = 4
    inner: int = 256
    dropout: float = 0.1
    temperature: float = 0.05
    samples: str = "positions"
    negatives: int = 512
    max_length: int = 20
    batch_size: int = 32
    epochs: int = 8

    def __post_init__(self) -> None:
        check_heads(self)


class MMSRec(CatalogModel):
    """The network."""

    def __init__(self, features: Mapping[str, Features], config: MMSRecConfig) -> None:
        super().__init__()
        self.config, dim, count = config, config.dim, len(features)
        self.modalities = Modalities(features, dim)
        self.token_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(count))
        self.mask_token = nn.Parameter(torch.randn(dim) * STD)
        self.types = nn.Parameter(torch.randn(count, dim) * STD)
        self.distances = Distances(config.max_length, config.heads)
        self.dropout = Dropout(config.dropout)
        layer = partial(Layer, dim, heads=config.heads, inner=config.inner, dropout=config.dropout)
        self.layers = nn.ModuleList(layer() for _ in range(config.layers))
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim)) for _ in range(count)
        )

    def tokens(self, items: Tensor) -> Tensor:
        """Map item rows [...] to their tokens [..., M, D], before positions."""
        projected = self.modalities(items)
        return torch.stack([norm(projected[..., m, :]) for m, norm in enumerate(self.token_norms)], dim=-2)

    def encode(self, tokens: Tensor, mask: Tensor, *, first: int = 0) -> Tensor:
        """Encode items as tokens [B, T, M, D], with a mask as of `Attention`; from item ``first`` on."""
        count = tokens.shape[2]
        x = self.dropout(tokens + self.types).flatten(1, 2)  # [B, T M, D]
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        x = self.layers[-1](x, mask, first=first * count)
        encoded: Tensor = x.unflatten(1, (-1, count))
        return encoded

    def pool(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Reduce outputs [..., M, D] to unit vectors [..., D]: the maximum over the modalities present."""
        x = torch.stack([output(x[..., m, :]) for m, output in enumerate(self.outputs)], dim=-2)
        if present is not None:
            x = x.masked_fill(~present[..., None], float("-inf"))
        return F.normalize(x.amax(-2), dim=-1)

    def candidates(self, items: Tensor) -> Tensor:
        """Encode item rows [C] alone, one by one: unit vectors [C, D]."""
        present = self.modalities.present[items]  # [C, M]
        tokens = self.tokens(items)[:, None]  # [C, 1, M, D]
        return self.pool(self.encode(tokens, present[:, None, None])[:, 0], present)

    def states(self, items: Tensor, lengths: Tensor, *, newest: bool) -> Tensor:
        """Encode histories [B, L] padded on the right: unit vectors [B, Q, D] of the masked items.

        The masked items follow each item, Q = L, or with ``newest`` the newest item, Q = 1.
        """
        count, length = len(self.token_norms), items.shape[1]
        place = torch.arange(length, device=items.device)[None]  # [1, L]
        after = lengths[:, None] - 1 if newest else place  # [B or 1, Q] the item before each masked one
        present = (place < lengths[:, None])[:, :, None] & self.modalities.present[items]  # [B, L, M]
        rows, queries, size = len(after), after.shape[1], length * count
        reads = torch.cat([place.expand(rows, -1), after], dim=1).repeat_interleave(count, dim=1)
        position = reads.clone()
        position[:, size:] += 1
        earlier = reads[:, :, None] >= position[:, None, :size]  # [B or 1, (L + Q) M, L M]
        number = torch.arange(queries * count, device=items.device) // count
        itself = F.pad(number[:, None] == number, (0, 0, size, 0))  # a masked item is read by itself only
        itself = itself.expand(len(items), -1, -1)
        mask = torch.cat([earlier & present.flatten(1)[:, None], itself], dim=2)
        masked = self.mask_token.expand(len(items), queries, count, -1)
        tokens = torch.cat([self.tokens(items), masked], dim=1)
        return self.pool(self.encode(tokens, self.distances(position, position, mask), first=length))

    def encode_catalog(self) -> Tensor:
        """Encode all items, [N, D]."""
        items = torch.arange(len(self.modalities.present), device=self.mask_token.device)
        return torch.cat([self.candidates(chunk) for chunk in items.split(CHUNK)])

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean cross-entropy of the targets, over ``negatives`` random items and each target."""
        states = self.states(batch.inputs, batch.lengths, newest=not batch.every_position)  # [B, Q, D]
        states = states[batch.present] if batch.every_position else states[:, 0]  # [P, D]
        states, num_items = states / self.config.temperature, len(self.modalities.present)
        drawn = draw_items(num_items, self.config.negatives, generator).to(states.device)
        items, rows = torch.cat([drawn, batch.targets]).unique(return_inverse=True)
        vectors = self.candidates(items)  # [C, D]
        others, own = vectors[rows[: len(drawn)]], vectors[rows[len(drawn) :]]
        same = batch.targets[:, None] == drawn
        return sampled_cross_entropy((states * own).sum(1), states @ others.T, same=same, num_items=num_items)

    @torch.inference_mode()
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return the score of each item, [B, N], after histories of item rows, oldest first, none empty."""
        catalog: Tensor = self.catalog
        items, lengths = pad_histories(histories, self.config.max_length)
        states = self.states(items.to(catalog.device), lengths.to(catalog.device), newest=True)[:, 0]
        return states @ catalog.T


def fit(job: Job) -> Fitted:
    """Train on the training sequences, with the features of texts and images."""
    config, features = job.config(MMSRecConfig), item_features(job)

    def make(samples: Samples) -> tuple[CatalogModel, Loss]:
        model = MMSRec(features, config).to(job.device)
        return model, model.loss

    return fit_model(job, config, features, make, max_length=config.max_length, samples=config.samples)
