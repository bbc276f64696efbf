"""SASRec: a causal Transformer over item embeddings that scores items by dot product.

B users, L positions, D embedding, N items, P valid positions.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation, 2018, https://arxiv.org/abs/1808.09781
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, PositiveInt
from torch import Tensor, nn

from cemg.baselines.sequences import pad_histories
from cemg.errors import DamagedError, UserError
from cemg.storage import files
from cemg.storage.read import STRICT, check_signature, file_digest, read_json, read_tensors, signed

LOSSES = ("ce", "bce")
COUNTS = ("dim", "blocks", "heads", "inner", "max_length", "batch_size", "epochs", "patience", "valid_users")
PRODUCTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class SasrecConfig:
    """Settings of the model, its loss and its training.

    Attributes:
        loss: "ce" is softmax cross-entropy over the whole catalog at every position. "bce" is the binary
            cross-entropy of the original, with one random negative per position.
        inner: Width of the hidden layer of the feed-forward network.
        norm_first: Whether LayerNorm precedes each sublayer instead of following it.
        max_length: Number of the newest items of a history that the model reads.
        patience: Training stops after this many epochs without a better validation NDCG@10.
        valid_users: Users of a validation, drawn by the seed.
        products: Type of the matrix products of the cross-entropy, "bfloat16" or "float32".
    """

    loss: str = "ce"
    dim: int = 64
    blocks: int = 2
    heads: int = 2
    inner: int = 256
    dropout: float = 0.5
    norm_first: bool = False
    max_length: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 200
    patience: int = 10
    valid_users: int = 2000
    products: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.products not in PRODUCTS:
            raise UserError(f"products must be one of {', '.join(PRODUCTS)}, got {self.products!r}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise UserError(f"learning_rate {self.learning_rate} must be positive, weight_decay not negative")


class Block(nn.Module):
    """Causal self-attention and a two-layer feed-forward network, each with dropout and a residual."""

    def __init__(self, config: SasrecConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_norm, self.inner_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        self.expand, self.contract = nn.Linear(config.dim, config.inner), nn.Linear(config.inner, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, D] to [B, L, D]. Padding is on the right, so the causal mask hides it."""
        if self.config.norm_first:
            x = x + self.dropout(self._attend(self.attention_norm(x)))
            x = x + self.dropout(self._feed_forward(self.inner_norm(x)))
        else:
            x = self.attention_norm(x + self.dropout(self._attend(x)))
            x = self.inner_norm(x + self.dropout(self._feed_forward(x)))
        return x

    def _attend(self, x: Tensor) -> Tensor:
        split = self.query_key_value(x).unflatten(-1, (3, self.config.heads, -1))  # [B, L, 3, heads, D/heads]
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D/heads]
        drop = self.config.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        attended: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended

    def _feed_forward(self, x: Tensor) -> Tensor:
        contracted: Tensor = self.contract(self.dropout(F.gelu(self.expand(x))))
        return contracted


class Sasrec(nn.Module):
    """Computes a state per position. The score of an item is the dot product of state and item embedding."""

    def __init__(self, num_items: int, config: SasrecConfig) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, config.dim)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.input_norm = nn.Identity() if config.norm_first else nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_norm = nn.LayerNorm(config.dim) if config.norm_first else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialize)

    def forward(self, items: Tensor) -> Tensor:
        """Compute the states [B, L, D] of ``items`` [B, L] int64: oldest first, padded on the right."""
        positions = self.positions.weight[: items.shape[1]]  # [L, D]
        x = self.dropout(self.input_norm(self.items(items) + positions))
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.output_norm(x)
        return states


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@dataclass(frozen=True, slots=True)
class SasrecRanker:
    """A trained model as a ranker for ``cemg.evaluation.evaluate``."""

    model: Sasrec
    config: SasrecConfig

    @torch.inference_mode()
    def __call__(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Rank the whole catalog, the histories' own items included.

        Args:
            histories: B histories of item rows, oldest first.
            top: Items per list.

        Returns:
            [B, min(top, N)] int64 item rows, best first.

        Raises:
            UserError: A history is empty, so it has no position with a state.
        """
        if any(len(h) == 0 for h in histories):
            raise UserError("SASRec cannot rank for an empty history", fix="use popularity for those users")
        table = self.model.items.weight
        items, lengths = pad_histories(histories, self.config.max_length)
        states = self.model(items.to(table.device))  # [B, L, D]
        newest = states[torch.arange(len(items)), lengths - 1]  # [B, D]
        best: Tensor = (newest @ table.T).topk(min(top, len(table)), dim=1).indices
        return best

    def save(self, folder: Path) -> None:
        """Write ``sasrec.safetensors`` and ``sasrec.json``."""
        files.save_tensors(self.model.state_dict(), folder / "sasrec.safetensors")
        about = {"num_items": self.model.items.num_embeddings, "config": asdict(self.config)}
        about["weights_sha256"] = file_digest(folder / "sasrec.safetensors")
        files.write_json(folder / "sasrec.json", signed(about))

    @classmethod
    def load(cls, folder: Path) -> SasrecRanker:
        """Read what ``save`` wrote. Raises UserError where it is missing or damaged."""
        path, weights = folder / "sasrec.json", folder / "sasrec.safetensors"
        if not path.exists():
            raise UserError(f"{folder} has no trained SASRec", fix="train one: python -m cemg.baselines")
        fix = "restore it from a copy, or train again: python -m cemg.baselines"
        record = read_json(path, dict[str, Any], fix=fix)
        about = read_json(path, _About, fix=fix)
        if about.sha256 is not None or about.weights_sha256 is not None:
            check_signature(record, name=str(path), fix=fix)
            if file_digest(weights, fix=fix) != about.weights_sha256:
                cause = "its sha256 differs from that in the manifest"
                raise DamagedError(f"{weights} is damaged", cause=cause, fix=fix)
        model = Sasrec(about.num_items, about.config)
        spec = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
        model.load_state_dict(read_tensors(weights, spec, fix=fix))
        return cls(model.eval(), about.config)


@dataclass(frozen=True, slots=True)
class _About:
    """The content of ``sasrec.json``. Earlier versions wrote no digests."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_items: PositiveInt
    config: SasrecConfig
    weights_sha256: str | None = None
    sha256: str | None = None
