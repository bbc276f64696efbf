"""Layers whose output drops out while they train: dropout where a model's own code has none."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DropoutLinear(nn.Linear):
    """A linear layer with dropout of what it returns."""

    def __init__(self, layer: nn.Linear, share: float) -> None:
        """With the weights of ``layer``, shared; ``share`` of the outputs is dropped."""
        super().__init__(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )  # nothing is drawn: torch's generator stays where it is
        self.weight, self.bias, self.share = layer.weight, layer.bias, share

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), self.share, self.training)


class DropoutEmbedding(nn.Embedding):
    """An embedding with dropout of what it returns."""

    def __init__(self, layer: nn.Embedding, share: float) -> None:
        """With the weight of ``layer``, shared; ``share`` of the outputs is dropped."""
        super().__init__(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        self.weight, self.share = layer.weight, share

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), self.share, self.training)
