"""The log-sum-exp of each row of logits: the logarithm of the denominator of a softmax over the vocabulary.

R rows, V logits per row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import TRITON_DTYPES, pick
from ..runtime.ranges import ranged
from ..runtime.registry import register


@ranged
def row_logsumexp(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Computes the log-sum-exp of each row in float32. There is no gradient.

    Args:
        logits: Floating point [R, V].
        backend: "triton", "reference", or None for the dispatcher's choice.

    Returns:
        float32 [R]; NaN if the row contains NaN, -inf if all its logits are -inf.

    Raises:
        ValueError: ``logits`` is not two-dimensional.

    Example:
        >>> row_logsumexp(torch.zeros(1, 4)).exp().round().tolist()
        [4.0]
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [R, V], got {list(logits.shape)}")
    chosen = pick("row_logsumexp", logits.device, backend)
    if chosen == "triton" and logits.dtype in TRITON_DTYPES and logits.numel():
        from .logsumexp_triton import logsumexp

        return logsumexp(logits)
    return row_logsumexp_reference(logits)


def row_logsumexp_reference(logits: Tensor) -> Tensor:
    """The definition."""
    return logits.float().logsumexp(1)


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .logsumexp_triton import aot_cases

    return aot_cases(every)


register("row_logsumexp", ("triton", "reference"), aot_cases=_aot_cases)
