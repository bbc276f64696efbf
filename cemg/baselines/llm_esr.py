"""LLM-ESR: a view of frozen features and a view of item ids, and the states of similar users.

B samples, L positions, D embedding per view, F width of the features, N items, P targets, U users, K similar
users. An item has two vectors: a linear map of its features, and a row of a table that starts as their PCA.
Each view of a history reads the other by attention, then both go through the same SASRec blocks. The score of
an item is the product of both states with both vectors. An additional loss draws the newest state of a user
to those of the K users with the most similar histories.

Source: Liu et al., LLM-ESR: Large Language Models Enhancement for Long-tailed Sequential Recommendation,
2024, https://arxiv.org/abs/2405.20646. Differences: the loss is softmax cross-entropy over sampled items by
default; the attention between the views is causal and has a residual, so that all positions are trained in
one pass; each step draws some of the K similar users, which gives the gradient of their mean on average. The
features are those of the default encoders, of texts and images side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.baselines.dense import draw_negatives
from cemg.baselines.features import item_features
from cemg.baselines.loop import LoopConfig, Loss
from cemg.baselines.multimodal import STD, Attention, CatalogModel, check_heads, draw_items, fit_model
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Batch, Samples
from cemg.dense import DenseConfig, linear_cross_entropy, pad_histories
from cemg.dense.dropout import Dropout
from cemg.dense.encoder import Block
from cemg.errors import UserError
from cemg.features import PCA, Features
from cemg.precision import product_dtype

CELLS = 1 << 24  # similarities of users computed at once


@dataclass(frozen=True, slots=True)
class LLMESRConfig(LoopConfig):
    """Settings of LLM-ESR; those that it shares with SASRec are explained at `DenseConfig`.

    Attributes:
        loss: "ce" is softmax cross-entropy over sampled items, "bce" the loss of the paper.
        dim: Width of a vector per view.
        heads: Of the attention of the blocks.
        cross_heads: Of the attention between the views.
        similar: Number of similar users per user, K; 0 leaves out their loss.
        drawn: How many of them a step reads.
        align: Weight of their loss.
    """

    loss: str = "ce"
    dim: int = 64
    blocks: int = 2
    heads: int = 1
    cross_heads: int = 2
    inner: int = 256
    dropout: float = 0.5
    similar: int = 10
    drawn: int = 1
    align: float = 0.1
    samples: str = "positions"
    negatives: int = 2048
    max_length: int = 50
    batch_size: int = 64
    epochs: int = 16
    products: str = "bfloat16"

    def __post_init__(self) -> None:
        check_heads(self)
        if self.loss not in ("ce", "bce"):
            raise UserError(f"loss must be ce or bce, got {self.loss!r}")
        if self.dim % self.cross_heads:
            raise UserError(f"dim {self.dim} is not divisible by cross_heads {self.cross_heads}")


class LLMESR(CatalogModel):
    """The network. Its vectors of items are [N, 2 D]: the table of ids first, then the mapped features."""

    features: Tensor
    known: Tensor

    def __init__(self, features: Features, config: LLMESRConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.register_buffer("features", features.values, persistent=False)
        self.register_buffer("known", features.present[:, None].float(), persistent=False)
        self.ids = nn.Embedding(len(features.values), dim)
        hidden = max(features.width // 2, 1)
        self.expand, self.contract = nn.Linear(features.width, hidden), nn.Linear(hidden, dim)
        self.positions = nn.Embedding(config.max_length, dim)
        self.input_norm, self.dropout = nn.LayerNorm(dim), Dropout(config.dropout)
        self.cross = nn.ModuleList(Attention(dim, config.cross_heads) for _ in range(2))
        self.cross_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        block = DenseConfig(
            dim=dim, heads=config.heads, inner=config.inner, dropout=config.dropout,
            max_length=config.max_length,
        )  # fmt: skip
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.blocks))
        nn.init.normal_(self.positions.weight, std=STD)
        nn.init.normal_(self.ids.weight, std=STD)
        with torch.no_grad():
            reduced = principal_components(features, dim)
            self.ids.weight[:, : reduced.shape[1]] = reduced

    def encode_catalog(self) -> Tensor:
        """Compute the vectors of all items, [N, 2 D]. The mapped features of an item without any are 0."""
        weight = self.contract.weight @ self.expand.weight  # [D, F]: there is nothing between the two layers
        bias = self.contract(self.expand.bias)
        mapped = F.linear(self.features, weight, bias) * self.known
        return torch.cat([self.ids.weight, mapped], dim=1)

    def states(self, table: Tensor, items: Tensor, lengths: Tensor, *, newest: bool = False) -> Tensor:
        """Compute the states [B, L, 2 D] of item rows [B, L] padded on the right.

        With ``newest`` those of the newest items, [B, 2 D].
        """
        age = (lengths[:, None] - 1 - torch.arange(items.shape[1], device=items.device)).clamp(min=0)
        views = [
            self.dropout(self.input_norm(view + self.positions(age))) for view in table[items].chunk(2, dim=2)
        ]
        read = [
            norm(view + self.dropout(attention(view, other)))
            for view, other, attention, norm in zip(
                views, views[::-1], self.cross, self.cross_norm, strict=True
            )
        ]
        x, twice = torch.cat(read), lengths.repeat(2)  # [2 B, L, D]
        for block in self.blocks[:-1]:
            x = block(x, twice)
        x = self.blocks[-1](x, twice, newest=newest)
        states = torch.cat(x.chunk(2), dim=2)
        return states[:, 0] if newest else states

    def loss(self, batch: Batch, generator: torch.Generator, similar: SimilarUsers) -> Tensor:
        """Return the mean loss of the targets plus that of the similar users."""
        table, config = self.encode_catalog(), self.config
        states = self.states(table, batch.inputs, batch.lengths, newest=not batch.every_position)
        newest = states
        if batch.every_position:
            newest = states[torch.arange(len(states), device=states.device), batch.lengths - 1]
            states = states[batch.present]  # [P, 2 D]
        if config.loss == "ce":
            drawn = None
            if 0 < config.negatives < len(table):
                drawn = draw_items(len(table), config.negatives, generator).to(table.device)
            dtype = product_dtype(config.products, table.device)
            loss = linear_cross_entropy(states, table, targets=batch.targets, negatives=drawn, dtype=dtype)
        else:
            negatives = draw_negatives(batch, len(table), generator=generator)  # [P]
            positive, negative = ((states * table[rows]).sum(1) for rows in (batch.targets, negatives))
            loss = (F.softplus(-positive) + F.softplus(negative)).mean()
        if config.align == 0 or len(similar.users) == 0:
            return loss
        rows, users = similar.draw(batch.samples.cpu(), config.drawn, generator)  # [R], [R, drawn]
        if len(rows) == 0:
            return loss
        items, lengths = pad_histories([similar.histories[u] for u in users.flatten()], config.max_length)
        with torch.no_grad():
            target = self.states(table, items.to(table.device), lengths.to(table.device), newest=True)
        target = target.unflatten(0, (len(rows), -1)).mean(1)  # [R, 2 D]
        return loss + config.align * F.mse_loss(newest[rows.to(newest.device)], target)

    @torch.inference_mode()
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return the score of each item, [B, N], after histories of item rows, oldest first, none empty."""
        table: Tensor = self.catalog
        items, lengths = pad_histories(histories, self.config.max_length)
        states = self.states(table, items.to(table.device), lengths.to(table.device), newest=True)
        return states @ table.T


@dataclass(frozen=True, slots=True)
class SimilarUsers:
    """The users with the most similar training histories.

    Attributes:
        histories: The training history of each user.
        users: [S, K] int64, the similar users of the user of each sample; S = 0 if there are none.
        known: [S] bool, whether the user has any.
    """

    histories: Sequence[np.ndarray]
    users: Tensor
    known: Tensor

    @classmethod
    def find(
        cls, histories: Sequence[np.ndarray], samples: Samples, features: Features, count: int
    ) -> SimilarUsers:
        """Compare users by the cosine of the mean features of their items.

        Users whose items have no features are similar to nobody.
        """
        lengths = torch.tensor([len(h) for h in histories])
        means = torch.zeros(len(histories), features.width)
        rows = torch.repeat_interleave(torch.arange(len(histories)), lengths)
        means.index_add_(0, rows, features.values[torch.from_numpy(samples.items)])
        means = F.normalize(means, dim=1)
        has = means.any(1)
        count = min(count, int(has.sum()) - 1)
        owner = torch.searchsorted(lengths.cumsum(0), torch.from_numpy(samples.starts), right=True)  # [S]
        if count < 1:
            return cls(histories, torch.empty(0, 0, dtype=torch.int64), has[owner])
        best = torch.zeros(len(histories), count, dtype=torch.int64)
        for chunk in owner.unique().split(max(CELLS // len(histories), 1)):
            cosine = means[chunk] @ means.T
            cosine[:, ~has] = float("-inf")
            cosine[torch.arange(len(chunk)), chunk] = float("-inf")
            best[chunk] = cosine.topk(count, dim=1).indices
        return cls(histories, best[owner], has[owner])

    def draw(self, samples: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``count`` similar users [R, count] for the rows [R] of a batch that have any."""
        rows = self.known[samples].nonzero()[:, 0]
        among = self.users[samples[rows]]
        chosen = torch.rand(among.shape, generator=generator).argsort(1)[:, :count]
        return rows, among.gather(1, chosen)


def principal_components(features: Features, dim: int) -> Tensor:
    """Reduce the features to their ``dim`` principal components, or as many as there are, [N, …]."""
    rows = int(features.present.sum())
    count = min(dim, features.width, rows)
    if rows < 2:
        return torch.zeros(len(features.values), 0)
    return PCA.fit(features, dim=count).transform(features.values, features.present)


def side_by_side(features: Mapping[str, Features]) -> Features:
    """Concatenate the unit vectors of the modalities; zeros where one is missing."""
    values = torch.cat([F.normalize(f.values, dim=1) for f in features.values()], dim=1)
    present = torch.stack([f.present for f in features.values()]).any(0)
    return Features(values, present)


def fit(job: Job) -> Fitted:
    """Train on the training sequences, with the features of texts and images."""
    config, found = job.config(LLMESRConfig), item_features(job)
    features, histories = side_by_side(found), job.data.split().train

    def make(samples: Samples) -> tuple[CatalogModel, Loss]:
        similar = SimilarUsers.find(histories, samples, features, config.similar)
        model = LLMESR(features, config).to(job.device)
        return model, lambda batch, generator: model.loss(batch, generator, similar)

    return fit_model(
        job, config, found, make, max_length=config.max_length, samples=config.samples
    )  # fmt: skip
