"""Layers with dropout of their output, for models whose code has none there."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DropoutLinear(nn.Linear):
    """A linear layer with dropout of its output."""

    def __init__(self, layer: nn.Linear, share: float) -> None:
        """Share the weights of ``layer``; ``share`` is the dropout rate."""
        super().__init__(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )  # on "meta" nothing is drawn from torch's generator
        self.weight, self.bias, self.share = layer.weight, layer.bias, share

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), self.share, self.training)


class DropoutEmbedding(nn.Embedding):
    """An embedding with dropout of its output."""

    def __init__(self, layer: nn.Embedding, share: float) -> None:
        """Share the weight of ``layer``; ``share`` is the dropout rate."""
        super().__init__(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        self.weight, self.share = layer.weight, share

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), self.share, self.training)
