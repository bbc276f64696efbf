"""Small functions that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def sanitize(x):
    """Converts to float32 and replaces NaN by -inf and +inf by the largest finite value."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.minimum(x, FLOAT32_MAX), float("-inf"))


@triton.jit
def zero_if_neg_inf(x):
    """Replaces -inf by 0, so that subtracting the result from -inf does not give NaN."""
    return tl.where(x == float("-inf"), 0.0, x)
