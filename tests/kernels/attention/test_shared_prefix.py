"""Attention over a shared prompt, by every backend, against float64 and against torch's own attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels.attention.shared_prefix import shared_prefix_attention

BACKENDS = ["reference", "triton"]
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(users: int, beams: int, heads: int, groups: int, cells: int, dim: int) -> Drawn:
    """Returns query, keys, values and mask in float64; the last positions of the last user are padding."""
    generator = torch.Generator().manual_seed(users * 1000 + beams * 100 + cells + dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.zeros(users, cells, dtype=torch.float64)
    mask[-1, cells - cells // 3 :] = torch.finfo(torch.float16).min / 2
    return normal(users, beams, heads, dim), *(normal(users, groups, cells, dim) for _ in range(2)), mask


def cast(drawn: Drawn, dtype: torch.dtype) -> Drawn:
    query, keys, values, mask = (part.to(dtype) for part in drawn)
    return query, keys, values, mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 5, 4, 4, 80, 16), (2, 9, 6, 2, 130, 24), (1, 3, 8, 1, 7, 64),
              (1, 2, 2, 2, 40, 200)]
)  # fmt: skip
def test_the_result_equals_the_float64_definition(backend, shape):
    drawn = draw(*shape)
    out, lse = shared_prefix_attention(*cast(drawn, torch.float32), 0.3, backend=backend)
    expected = shared_prefix_attention(*drawn, 0.3, backend="reference")
    assert out.dtype == lse.dtype == torch.float32
    assert out.shape == drawn[0].shape and lse.shape == drawn[0].shape[:3]
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=4e-6)


def test_the_definition_equals_torch_attention():
    query, keys, values, mask = draw(3, 4, 6, 2, 11, 8)
    out, lse = shared_prefix_attention(query, keys, values, mask, 0.7, backend="reference")
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask[:, None, None], scale=0.7, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    wide = keys.repeat_interleave(3, dim=1)
    scores = torch.einsum("bwhd,bhsd->bwhs", query, wide) * 0.7 + mask[:, None, None]
    torch.testing.assert_close(lse, scores.logsumexp(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_the_output_has_the_dtype_of_the_query(backend, dtype, atol):
    """The tolerance covers a few roundings of values near 1 and of scores up to 8."""
    narrow = cast(draw(2, 6, 4, 2, 21, 32), dtype)
    out, lse = shared_prefix_attention(*narrow, 0.2, backend=backend)
    expected = shared_prefix_attention(*cast(narrow, torch.float64), 0.2, backend="reference")
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_give_the_same_result(backend):
    """As in the decoder: queries, keys and values are slices of one wider row."""
    rows = torch.randn(2, 9, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    keys, values = rows[:, :, 0].transpose(1, 2), rows[:, :, 2].transpose(1, 2)
    query = torch.randn(2, 5, 3, 2, 8, generator=torch.Generator().manual_seed(1))[:, :, 1]
    mask = torch.zeros(2, 9)
    actual = shared_prefix_attention(query, keys, values, mask, backend=backend)
    expected = shared_prefix_attention(
        query.contiguous(), keys.contiguous(), values.contiguous(), mask, backend="reference"
    )
    for actual_part, expected_part in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_part, expected_part, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min / 2, float("-inf")])
def test_left_padding_has_no_effect(backend, hidden):
    """The padding is longer than one block of the kernel and contains arbitrary finite values."""
    query, keys, values, mask = cast(draw(2, 5, 4, 2, 90, 16), torch.float32)
    mask[0, :70] = hidden
    actual = shared_prefix_attention(query[:1], keys[:1], values[:1], mask[:1], 0.5, backend=backend)
    short = keys[:1, :, 70:], values[:1, :, 70:], torch.zeros(1, 20)
    for actual_part, expected_part in zip(
        actual, shared_prefix_attention(query[:1], *short, 0.5, backend="reference"), strict=True
    ):
        torch.testing.assert_close(actual_part, expected_part, rtol=0, atol=4e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    users=st.integers(1, 3), beams=st.integers(1, 20), groups=st.integers(1, 3), share=st.integers(1, 3),
    cells=st.integers(1, 70), dim=st.integers(1, 20), scale=st.floats(0.05, 3.0),
)  # fmt: skip
def test_the_kernel_equals_the_reference_on_any_shape(users, beams, groups, share, cells, dim, scale):
    drawn = draw(users, beams, groups * share, groups, cells, dim)
    actual = shared_prefix_attention(*cast(drawn, torch.float32), scale, backend="triton")
    for actual_part, expected_part in zip(
        actual, shared_prefix_attention(*drawn, scale, backend="reference"), strict=True
    ):
        torch.testing.assert_close(actual_part.double(), expected_part, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_user_does_not_change_other_users(backend):
    query, keys, values, mask = cast(draw(3, 4, 2, 2, 8, 8), torch.float32)
    keys[1] = float("nan")
    out, lse = shared_prefix_attention(query, keys, values, mask, backend=backend)
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert not out[[0, 2]].isnan().any() and not lse[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": torch.zeros(2, 3, 7, 8)}, r"keys must be \[2, G, S, 8\] with G a divisor of 4"),
        ({"keys": torch.zeros(1, 2, 7, 8)}, "keys must be"),
        ({"keys": torch.zeros(2, 2, 0, 8)}, "keys must be"),
        ({"values": torch.zeros(2, 2, 6, 8)}, r"values must be \[2, 2, 7, 8\]"),
        ({"mask": torch.zeros(2, 6)}, r"mask must be \[2, 7\], got \[2, 6\]"),
    ],
)
def test_shapes_that_do_not_fit_are_rejected(change, message):
    good = {"query": torch.zeros(2, 5, 4, 8), "keys": torch.zeros(2, 2, 7, 8),
            "values": torch.zeros(2, 2, 7, 8), "mask": torch.zeros(2, 7)}  # fmt: skip
    assert shared_prefix_attention(**good)[0].shape == (2, 5, 4, 8)
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**(good | change))
