"""The parts that the multimodal baselines share: frozen features, attention layers, softmax, training.

B samples or users, L positions, D embedding, N items, P targets, M modalities, F width of a feature, S drawn
items. A modality that an item lacks is masked. An item that has none keeps the first one, with zeros in place
of its vector, so that every item has a token.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.baselines.loop import LoopConfig, Loss, train
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Samples
from cemg.baselines.validation import Scorer
from cemg.dense.dropout import Dropout
from cemg.errors import UserError
from cemg.features import Features

STD = 0.02  # of the initial weights of embeddings


class CatalogModel(nn.Module, ABC):
    """A network that scores items against vectors of the catalog, computed once per evaluation."""

    _catalog: Any = None

    def train(self, mode: bool = True) -> CatalogModel:
        """Change the mode as torch does, and forget the vectors of the catalog."""
        self._catalog = None
        super().train(mode)
        return self

    @abstractmethod
    def encode_catalog(self) -> Any:
        """Compute the vectors of all items."""

    @abstractmethod
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return the score of each item, [B, N], after histories of item rows, oldest first, none empty."""

    @property
    def catalog(self) -> Any:
        """The vectors of all items, with the weights that the model had at its last change of mode."""
        if self._catalog is None:
            self._catalog = self.encode_catalog()
        return self._catalog

    @torch.inference_mode()
    def rank(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Return the ``top`` best items of each history, [B, top], as `cemg.evaluation.evaluate` asks for."""
        scores = self.logits(histories)
        return scores.topk(min(top, scores.shape[1]), dim=1).indices


class Modalities(nn.Module):
    """Projects the frozen features of items to tokens, one per modality.

    A feature is scaled to zero mean and unit variance over the items that have it.
    """

    present: Tensor

    def __init__(self, features: Mapping[str, Features], dim: int) -> None:
        super().__init__()
        self.names = list(features)
        present = torch.stack([f.present for f in features.values()], dim=1)  # [N, M]
        present[:, 0] |= ~present.any(1)
        self.register_buffer("present", present, persistent=False)
        for name, found in features.items():
            self.register_buffer(f"{name}_values", standardized(found), persistent=False)
        self.project = nn.ModuleList(nn.Linear(found.width, dim) for found in features.values())

    def values(self, number: int) -> Tensor:
        """The scaled features [N, F] of a modality, by its number."""
        values: Tensor = getattr(self, f"{self.names[number]}_values")
        return values

    def forward(self, items: Tensor) -> Tensor:
        """Map item rows [...] to tokens [..., M, D]."""
        return torch.stack([layer(self.values(m)[items]) for m, layer in enumerate(self.project)], dim=-2)


def standardized(features: Features) -> Tensor:
    """Scale each column to zero mean and unit variance over the items that have the modality, [N, F]."""
    rows = features.values[features.present]
    scale = rows.std(0, correction=0).clamp(min=1e-6)
    values = torch.zeros_like(features.values)
    values[features.present] = (rows - rows.mean(0)) / scale
    return values


class Attention(nn.Module):
    """Multi-head attention with a mask."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x [B, T, D] to [B, T, D]: a mean of the values of ``memory`` [B, S, D].

        ``mask`` [B or 1, heads or 1, T, S] is added to the logits, or is True where a query reads a key; None
        is the causal mask.
        """
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, D/heads]
        split = self.key_value(memory).unflatten(-1, (2, self.heads, -1))
        key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, S, D/heads]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        attended: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended


class Layer(nn.Module):
    """A Transformer layer: self-attention, attention to a memory where ``cross``, a feed-forward network.

    Each sublayer has dropout and a residual, and LayerNorm follows it.
    """

    def __init__(self, dim: int, *, heads: int, inner: int, dropout: float, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(dim, heads), nn.LayerNorm(dim)
        self.cross = Attention(dim, heads) if cross else None
        self.cross_norm = nn.LayerNorm(dim) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        self.inner_norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor, *, memory: Tensor | None = None, memory_mask: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Map the tokens x [B, T, D] from number ``first`` on to [B, T - first, D].

        ``mask`` is [B or 1, heads or 1, T, T], ``memory`` [B, S, D] and ``memory_mask`` as ``mask``, with S
        columns: see `Attention`.
        """
        asked = x[:, first:]
        asked = self.attention_norm(asked + self.dropout(self.attention(asked, x, mask[:, :, first:])))
        if self.cross is not None and self.cross_norm is not None:
            assert memory is not None and memory_mask is not None
            read = self.cross(asked, memory, memory_mask[:, :, first:])
            asked = self.cross_norm(asked + self.dropout(read))
        output: Tensor = self.inner_norm(asked + self.dropout(self.feed_forward(asked)))
        return output


class Distances(nn.Module):
    """A learned weight per head and distance between two positions, which attention adds to its logits."""

    def __init__(self, longest: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(longest + 1, heads))

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return the weights [B, heads, T, S] of positions [B or 1, T] and [B or 1, S], -inf off the mask.

        ``mask`` [B or 1, T, S] is True where a query reads a key.
        """
        distance = (queries[:, :, None] - keys[:, None]).clamp(0, len(self.weight) - 1)  # [B or 1, T, S]
        weights = F.embedding(distance, self.weight).permute(0, 3, 1, 2)
        return weights.masked_fill(~mask[:, None], float("-inf"))


def causal(length: int, tokens: int, device: torch.device) -> Tensor:
    """Return the mask [L * M, L * M] in which the M tokens of an item read those of items up to itself."""
    position = torch.arange(length * tokens, device=device) // tokens
    return position[:, None] >= position


def draw_items(num_items: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` different items, [S] int64 on the CPU; all items if ``count`` is 0 or larger than N."""
    if not 0 < count < num_items:
        return torch.arange(num_items)
    return torch.randperm(num_items, generator=generator)[:count]


def sampled_cross_entropy(own: Tensor, others: Tensor, *, same: Tensor, num_items: int) -> Tensor:
    """Compute the mean cross-entropy, the sum over the catalog estimated from drawn items.

    Each drawn item other than the target counts N / S times, which has no bias for items drawn uniformly.

    Args:
        own: [P] the logits of the targets.
        others: [P, S] the logits of the drawn items.
        same: [P, S] bool, where a drawn item is the target.
        num_items: N.
    """
    weight = math.log(num_items / others.shape[1])
    rest = others.masked_fill(same, float("-inf")).logsumexp(1) + weight
    return (torch.logaddexp(own, rest) - own).mean()


def fit_model(
    job: Job, config: LoopConfig, features: Mapping[str, Features],
    make: Callable[[Samples], tuple[CatalogModel, Loss]], *, max_length: int, samples: str,
) -> Fitted:  # fmt: skip
    """Train a model that predicts the next item.

    Args:
        job: The job.
        config: The settings of the model.
        features: The features of the items; a checkpoint of other features is refused.
        make: Returns the model and its loss for the training samples.
        max_length: Inputs of the longest sample.
        samples: "positions" or "prefixes", see `cemg.dense.DenseConfig`.

    Raises:
        UserError: As `train`, or no user has two training items.
    """
    split = job.data.split()
    collect = Samples.positions if samples == "positions" else Samples.prefixes
    training = collect(list(split.train), max_length)
    if len(training.starts) == 0:
        fix = "use data with longer histories"
        raise UserError(f"{job.data.name}: no user has two training items", fix=fix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, loss = make(training)
    scorer: Scorer = model
    settings = {**asdict(config), "features": digest(features)}
    log = train(
        model, training, split, config=config, loss=loss, scorer=scorer, settings=settings,
        folder=job.folder, budget=job.budget,
    )  # fmt: skip
    return Fitted.of_log(model.rank, asdict(config), log, select=config.select)


def digest(features: Mapping[str, Features]) -> str:
    """Compute the sha256 of all features."""
    sha = hashlib.sha256()
    for name, found in features.items():
        sha.update(name.encode())
        for tensor in (found.values, found.present):
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def check_heads(config: Any) -> None:
    """Raise UserError if the attention heads do not divide the width of a model."""
    if config.dim % config.heads:
        raise UserError(f"dim {config.dim} is not divisible by heads {config.heads}")
