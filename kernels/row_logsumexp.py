"""The log-sum-exp of rows: what turns logits over a vocabulary into log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import native, pick
from .ranges import ranged


@ranged
def row_logsumexp(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """``log(sum(exp(logits)))`` over the columns of ``logits`` [R, V], float32 [R].

    -inf for a row of -inf, NaN where one is; it has no gradient. ``backend``: "native" (float32 on the CPU,
    columns side by side, rows any distance apart), "reference" (torch's own), or None for the dispatcher's.
    Raises ValueError where ``logits`` are no rows of one column or more, or the backend does not serve them.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [R, V] with V >= 1, got {list(logits.shape)}")
    served = logits.dtype == torch.float32 and (logits.stride(1) == 1 or logits.shape[1] == 1)
    if backend is None and not served:
        backend = "reference"
    if pick("row_logsumexp", logits.device, backend) == "reference":
        return logits.detach().float().logsumexp(1)
    if not served:
        raise ValueError(
            f"the native backend takes float32, columns side by side, got {logits.dtype} of strides "
            f"{logits.stride()}; use reference"
        )
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.float32)
    native().row_logsumexp(logits.data_ptr(), rows, width, logits.stride(0), out.data_ptr())
    return out
