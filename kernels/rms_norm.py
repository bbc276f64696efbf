"""Root-mean-square normalisation of rows, as T5 and Llama do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import native, pick
from .ranges import ranged


@ranged
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension of ``x`` [..., d]; ``weight`` [d].

    ``backend``: "native" (float32, contiguous, on the CPU), "reference" (torch's own), or None for the
    dispatcher's. Raises ValueError where ``weight`` does not fit, or the backend does not serve the input.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    served = x.dtype == weight.dtype == torch.float32 and x.is_contiguous()
    if backend is None and not served:
        backend = "reference"
    if pick("rms_norm", x.device, backend) == "reference":
        return F.rms_norm(x, weight.shape, weight, eps)
    if not served:
        raise ValueError(f"the native backend takes contiguous float32, got {x.dtype}; use reference")
    out = torch.empty_like(x)
    width = weight.numel()
    native().rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, out.data_ptr())
    return out
