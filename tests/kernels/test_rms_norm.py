"""RMSNorm: the C++ against torch's own."""

from __future__ import annotations

import pytest
import torch

from cemg_kernels import rms_norm


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 33), (400, 128), (0, 8)])
def test_the_native_backend_equals_the_reference(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator) * 3, torch.randn(shape[-1], generator=generator)
    wanted = rms_norm(x.double(), weight.double(), 1e-6, backend="reference")
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-6, backend="native").double(), wanted, rtol=1e-5, atol=1e-6
    )


def test_a_row_of_zeros_stays_zero_and_what_does_not_fit_is_refused():
    assert not rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6, backend="native").any()
    with pytest.raises(ValueError, match=r"weight must be \[4\]"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="takes contiguous float32"):
        rms_norm(torch.zeros(2, 4).bfloat16(), torch.ones(4), 1e-6, backend="native")
    with pytest.raises(ValueError, match="takes contiguous float32"):
        rms_norm(torch.zeros(4, 2).t(), torch.ones(4), 1e-6, backend="native")
