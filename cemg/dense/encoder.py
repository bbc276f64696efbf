"""SASRec and BSARec: Transformers over item embeddings that score items by dot product.

B users, L positions, D embedding, N items.

Histories are padded on the right, oldest first. Positions are counted from the newest item, which has
position 0 whatever the length of the history.

Sources: Kang and McAuley, Self-Attentive Sequential Recommendation, 2018, https://arxiv.org/abs/1808.09781;
Shin et al., An Attentive Inductive Bias for Sequential Recommendation beyond the Self-Attention, 2024,
https://arxiv.org/abs/2312.10325
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.dense.config import DenseConfig
from cemg.dense.dropout import Dropout
from cemg.dense.spectrum import FrequencyFilter


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query, self.output = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.dim, 2 * config.dim)

    def forward(self, x: Tensor, lengths: Tensor, *, newest: bool) -> Tensor:
        """Map x [B, L, D] to [B, L, D], or to [B, 1, D] at the newest position of each row."""
        asked = newest_position(x, lengths) if newest else x
        query = (
            self.query(asked).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        )  # [B, heads, L or 1, D/heads]
        split = self.key_value(x).unflatten(-1, (2, self.heads, -1))  # [B, L, 2, heads, D/heads]
        key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D/heads]
        present = None  # the causal mask hides the padding, which is on the right
        if newest:
            present = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, None]
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=present, dropout_p=drop, is_causal=not newest
        )
        attended: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(config.dim, config.inner), nn.Linear(config.inner, config.dim)
        self.dropout = Dropout(config.inner_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        contracted: Tensor = self.contract(self.dropout(F.gelu(self.expand(x))))
        return contracted


class Block(nn.Module):
    """Attention and a feed-forward network, each with dropout, a residual and LayerNorm.

    A block of BSARec has ``alpha * filter + (1 - alpha) * attention`` in place of the attention. Each of the
    two has its own residual and LayerNorm.
    """

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.norm_first, self.alpha = config.norm_first, config.alpha
        self.attention, self.attention_norm = Attention(config), nn.LayerNorm(config.dim)
        self.feed_forward, self.inner_norm = FeedForward(config), nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.filter: FrequencyFilter | None = None
        if config.model == "bsarec":
            window = {"window": config.max_length, "frequencies": config.frequencies}
            self.filter, self.filter_norm = FrequencyFilter(config.dim, **window), nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, lengths: Tensor, *, newest: bool = False) -> Tensor:
        """Map x [B, L, D] to [B, L, D], or to [B, 1, D] at the newest position of each row."""
        mixed = self._mix(x, lengths, self.attention, self.attention_norm, newest)
        if self.filter is not None:
            filtered = self._mix(x, lengths, self.filter, self.filter_norm, newest)
            mixed = self.alpha * filtered + (1 - self.alpha) * mixed
        output: Tensor
        if self.norm_first:
            output = mixed + self.dropout(self.feed_forward(self.inner_norm(mixed)))
        else:
            output = self.inner_norm(mixed + self.dropout(self.feed_forward(mixed)))
        return output

    def _mix(self, x: Tensor, lengths: Tensor, layer: nn.Module, norm: nn.Module, newest: bool) -> Tensor:
        residual = newest_position(x, lengths) if newest else x
        mixed: Tensor
        if self.norm_first:
            mixed = residual + self.dropout(layer(norm(x), lengths, newest=newest))
        else:
            mixed = norm(residual + self.dropout(layer(x, lengths, newest=newest)))
        return mixed


class SequenceEncoder(nn.Module):
    """Computes a state per position. The score of an item is the dot product of state and item embedding."""

    def __init__(self, num_items: int, config: DenseConfig) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, config.dim)
        self.positions = nn.Embedding(config.max_length, config.dim)  # 0 is the newest item
        self.input_norm = nn.Identity() if config.norm_first else nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_norm = nn.LayerNorm(config.dim) if config.norm_first else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.apply(_initialize)

    def forward(self, items: Tensor, lengths: Tensor, *, newest: bool = False) -> Tensor:
        """Compute the states of ``items`` [B, L] int64: oldest first, ``lengths`` [B] items and then padding.

        Returns:
            The states [B, L, D], or with ``newest`` those of each row's newest item, [B, D]. The last block
            then computes one position per row.
        """
        age = lengths[:, None] - 1 - torch.arange(items.shape[1], device=items.device)  # [B, L]
        x = self.dropout(self.input_norm(self.items(items) + self.positions(age.clamp(min=0))))
        for block in self.blocks[:-1]:
            x = block(x, lengths)
        x = self.blocks[-1](x, lengths, newest=newest)
        states: Tensor = self.output_norm(x)
        return states[:, 0] if newest else states


def newest_position(x: Tensor, lengths: Tensor) -> Tensor:
    """Select the newest position [B, 1, D] of each row of x [B, L, D]."""
    return x[torch.arange(len(x), device=x.device), lengths - 1][:, None]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
