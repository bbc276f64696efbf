"""The log-sum-exp of each row, by every backend, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg_kernels.attention.logsumexp import row_logsumexp

BACKENDS = ["reference", "triton"]
INF = math.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000), (2, 20_001)])
def test_the_result_equals_the_float64_definition(backend, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5
    actual = row_logsumexp(logits, backend=backend)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), logits.double().logsumexp(1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(backend, dtype):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = row_logsumexp(logits, backend=backend)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, logits.float().logsumexp(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_give_the_same_result(backend):
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    for view in (wide[:, 3:30], wide[::2], wide.t()):
        actual = row_logsumexp(view, backend=backend)
        torch.testing.assert_close(actual, view.logsumexp(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_do_not_change_other_rows(backend):
    rows = [
        [0.0, -INF],
        [-INF, -INF],
        [INF, 1.0],
        [math.nan, 0.0],
        [math.nan, INF],
        [3e38, 3e38],
        [-3e38, -3e38],
    ]
    logits = torch.tensor(rows)
    torch.testing.assert_close(row_logsumexp(logits, backend=backend), logits.logsumexp(1), equal_nan=True)
    assert row_logsumexp(torch.zeros(0, 5), backend=backend).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_rows_of_special_values_equal_the_definition(rows, columns, backend, seed):
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, 1.0, -2.0, 88.0, 3e38, -3e38, -INF, -INF, INF, math.nan])
    kept = odd[: 4 + seed % 7]  # more special values with a larger seed
    logits = kept[torch.randint(len(kept), (rows, columns), generator=generator)]
    torch.testing.assert_close(row_logsumexp(logits, backend=backend), logits.logsumexp(1), equal_nan=True)


def test_a_wrong_number_of_dimensions_is_rejected():
    with pytest.raises(ValueError, match=r"logits must be \[R, V\], got \[2, 3, 4\]"):
        row_logsumexp(torch.zeros(2, 3, 4))
