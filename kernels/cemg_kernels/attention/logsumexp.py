"""The log-sum-exp of each row: what a softmax over the whole vocabulary divides by.

R rows of V logits.
"""

from __future__ import annotations

from torch import Tensor

from ..runtime.dispatch import TRITON_DTYPES, pick
from ..runtime.ranges import ranged


@ranged
def row_logsumexp(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """``logits`` [R, V] of any floating dtype -> [R] float32, computed in float32; NaN where a row holds
    one, -inf where it holds nothing else. No gradient. Raises ValueError for another number of dimensions.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [R, V], got {list(logits.shape)}")
    chosen = pick("row_logsumexp", logits.device, backend)
    if chosen == "triton" and logits.dtype in TRITON_DTYPES and logits.numel():
        from .logsumexp_triton import logsumexp

        return logsumexp(logits)
    return logits.float().logsumexp(1)
