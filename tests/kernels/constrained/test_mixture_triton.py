"""The Triton kernel of a beam step under a prior against the reference, with reduced tile sizes."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg_kernels import ItemPrior, RequestFilter, Trie, trie_beam_step
from cemg_kernels.constrained.beam_step import MixedStep

pytestmark = pytest.mark.medium

kernels = pytest.importorskip("cemg_kernels.constrained.beam_step_triton")
mixture = import_module("cemg_kernels.constrained.mixture_triton")

INF = float("inf")
LAST_BIT = 2**-21  # of float32 below 8, where the float64 log and exp of NumPy and torch differ


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts eight candidates at once and looks up two masses per warp, so that both need several rounds."""
    sizes = {"PER_WARP": 8, "MIN_SORTED": 8, "MIN_MERGED": 4, "LIST_SIZES": (2, 4, 8, 16), "MIN_BLOCK_K": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(mixture, "PER_WARP", 2)


def draw_trie(size: int, items: int) -> Trie:
    codes = torch.randint(size, (items, 3), generator=torch.Generator().manual_seed(size))
    return Trie.from_codes(torch.unique(codes, dim=0), size)


def draw_prior(trie: Trie, users: int) -> ItemPrior:
    rng = np.random.default_rng(users)
    counts = rng.integers(1, min(30, trie.num_items), users, endpoint=True)
    items = [rng.choice(trie.num_items, count, replace=False) for count in counts]
    return ItemPrior(items, [10.0 ** -(6 * rng.random(count)) for count in counts])


def draw_beams(trie: Trie, users: int, beams: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logits, scores of the mixture, nodes of any level and the generator's scores."""
    generator = torch.Generator().manual_seed(beams)
    nodes = torch.randint(-1, trie.arrays.num_inner, (users, beams), generator=generator).to(torch.int32)
    nodes[0, 0] = 0
    logits = torch.randn(users, beams, trie.codebook_size, generator=generator) * 2
    scores, own = -torch.rand(2, users, beams, generator=generator)
    if beams > 2:
        own[0, 0], own[1, 1], scores[1, 0], scores[0, 2] = -INF, math.nan, -INF, math.nan
    return logits, scores, nodes, own


def assert_same_step(actual: MixedStep, expected: MixedStep) -> None:
    for name, mine, other in zip(expected._fields, actual, expected, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, rtol=0, atol=LAST_BIT, msg=name)
        else:
            assert torch.equal(mine, other), name


@pytest.mark.parametrize(
    ("beams", "size", "width", "weights", "filtered"),
    [
        (1, 1, 1, (0.5, 0.5), False),
        (3, 7, 5, (0.0, 1.0), False),
        (3, 20, 8, (0.3, 1 - 1e-9), True),
        (4, 5, 9, (1e-6, 0.7), True),
    ],
)
def test_a_mixed_step_equals_the_reference(beams, size, width, weights, filtered):
    trie = draw_trie(size, 5 * size)
    logits, scores, nodes, own = draw_beams(trie, 2, beams)
    filter = RequestFilter.excluding(trie, [[0, 3], [1]]) if filtered else None
    tensors = draw_prior(trie, 2).on(trie, weights, filter)
    operands = logits, scores, nodes, trie, width, "vocab", logits.logsumexp(2), filter
    actual, expected = (
        trie_beam_step(*operands, backend=name, prior=tensors, generator_scores=own)
        for name in ("triton", "reference")
    )
    assert_same_step(actual, expected)


@pytest.mark.parametrize("normalize", ["level", "valid"])
def test_a_weight_of_0_gives_the_bits_of_a_step_without_prior(normalize):
    trie = draw_trie(6, 60)
    logits, scores, nodes, _ = draw_beams(trie, 2, 2)
    operands = logits, scores, nodes, trie, 5, normalize
    tensors = draw_prior(trie, 2).on(trie, [0.0, 0.4])
    plain = trie_beam_step(*operands, backend="triton")
    mixed = trie_beam_step(*operands, backend="triton", prior=tensors, generator_scores=scores)
    for part, expected in zip(mixed[:5], plain, strict=True):
        assert torch.equal(part[0], expected[0])
    assert torch.equal(mixed.generator_scores[0], plain.scores[0])
    reference = trie_beam_step(*operands, backend="reference", prior=tensors, generator_scores=scores)
    torch.testing.assert_close(mixed.scores[1], reference.scores[1], rtol=0, atol=1e-5)


def test_no_beams_give_no_candidates():
    trie = draw_trie(4, 12)
    for users, beams in ((2, 0), (0, 3)):
        nodes, zero = torch.zeros(users, beams, dtype=torch.int32), torch.zeros(users, beams)
        tensors = draw_prior(trie, 2).on(trie, 0.5).select(slice(0, users))
        step = trie_beam_step(torch.zeros(users, beams, 4), zero, nodes, trie, 3, "level", backend="triton",
                              prior=tensors, generator_scores=zero)  # fmt: skip
        assert step.nodes.shape == (users, 3) and (step.nodes == -1).all()
        assert step.generator_scores.isneginf().all()


def test_a_step_beyond_the_limits_runs_on_torch_unless_triton_is_named(monkeypatch):
    trie = draw_trie(3, 20)
    logits, scores, nodes, own = draw_beams(trie, 1, 2)
    tensors = draw_prior(trie, 1).on(trie, 0.5)
    wide = logits, scores, nodes, trie, 300, "level"
    with pytest.raises(ValueError, match="use backend='torch'"):
        trie_beam_step(*wide, backend="triton", prior=tensors, generator_scores=own)
    beam_step = import_module("cemg_kernels.constrained.beam_step")
    monkeypatch.setattr(beam_step, "pick", lambda op, device, backend: backend or "triton")
    actual, expected = (
        trie_beam_step(*wide, backend=name, prior=tensors, generator_scores=own) for name in (None, "torch")
    )
    assert_same_step(actual, expected)
