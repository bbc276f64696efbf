"""The frequency filter of BSARec against the Fourier transform of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cemg.dense.spectrum import FrequencyFilter, low_pass


def filtered_by_transform(x: Tensor, beta: Tensor, frequencies: int) -> Tensor:
    """The reference: keep c // 2 + 1 coefficients of the transform over all positions of x [B, W, D]."""
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    spectrum[:, frequencies // 2 + 1 :] = 0
    low: Tensor = torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")
    return low + beta.square() * (x - low)


@pytest.mark.parametrize("window", [1, 2, 7, 50])
@pytest.mark.parametrize("frequencies", [1, 2, 5, 9, 100])
def test_the_filter_equals_the_fourier_transform(window: int, frequencies: int) -> None:
    torch.manual_seed(0)
    layer = FrequencyFilter(4, window=window, frequencies=frequencies)
    x = torch.randn(3, window, 4)
    expected = filtered_by_transform(x, layer.beta, frequencies)
    whole = torch.full((3,), window)
    atol = 1e-5  # float32, sums of up to 50 products
    torch.testing.assert_close(layer(x, whole, newest=False), expected, rtol=0, atol=atol)
    torch.testing.assert_close(layer(x, whole, newest=True)[:, 0], expected[:, -1], rtol=0, atol=atol)


def test_a_short_history_is_filtered_over_the_whole_window_with_zeros_before_it() -> None:
    torch.manual_seed(1)
    layer = FrequencyFilter(4, window=50, frequencies=5)
    x, lengths = torch.randn(2, 9, 4), torch.tensor([6, 9])
    for row, length in enumerate(lengths.tolist()):
        window = torch.zeros(1, 50, 4)
        window[0, 50 - length :] = x[row, :length]  # padded on the left, as in the authors' code
        expected = filtered_by_transform(window, layer.beta, 5)[0, 50 - length :]
        found = layer(x, lengths, newest=False)[row, :length]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_low_pass_is_a_projection_and_keeps_constants() -> None:
    projection = low_pass(50, 5).double()
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-6)  # float32 entries
    assert int(torch.linalg.matrix_rank(projection, atol=1e-4)) == 5
    torch.testing.assert_close(projection.sum(1), torch.ones(50).double(), rtol=0, atol=1e-6)
