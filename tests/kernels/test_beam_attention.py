"""Beams over their own tokens: every backend against a loop, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import beam_attention
from cemg_kernels.beam_attention import Prefix, Step

BACKENDS = ["native", "reference"]


def by_hand(
    query: Tensor, steps: list[Step], ancestors: Tensor, scale: float, bias: Tensor | None,
    prompt: Step | None,
) -> Tensor:  # fmt: skip
    """One softmax a row and head, in float64; ``prompt``: keys and values [B, G, S, Dh] seen as well."""
    users, beams, heads, _ = query.shape
    shared = heads // steps[0][0].shape[1]
    out = []
    for row in range(users * beams):
        user, beam = divmod(row, beams)
        for head in range(heads):
            keys = [keys[ancestors[t, row], head // shared] for t, (keys, _) in enumerate(steps)]
            values = [values[ancestors[t, row], head // shared] for t, (_, values) in enumerate(steps)]
            added = [0.0 if bias is None else float(bias[t, head]) for t in range(len(steps))]
            if prompt is not None:
                keys += list(prompt[0][user, head // shared])
                values += list(prompt[1][user, head // shared])
                added += [0.0] * prompt[0].shape[2]
            scores = torch.stack(keys).double() @ query[user, beam, head].double() * scale
            weights = (scores + torch.tensor(added, dtype=torch.float64)).softmax(0)
            out.append(weights @ torch.stack(values).double())
    return torch.stack(out).view(users * beams, -1)


def case(
    seed: int, users: int, beams: int, groups: int, shared: int, size: int, steps: int
) -> tuple[Tensor, list[Step], Tensor, Tensor]:
    """Random queries, steps whose first has a row a user, ancestors and bias; keys lie in wider rows."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(users, beams, groups * shared, size, generator=g)
    rows = [users, *[users * beams] * (steps - 1)]
    wide = [torch.randn(r, 3, groups, size, generator=g) for r in rows]
    ancestors = torch.stack([torch.randint(0, r, (users * beams,), generator=g) for r in rows])
    bias = torch.randn(steps, groups * shared, generator=g)
    return query, [(w[:, 1], w[:, 2]) for w in wide], ancestors.to(torch.int32), bias


def folded_prefix(query: Tensor, prompt: Step, scale: float) -> Prefix:
    """Attention over the prompt alone, as a decoder would pass it: not contiguous."""
    users, beams, heads, size = query.shape
    groups = prompt[0].shape[1]
    folded = query.view(users, beams, groups, heads // groups, size).transpose(1, 2).flatten(2, 3)
    scores = folded @ prompt[0].transpose(2, 3) * scale
    out = (scores.softmax(3) @ prompt[1]).transpose(1, 2).contiguous().transpose(1, 2)
    return Prefix(out, scores.logsumexp(3))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    seed=st.integers(0, 10**6), users=st.integers(1, 3), beams=st.integers(1, 5), groups=st.integers(1, 3),
    shared=st.integers(1, 3), size=st.integers(1, 35), steps=st.integers(1, 4), biased=st.booleans(),
    length=st.integers(0, 4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_backend_equals_the_softmax_by_hand(
    backend, seed, users, beams, groups, shared, size, steps, biased, length
):
    query, pairs, ancestors, bias = case(seed, users, beams, groups, shared, size, steps)
    g = torch.Generator().manual_seed(seed + 1)
    prompt = None
    if length:
        prompt = tuple(torch.randn(2, users, groups, length, size, generator=g))
    found = beam_attention(
        query, pairs, ancestors, 0.3, bias if biased else None,
        folded_prefix(query, prompt, 0.3) if prompt else None, backend=backend,
    )  # fmt: skip
    wanted = by_hand(query, pairs, ancestors, 0.3, bias if biased else None, prompt)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_too_large_for_exp_stay_finite(backend):
    query, pairs, ancestors, _ = case(0, 1, 2, 1, 1, 4, 3)
    found = beam_attention(query * 1e3, pairs, ancestors, 1.0, backend=backend)
    torch.testing.assert_close(
        found.double(), by_hand(query * 1e3, pairs, ancestors, 1.0, None, None), rtol=1e-3, atol=1e-3
    )


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    query, pairs, ancestors, _ = case(0, 2, 3, 2, 1, 4, 2)
    with pytest.raises(ValueError, match=r"ancestors must be int32 \[2, 6\]"):
        beam_attention(query, pairs, ancestors[:1])
    with pytest.raises(ValueError, match="G dividing 2"):
        beam_attention(query, [(k[:, :, :3], v[:, :, :3]) for k, v in pairs], ancestors)
    with pytest.raises(ValueError, match="takes float32"):
        beam_attention(query.double(), pairs, ancestors, backend="native")
    with pytest.raises(ValueError, match="contiguous within a row"):
        flipped = [(k.transpose(1, 2).contiguous().transpose(1, 2), v) for k, v in pairs]
        beam_attention(query, flipped, ancestors, backend="native")
