"""Who moves and who stays, at what cost; and new items among codes that are taken."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg.errors import UserError
from cemg.tokenizer import make_unique, place_new
from cemg.tokenizer.collisions import _transport
from cemg_kernels import Trie, residual_quantize


def crowd(items: int, levels: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, latents and codebooks; most items crowd around one point, so that groups overflow."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(levels, size, 2, generator=generator)
    spread = torch.where(torch.rand(items, 1, generator=generator) < 0.7, 0.05, 1.5)
    z = spread * torch.randn(items, 2, generator=generator)
    return residual_quantize(z, codebooks)[0].long(), z, codebooks


def alone(codes: Tensor) -> Tensor:
    """True for items whose codes nobody else has, [N]."""
    _, inverse, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    return counts[inverse] == 1


def cost_of(codes: Tensor, z: Tensor, codebooks: Tensor) -> float:
    """Sum over the items of the squared distance to what their codes stand for."""
    chosen = sum(codebooks[m, codes[:, m]].double() for m in range(codes.shape[1]))
    return float((z.double() - chosen).square().sum())


@settings(max_examples=80, deadline=None)
@given(
    share=st.floats(0.1, 1.0), levels=st.integers(1, 3), size=st.integers(2, 4), seed=st.integers(0, 10_000)
)
def test_items_without_collisions_keep_their_codes_even_beside_overflowing_groups(share, levels, size, seed):
    items = max(1, int(share * size**levels))
    codes, z, codebooks = crowd(items, levels, size, seed)
    made = make_unique(codes, z, codebooks)
    assert bool(alone(made.codes).all())
    assert torch.equal(made.codes[alone(codes)], codes[alone(codes)])
    assert made.colliding_before == int((~alone(codes)).sum())
    assert made.changed_codes == int((made.codes != codes).sum())


@settings(max_examples=40, deadline=None)
@given(items=st.integers(1, 4), size=st.integers(4, 5), seed=st.integers(0, 10_000))
def test_the_colliding_items_of_a_small_group_are_placed_at_minimum_cost(items, size, seed):
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(2, size, 2, generator=generator)
    z = codebooks[0, 1] + torch.randn(items, 2, generator=generator)
    codes = torch.ones(items, 2, dtype=torch.int64)
    codes[:, 1] = torch.cdist(z - codebooks[0, 1], codebooks[1]).argmin(1)  # all of one group
    stay, go = alone(codes), ~alone(codes)
    free = [k for k in range(size) if k not in codes[stay, 1].tolist()]
    options = []
    for last in itertools.permutations(free, int(go.sum())):
        option = codes.clone()
        option[go, 1] = torch.tensor(last, dtype=torch.int64)
        options.append(cost_of(option, z, codebooks))
    made = make_unique(codes, z, codebooks).codes
    assert cost_of(made, z, codebooks) == pytest.approx(min(options), rel=1e-9)
    assert not (made[:, 0] != 1).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(["assign", "sinkhorn"]))
def test_items_that_fill_every_semantic_id_get_each_of_them_once(seed, method):
    codes, z, codebooks = crowd(27, 3, 3, seed)
    made = make_unique(codes, z, codebooks, method=method).codes
    assert sorted(map(tuple, made.tolist())) == list(itertools.product(range(3), repeat=3))


def test_an_item_with_unique_codes_stays_when_its_group_overflows():
    codebooks = torch.tensor([[[0.0], [10.0]], [[0.0], [1.0]]])
    z = torch.tensor([[1.4], [0.1], [0.0]])  # the first is the farthest of the three, and alone in (0, 1)
    codes = torch.tensor([[0, 1], [0, 0], [0, 0]])
    made = make_unique(codes, z, codebooks)
    assert made.codes.tolist() == [[0, 1], [1, 0], [0, 0]] and made.moved_items == 1


def test_an_item_with_unique_codes_is_not_displaced_by_a_moved_item():
    codebooks = torch.tensor([[[0.0], [2.0]], [[0.0], [0.1]]])
    z = torch.tensor([[0.0], [0.0], [0.01], [2.0]])
    codes = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0]])  # what moves to prefix 1 would like (1, 0) best
    made = make_unique(codes, z, codebooks)
    assert made.codes[3].tolist() == [1, 0]
    assert made.codes[2].tolist() == [1, 1]


def test_a_group_that_overflows_loses_its_surplus_and_no_more():
    codebooks = torch.tensor([[[0.0], [1.0], [5.0]], [[0.0], [0.1], [0.2]]])
    made = make_unique(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 1), codebooks)
    assert made.moved_items == 2
    assert made.codes[:, 0].bincount().tolist() == [3, 2]


def test_codes_without_a_collision_are_returned_unchanged():
    codes = torch.tensor([[0, 1], [1, 0], [1, 1]])
    made = make_unique(codes, torch.randn(3, 2), torch.randn(2, 2, 2))
    assert torch.equal(made.codes, codes)
    assert (made.colliding_before, made.changed_codes, made.moved_items, made.changed_share) == (0, 0, 0, 0.0)


def test_the_input_codes_are_not_modified():
    codes, z, codebooks = crowd(12, 2, 4, 0)
    before = codes.clone()
    for method in ("assign", "sinkhorn", "suffix"):
        make_unique(codes, z, codebooks[:, :4].repeat(1, 3, 1), method=method)
    assert torch.equal(codes, before)


def test_an_empty_set_of_items_is_valid():
    for method, levels in (("assign", 2), ("sinkhorn", 2), ("suffix", 3)):
        made = make_unique(
            torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(2, 4, 3), method=method
        )
        assert made.codes.shape == (0, levels)


def test_the_transport_plan_gives_each_item_one_unit_and_balances_the_codes():
    cost = torch.rand(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost[:, 0] -= 1.0  # everybody would like code 0
    plan = _transport(cost).exp()
    torch.testing.assert_close(plan.sum(1), torch.ones(8, dtype=torch.float64))
    assert (cost.argmin(1) == 0).all()
    assert plan.argmax(1).bincount(minlength=4).max() < 8


@settings(max_examples=40, deadline=None)
@given(new=st.integers(0, 12), seed=st.integers(0, 10_000))
def test_a_new_item_never_gets_an_id_that_is_taken_or_given_already(new, seed):
    codes, z, codebooks = crowd(27, 3, 3, seed)
    taken = make_unique(codes[new:], z[new:], codebooks).codes
    before = taken.clone()
    placed = place_new(codes[:new], z[:new], codebooks, taken=Trie.from_codes(taken, 3))
    assert placed.shape == (new, 3) and torch.equal(taken, before)
    assert bool(alone(torch.cat([taken, placed])).all())


def test_a_new_item_keeps_its_prefix_while_that_has_room_and_takes_the_nearest_free_code():
    codebooks = torch.tensor([[[0.0], [9.0]], [[0.0], [1.0]]])
    codes, z = torch.tensor([[0, 0]] * 3), torch.tensor([[0.1]] * 3)
    taken = Trie.from_codes([[1, 1]], 2)
    assert place_new(codes, z, codebooks, taken=taken).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_a_new_suffix_continues_after_the_used_ones():
    taken = Trie.from_codes([[1, 2, 0], [1, 2, 1], [0, 0, 0]], 4)
    codes = torch.tensor([[1, 2], [3, 3], [1, 2]])
    placed = place_new(codes, torch.zeros(3, 1), torch.zeros(2, 4, 1), taken=taken, method="suffix")
    assert placed.tolist() == [[1, 2, 2], [3, 3, 0], [1, 2, 3]]


def test_a_new_item_is_refused_where_its_suffixes_or_all_semantic_ids_are_taken():
    full = Trie.from_codes([[0, 0, k] for k in range(4)], 4)
    one, z = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 1)
    with pytest.raises(UserError, match=r"no semantic ID is free for the codes \(0, 0\)"):
        place_new(one, z, torch.zeros(2, 4, 1), taken=full, method="suffix")
    every = Trie.from_codes(torch.cartesian_prod(torch.arange(2), torch.arange(2)), 2)
    with pytest.raises(UserError, match="no semantic ID is free"):
        place_new(one, z, torch.zeros(2, 2, 1), taken=every)
