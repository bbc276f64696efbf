"""MISSRec: interests of a user and modalities of items, read by an encoder and a decoder.

B samples, L positions, D embedding, N items, P targets, M modalities, K interests of a modality, S drawn
items, F width of a feature. The frozen vectors of each modality are clustered; the centre of an item's
cluster is an interest token. The encoder reads the interest tokens of a history, each once. The decoder reads
the modality tokens of its items, and the encoded interests by cross-attention. A score is a cosine divided by
a temperature: the mean over the id of the item and its modalities, which are weighted by a softmax of their
own cosines with the state, so that the weights depend on the user.

Source: Wang et al., MISSRec: Pre-training and Transferring Multi-modal Interest-aware Sequence Representation
for Recommendation, 2023, https://arxiv.org/abs/2308.11175, without its pre-training. Differences: k-means
replaces density peaks; both networks are causal, so that all positions are trained in one pass; attention
depends on the distance of two items in place of their positions; the loss is estimated from drawn items;
interests are orthogonal per user, by the squared cosines of their encodings. The width is 128 instead of 300
and the dropout 0.3 instead of 0.5, for two CPU cores.
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
    causal,
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

ROUNDS = 20  # of k-means
Vectors = tuple[Tensor, Tensor, Tensor]  # unit vectors of modalities [C, M, D] and ids [C, D], present [C, M]


@dataclass(frozen=True, slots=True)
class MISSRecConfig(LoopConfig):
    """Settings of MISSRec; those that it shares with SASRec are explained at `DenseConfig`.

    Attributes:
        ids: Whether items have a learned vector, too.
        interests: Number of clusters per modality, at most half the items that have it.
        layers: Of the encoder, and of the decoder.
        temperature: Divides the cosines.
        orthogonality: Weight of the mean squared cosine between the encoded interests of a user.
    """

    ids: bool = True
    interests: int = 1024
    dim: int = 128
    layers: int = 2
    heads: int = 4
    inner: int = 256
    dropout: float = 0.3
    temperature: float = 0.07
    orthogonality: float = 1e-4
    samples: str = "positions"
    negatives: int = 1024
    max_length: int = 50
    batch_size: int = 64
    epochs: int = 12

    def __post_init__(self) -> None:
        check_heads(self)


class MISSRec(CatalogModel):
    """The network."""

    clusters: Tensor

    def __init__(self, features: Mapping[str, Features], config: MISSRecConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.modalities = Modalities(features, dim)
        present = self.modalities.present
        found = [
            cluster(self.modalities.values(m), f.present, config.interests, config.seed)
            for m, f in enumerate(features.values())
        ]
        self.register_buffer("clusters", torch.stack([rows for rows, _ in found], dim=1), persistent=False)
        for number, (_, centres) in enumerate(found):
            self.register_buffer(f"centres_{number}", centres, persistent=False)
        self.ids = nn.Embedding(len(present), dim) if config.ids else None
        self.distances = Distances(config.max_length, config.heads)
        self.types = nn.Parameter(torch.randn(len(features), dim) * STD)
        self.fusion = nn.Parameter(torch.zeros(()))  # 0 is the plain mean of the modalities
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=STD)
        self.interest_norm, self.input_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)
        layer = partial(Layer, dim, heads=config.heads, inner=config.inner, dropout=config.dropout)
        self.encoder = nn.ModuleList(layer() for _ in range(config.layers))
        self.decoder = nn.ModuleList(layer(cross=True) for _ in range(config.layers))

    def interests(self, items: Tensor) -> Tensor:
        """Map item rows [...] to their interest tokens [..., M, D]."""
        tokens = [
            layer(getattr(self, f"centres_{m}")[self.clusters[items][..., m]])
            for m, layer in enumerate(self.modalities.project)
        ]
        return torch.stack(tokens, dim=-2)

    def states(self, items: Tensor, lengths: Tensor, *, newest: bool) -> tuple[Tensor, Tensor]:
        """Encode histories [B, L] padded on the right.

        Returns:
            The unit vectors [B, L, D] after each item, or with ``newest`` [B, 1, D] after the newest, and the
            mean squared cosine between interests.
        """
        length, count = items.shape[1], len(self.types)
        place = torch.arange(length, device=items.device)
        here = (place < lengths[:, None])[:, :, None] & self.modalities.present[items]  # [B, L, M]
        new = here & ~repeated(self.clusters[items], here)
        earlier = causal(length, count, items.device)  # [L M, L M]
        memory = self.dropout(self.interest_norm(self.interests(items) + self.types)).flatten(1, 2)
        memory_mask = (earlier & new.flatten(1)[:, None])[:, None]  # [B, 1, L M, L M]
        for layer in self.encoder:
            memory = layer(memory, memory_mask)
        x = self.modalities(items) + self.types  # [B, L, M, D]
        if self.ids is not None:
            x = x + self.ids(items)[:, :, None]
        x = self.dropout(self.input_norm(x)).flatten(1, 2)
        position = place.repeat_interleave(count)[None]
        mask = self.distances(position, position, earlier & here.flatten(1)[:, None])
        for layer in self.decoder:
            x = layer(x, mask, memory=memory, memory_mask=memory_mask)
        x = x.unflatten(1, (-1, count)) * here[..., None]
        if newest:
            x = x[torch.arange(len(x), device=x.device), lengths - 1][:, None]
        return F.normalize(x.sum(2), dim=-1), overlap(memory, new.flatten(1))

    def vectors(self, items: Tensor) -> Vectors:
        """Compute the unit vectors of item rows [C]."""
        modal = F.normalize(self.modalities(items), dim=-1)
        ids = modal.new_zeros(len(items), 0) if self.ids is None else F.normalize(self.ids(items), dim=-1)
        return modal, ids, self.modalities.present[items]

    def fuse(self, modal: Tensor, ids: Tensor | None, present: Tensor) -> Tensor:
        """Reduce the cosines of modalities [..., M] and ids [...] to logits [...]."""
        fused, count = modal[..., 0], modal.shape[-1]
        if count > 1:
            weights = (modal * self.fusion).masked_fill(~present, float("-inf")).softmax(-1)
            fused = (modal * weights).sum(-1)
        if ids is not None:
            fused = (ids + count * fused) / (1 + count)
        return fused / self.config.temperature

    def score(self, states: Tensor, vectors: Vectors) -> Tensor:
        """Score every item for every state [P, D]: logits [P, C]."""
        modal, ids, present = vectors
        if modal.shape[1] == 1:  # the mean is the same for every user, so it is taken of the vectors
            table = modal[:, 0] if self.ids is None else (modal[:, 0] + ids) / 2
            return states @ table.T / self.config.temperature
        cosines = torch.stack([states @ modal[:, m].T for m in range(modal.shape[1])], dim=-1)
        return self.fuse(cosines, None if self.ids is None else states @ ids.T, present)

    def encode_catalog(self) -> Vectors:
        """Compute the unit vectors of all items."""
        return self.vectors(torch.arange(len(self.clusters), device=self.clusters.device))

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean cross-entropy of the targets, and the orthogonality of interests."""
        states, overlapping = self.states(batch.inputs, batch.lengths, newest=not batch.every_position)
        states = states[batch.present] if batch.every_position else states[:, 0]  # [P, D]
        num_items, config = len(self.clusters), self.config
        drawn = draw_items(num_items, config.negatives, generator).to(states.device)
        modal, ids, present = self.vectors(batch.targets)
        own_ids = None if self.ids is None else (states * ids).sum(-1)
        own = self.fuse((states[:, None] * modal).sum(-1), own_ids, present)
        others, same = self.score(states, self.vectors(drawn)), batch.targets[:, None] == drawn
        loss = sampled_cross_entropy(own, others, same=same, num_items=num_items)
        return loss + config.orthogonality * overlapping

    @torch.inference_mode()
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return the score of each item, [B, N], after histories of item rows, oldest first, none empty."""
        catalog: Vectors = self.catalog
        device = self.clusters.device
        items, lengths = pad_histories(histories, self.config.max_length)
        states, _ = self.states(items.to(device), lengths.to(device), newest=True)
        return self.score(states[:, 0], catalog)


def repeated(clusters: Tensor, here: Tensor) -> Tensor:
    """Return where a cluster [B, L, M] occurred earlier in its row, [B, L, M] bool."""
    same = (clusters[:, :, None] == clusters[:, None]) & here[:, None]  # [B, L, L, M]
    length = clusters.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=clusters.device).tril(-1)
    return (same & before[:, :, None]).any(2)


def overlap(memory: Tensor, present: Tensor) -> Tensor:
    """Compute the mean squared cosine between the interests of a row.

    ``memory`` is [B, T, D], ``present`` [B, T] bool.
    """
    unit = F.normalize(memory, dim=-1) * present[..., None]
    pairs = present.sum(1).float()
    squares = (unit @ unit.transpose(1, 2)).square().sum((1, 2)) - pairs  # of a vector with itself: 1
    return (squares / (pairs * (pairs - 1)).clamp(min=1)).mean()


def cluster(values: Tensor, present: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster features [N, F] by k-means.

    Returns:
        The cluster of each item, [N] int64, and the centres [K + 1, F], the last, zero, for items without.
    """
    from sklearn.cluster import KMeans

    rows = values[present]
    count = max(min(count, len(rows) // 2), 1)
    found = KMeans(count, init="random", n_init=1, max_iter=ROUNDS, random_state=seed).fit(rows.numpy())
    clusters = torch.full((len(values),), count, dtype=torch.int64)
    clusters[present] = torch.from_numpy(found.labels_).long()
    centres = torch.from_numpy(found.cluster_centers_).float()
    return clusters, torch.cat([centres, centres.new_zeros(1, centres.shape[1])])


def fit(job: Job) -> Fitted:
    """Train on the training sequences, with the features of texts and images."""
    config, features = job.config(MISSRecConfig), item_features(job)

    def make(samples: Samples) -> tuple[CatalogModel, Loss]:
        model = MISSRec(features, config).to(job.device)
        return model, model.loss

    return fit_model(job, config, features, make, max_length=config.max_length, samples=config.samples)
