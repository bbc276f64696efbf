"""Log-sum-exp of rows: the C++ against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

from cemg_kernels import row_logsumexp

INF = float("inf")
TOLERANCE = {"rtol": 2**-22, "atol": 2**-21}  # an exponential's error, and the rounding of the sums


def normal(*shape: int, scale: float = 5.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 1), (3, 7), (5, 31), (2, 32), (4, 257), (50, 1023), (3, 33152)]
)
@pytest.mark.parametrize("scale", [0.0, 5.0, 100.0])
def test_the_native_backend_equals_the_reference(shape, scale):
    logits = normal(*shape, scale=scale)
    wanted = logits.double().logsumexp(1).float()
    torch.testing.assert_close(row_logsumexp(logits, backend="native"), wanted, **TOLERANCE)
    torch.testing.assert_close(row_logsumexp(logits, backend="reference"), wanted, **TOLERANCE)


def test_rows_may_lie_any_distance_apart():
    wide = normal(6, 100)
    for part in (wide[:, 10:77], wide[::2], wide[:, 3:4], wide[2].expand(4, 100)):
        torch.testing.assert_close(row_logsumexp(part, backend="native"), part.logsumexp(1), **TOLERANCE)


@pytest.mark.parametrize("width", [1, 33, 300])
@pytest.mark.parametrize("value", [INF, -INF, float("nan"), 3e38, -3e38])
def test_infinities_and_nan_give_what_they_give_in_torch(width, value):
    logits = normal(4, width)
    logits[0] = value
    logits[1, width // 2] = value
    logits[2, 0], logits[2, -1] = INF, value
    torch.testing.assert_close(
        row_logsumexp(logits, backend="native"), logits.logsumexp(1), equal_nan=True, **TOLERANCE
    )


def test_the_dispatcher_leaves_to_torch_what_the_native_backend_does_not_take():
    assert row_logsumexp(normal(4, 9).bfloat16()).dtype == torch.float32
    turned = normal(9, 4).t()
    torch.testing.assert_close(row_logsumexp(turned), turned.logsumexp(1), **TOLERANCE)


def test_what_does_not_fit_is_refused():
    for shape in ((3,), (2, 3, 4), (2, 0)):
        with pytest.raises(ValueError, match=r"logits must be \[R, V\]"):
            row_logsumexp(torch.zeros(shape))
    for logits in (normal(4, 9).bfloat16(), normal(9, 4).t()):
        with pytest.raises(ValueError, match="takes float32, columns side by side"):
            row_logsumexp(logits, backend="native")
