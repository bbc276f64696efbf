"""Attention of many queries over the same keys: every backend against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cemg_kernels import prefix_attention

LOWEST = torch.finfo(torch.float32).min


def draw(users: int, heads: int, groups: int, queries: int, keys: int, size: int) -> tuple[Tensor, ...]:
    """query [B, H, Q, Dh] out of rows of heads, keys and values [B, G, S, Dh] out of one tensor of both."""
    generator = torch.Generator().manual_seed(users + heads + queries)
    query = torch.randn(users, queries, heads, size, generator=generator).transpose(1, 2)
    both = torch.randn(users, keys, 2 * groups, size, generator=generator).transpose(1, 2)
    return query, both[:, :groups], both[:, groups:]


def terms_of(kind: str, users: int, heads: int, queries: int, keys: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(heads, queries, keys, generator=generator)
    padding = torch.zeros(users, keys)
    padding[0, keys // 2 :] = LOWEST
    return {"none": {}, "bias": {"bias": bias}, "padding": {"padding": padding},
            "all": {"bias": bias, "padding": padding, "causal": queries <= keys}}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "bias", "padding", "all"])
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 7, 9), (1, 6, 6, 50, 80, 64), (3, 4, 2, 67, 70, 32),
              (2, 9, 3, 13, 33, 16), (1, 2, 1, 6, 32, 40), (2, 2, 2, 129, 5, 64)],
)  # fmt: skip
def test_every_backend_equals_the_definition_in_float64(shape, backend, kind):
    users, heads, _, queries, keys, _ = shape
    operands, terms = draw(*shape), terms_of(kind, users, heads, queries, keys)
    wanted, wanted_lse = prefix_attention(
        *(t.double() for t in operands), 0.3, **terms, with_lse=True, backend="reference"
    )
    out, lse = prefix_attention(*operands, 0.3, **terms, with_lse=backend != "torch", backend=backend)
    # sums of up to 80 float32 terms of size < 4, an exponential within 2**-22
    torch.testing.assert_close(out.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    if lse is not None:
        torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=1e-5, atol=1e-5)
    assert out.shape == operands[0].shape and (lse is None) == (backend == "torch")


def test_users_and_threads_do_not_change_a_row():
    query, keys, values = draw(4, 3, 3, 20, 30, 16)
    whole, lse = prefix_attention(query, keys, values, with_lse=True, backend="native")
    one, its_lse = prefix_attention(query[2:3], keys[2:3], values[2:3], with_lse=True, backend="native")
    assert torch.equal(whole[2:3], one) and torch.equal(lse[2:3], its_lse)


def test_a_user_whose_keys_are_all_padding_gets_numbers_and_no_nan():
    query, keys, values = draw(1, 2, 2, 3, 4, 16)
    out, _ = prefix_attention(query, keys, values, padding=torch.full((1, 4), LOWEST), backend="native")
    assert out.isfinite().all()


def test_what_does_not_fit_is_refused():
    query, keys, values = draw(2, 4, 4, 3, 5, 8)
    with pytest.raises(ValueError, match=r"keys and values must be \[2, G, S, 8\] with G dividing 4"):
        prefix_attention(query, keys[:, :3], values[:, :3])
    with pytest.raises(ValueError, match=r"bias must be \[4, 3, 5\], got \[3, 5\]"):
        prefix_attention(query, keys, values, bias=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="6 queries cannot be the last of 5 keys"):
        prefix_attention(query.repeat(1, 1, 2, 1), keys, values, causal=True)
    with pytest.raises(ValueError, match="takes float32"):
        prefix_attention(query.bfloat16(), keys.bfloat16(), values.bfloat16(), backend="native")
    with pytest.raises(ValueError, match="no log-sum-exp"):
        prefix_attention(query, keys, values, with_lse=True, backend="torch")
