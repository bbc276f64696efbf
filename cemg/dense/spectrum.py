"""The frequency filter of BSARec.

L positions, W window, D embedding, c frequencies. The filter keeps the lowest frequencies of each dimension
and scales the others: ``low + beta² (x - low)``, where ``low`` is the inverse Fourier transform of the lowest
frequencies of x. That is a projection, one fixed [W, W] matrix, so no transform is computed.

The window has ``max_length`` positions whatever the length of a history, and positions without an item are
zero. The projection is circulant: it depends on the distance of two positions only. So it makes no
difference on which side the window is padded, and a result does not depend on the other rows of a batch.
The authors' code fills these positions with their position embedding instead.

Source: Shin et al., An Attentive Inductive Bias for Sequential Recommendation beyond the Self-Attention,
2024, https://arxiv.org/abs/2312.10325
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def low_pass(window: int, frequencies: int) -> Tensor:
    """Compute the projection [W, W] float32 on the lowest frequencies.

    Entry (s, t) is ``(1 + 2 Σ_f cos(2π f (s - t) / W)) / W`` over f = 1 … c // 2. The frequency W / 2 of an
    even window counts once. ``frequencies // 2 + 1`` coefficients of the real Fourier transform are kept, as
    in the authors' code.
    """
    distance = torch.arange(window, dtype=torch.float64)[:, None] - torch.arange(window)  # [W, W]
    total = torch.ones_like(distance)
    for f in range(1, min(frequencies // 2, window // 2) + 1):
        count = 1 if 2 * f == window else 2
        total += count * torch.cos(2 * torch.pi * f * distance / window)
    return (total / window).float()


class FrequencyFilter(nn.Module):
    """Computes ``low + beta² (x - low)``. ``beta`` [D] is learned, one weight per dimension."""

    projection: Tensor

    def __init__(self, dim: int, *, window: int, frequencies: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.randn(dim))
        self.register_buffer("projection", low_pass(window, frequencies), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor, *, newest: bool) -> Tensor:
        """Filter x [B, L, D], whose rows have ``lengths`` [B] positions and then padding.

        Returns:
            [B, L, D], or [B, 1, D] at the newest position of each row.
        """
        length = x.shape[1]
        present = torch.arange(length, device=x.device) < lengths[:, None]  # [B, L]
        masked = x * present[:, :, None]
        if newest:
            weights = self.projection[lengths - 1, :length][:, None]  # [B, 1, L]
            x = x[torch.arange(len(x), device=x.device), lengths - 1][:, None]
        else:
            weights = self.projection[:length, :length]
        low = weights @ masked
        return low + self.beta.square() * (x - low)
