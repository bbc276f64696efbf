"""Dropout from eight random bits per element.

``torch.nn.Dropout`` draws 32 bits or more per element, which is a tenth of a training step on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 256  # the rate is rounded to a multiple of 1 / STEPS


class Dropout(nn.Module):
    """Sets elements to zero with probability ``rate``, rounded to 1/256, and scales the others.

    The bits are those of torch's generator on the CPU. On other devices this is ``torch.nn.Dropout``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.threshold = rate, round(rate * STEPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return x where the module is not in training mode."""
        if not self.training or self.threshold == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view_as(x) >= self.threshold
        return x * (kept * (STEPS / (STEPS - self.threshold)))
