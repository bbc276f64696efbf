"""Attention over the tokens of each beam, by every backend, against float64 and torch's attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels.attention.beam_tree import beam_tree_attention

pytestmark = pytest.mark.medium

BACKENDS = ["reference", "triton"]
Drawn = tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]


def draw(rows: int, heads: int, groups: int, dim: int, tokens: int, *, bias: bool, prefix: bool) -> Drawn:
    """Returns query, cache, ancestors, bias and prefix in float64; the cache also has unused rows."""
    generator = torch.Generator().manual_seed(rows * 1000 + heads * 100 + dim + tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cache = normal(rows * tokens + 3, 2, groups, dim)
    ancestors = torch.randint(len(cache), (tokens, rows), generator=generator)
    given_prefix = (normal(rows, heads, dim), normal(rows, heads) * 3) if prefix else None
    return normal(rows, heads, dim), cache, ancestors, normal(tokens, heads) if bias else None, given_prefix


def cast(drawn: Drawn, dtype: torch.dtype) -> Drawn:
    query, cache, ancestors, bias, prefix = drawn
    narrow = None if prefix is None else (prefix[0].to(dtype), prefix[1].float())
    return query.to(dtype), cache.to(dtype), ancestors, None if bias is None else bias.to(dtype), narrow


def attend(drawn: Drawn, scale: float, backend: str) -> Tensor:
    query, cache, ancestors, bias, prefix = drawn
    return beam_tree_attention(query, cache, ancestors, scale, bias, prefix, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias, prefix", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (5, 4, 4, 16, 3), (7, 6, 2, 24, 4), (3, 8, 1, 64, 7), (2, 2, 2, 200, 2)]
)
def test_the_result_equals_the_float64_definition(backend, bias, prefix, shape):
    drawn = draw(*shape, bias=bias, prefix=prefix)
    expected = attend(drawn, 0.3, "reference")
    actual = attend(cast(drawn, torch.float32), 0.3, backend)
    assert actual.shape == (shape[0], shape[1] * shape[3]) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_the_output_has_the_dtype_of_the_query(backend, dtype, atol):
    """The tolerance covers a few roundings of values near 1 and of scores up to 8."""
    drawn = draw(6, 4, 2, 32, 3, bias=True, prefix=True)
    narrow = cast(drawn, dtype)
    actual = attend(narrow, 0.2, backend)
    wide = cast(cast(drawn, dtype), torch.float64)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), attend(wide, 0.2, "reference"), rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_a_prefix_equals_one_softmax_over_all_keys(backend):
    """Compares with torch's attention over the concatenated keys of the prompt and of each beam."""
    rows, heads, dim, tokens, length = 4, 2, 8, 3, 5
    query, cache, ancestors, _, _ = draw(rows, heads, heads, dim, tokens, bias=False, prefix=False)
    prompt = torch.randn(
        2, length, heads, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    scores = torch.einsum("rhd,shd->rhs", query, prompt[0]) * 0.5
    prefix = torch.einsum("rhs,shd->rhd", scores.softmax(2), prompt[1]), scores.logsumexp(2)
    actual = attend(cast((query, cache, ancestors, None, prefix), torch.float32), 0.5, backend)
    beam_cache = cache[ancestors.t()].transpose(1, 2)  # [R, 2, T, H, Dh]
    keys, values = (
        torch.cat((prompt[which].expand(rows, -1, -1, -1), beam_cache[:, which]), dim=1).transpose(1, 2)
        for which in (0, 1)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, scale=0.5)
    torch.testing.assert_close(actual.double(), expected.flatten(1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_are_read_without_a_copy(backend):
    """As in T5's decode steps: queries, keys and values are slices of one row; shared rows have stride 0."""
    made = torch.randn(4, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    ancestors = torch.tensor([[3, 2, 1, 0]])
    views = made[:, 0], made[:, 1:]
    actual = beam_tree_attention(*views, ancestors, backend=backend)
    # with one key, the output is its value
    torch.testing.assert_close(actual, made[[3, 2, 1, 0], 2].flatten(1))
    shared = made[:1, 1:].expand(4, -1, -1, -1)
    actual = beam_tree_attention(views[0], shared, ancestors, backend=backend)
    torch.testing.assert_close(actual, made[:1, 2].expand(4, -1, -1).flatten(1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6), groups=st.integers(1, 3), share=st.integers(1, 3), dim=st.integers(1, 20),
    tokens=st.integers(1, 5), bias=st.booleans(), prefix=st.booleans(), scale=st.floats(0.05, 3.0),
)  # fmt: skip
def test_the_kernel_equals_the_reference_on_any_shape(rows, groups, share, dim, tokens, bias, prefix, scale):
    drawn = draw(rows, groups * share, groups, dim, tokens, bias=bias, prefix=prefix)
    actual = attend(cast(drawn, torch.float32), scale, "triton")
    torch.testing.assert_close(actual.double(), attend(drawn, scale, "reference"), rtol=0, atol=1e-5)


def test_a_nan_row_does_not_change_other_rows():
    drawn = cast(draw(4, 2, 2, 8, 2, bias=False, prefix=False), torch.float32)
    drawn[0][1] = float("nan")
    actual = attend(drawn, 1.0, "triton")
    assert actual[1].isnan().all() and not actual[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache": torch.zeros(3, 2, 3, 8)}, r"cache must be \[N, 2, G, 8\] with G a divisor of 4"),
        ({"cache": torch.zeros(3, 1, 2, 8)}, "cache must be"),
        ({"ancestors": torch.zeros(2, 4, dtype=torch.int64)}, r"ancestors must be \[T, 5\]"),
        ({"ancestors": torch.zeros(0, 5, dtype=torch.int64)}, "T of at least 1"),
        ({"bias": torch.zeros(3, 4)}, r"bias must be \[2, 4\], got \[3, 4\]"),
        ({"prefix": (torch.zeros(5, 4, 8), torch.zeros(5))}, r"prefix must be \[5, 4, 8\] and \[5, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_rejected(change, message):
    good = {"query": torch.zeros(5, 4, 8), "cache": torch.zeros(3, 2, 2, 8),
            "ancestors": torch.zeros(2, 5, dtype=torch.int64)}  # fmt: skip
    assert beam_tree_attention(**good).shape == (5, 32)
    with pytest.raises(ValueError, match=message):
        beam_tree_attention(**(good | change))
