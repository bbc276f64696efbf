"""Semantic IDs of their own: unique for every method, least cost for `assign`, and refusals with sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg.errors import UserError
from cemg.tokenizer import collisions, make_unique, place_new
from cemg_kernels import Trie, residual_quantize


def draw(items: int, levels: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents in a few clumps, so that many collide; their codes; the codebooks."""
    generator = torch.Generator().manual_seed(seed)
    books = (
        torch.randn(levels, size, 3, generator=generator)
        * torch.tensor([1.0, 0.5, 0.25, 0.1])[:levels, None, None]
    )
    centers = torch.randn(max(items // 4, 1), 3, generator=generator)
    z = centers[torch.randint(len(centers), (items,), generator=generator)]
    z = z + 0.01 * torch.randn(items, 3, generator=generator)
    return residual_quantize(z, books)[0].long(), z, books


def distinct(codes: torch.Tensor) -> bool:
    return len(codes.unique(dim=0)) == len(codes)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 3),
    st.integers(4, 8),
    st.integers(0, 999),
    st.sampled_from(["assign", "sinkhorn"]),
)
def test_codes_become_unique_and_stay_in_range(
    items: int, levels: int, size: int, seed: int, method: str
) -> None:
    items = min(items, size**levels)
    codes, z, books = draw(items, levels, size, seed)
    made = make_unique(codes, z, books, method=method)
    assert distinct(made.codes) and made.codes.shape == codes.shape
    assert int(made.codes.min()) >= 0 and int(made.codes.max()) < size


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 999))
def test_assign_keeps_the_codes_of_every_item_without_a_collision(items: int, seed: int) -> None:
    codes, z, books = draw(items, 2, 8, seed)
    if max(codes[:, 0].bincount().tolist()) > 8:
        return  # a group above K also moves items to other prefixes
    _, inverse, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    alone = counts[inverse] == 1
    made = make_unique(codes, z, books)
    assert torch.equal(made.codes[alone], codes[alone])
    assert torch.equal(made.codes[:, :-1], codes[:, :-1])
    assert made.colliding_before == int((~alone).sum())


@pytest.mark.parametrize("seed", range(5))
def test_assign_reaches_the_minimum_cost_of_all_assignments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    books = torch.randn(2, 4, 3, generator=generator)
    z = books[0, 1] + 0.1 * torch.randn(3, 3, generator=generator)  # three items, one group
    codes = torch.tensor([[1, 2]] * 3)
    cost = torch.cdist((z - books[0, 1]).double(), books[1].double()).square()
    best = min(sum(cost[i, c] for i, c in enumerate(p)) for p in itertools.permutations(range(4), 3))
    made = make_unique(codes, z, books).codes
    assert (made[:, 0] == 1).all()
    torch.testing.assert_close(sum(cost[i, int(c)] for i, c in enumerate(made[:, 1])), best)


def test_the_surplus_of_a_full_group_moves_to_the_nearest_prefix() -> None:
    books = torch.tensor([[[0.0], [1.0], [5.0]], [[0.0], [0.1], [0.2]]])
    z = torch.tensor([[0.0], [0.0], [0.0], [0.1], [0.1]])
    made = make_unique(residual_quantize(z, books)[0].long(), z, books)
    assert distinct(made.codes) and made.moved_items == 2
    assert sorted(made.codes[:, 0].tolist()) == [0, 0, 0, 1, 1]  # prefix 1 is nearer than prefix 2


@pytest.mark.parametrize("method", ["assign", "sinkhorn"])
def test_exactly_as_many_items_as_ids_fit_and_one_more_is_refused(method: str) -> None:
    codes, z, books = draw(9, 2, 3, 0)
    assert distinct(make_unique(codes, z, books, method=method).codes)
    codes, z, books = draw(10, 2, 3, 0)
    with pytest.raises(UserError, match="10 items do not fit 2 levels of 3 codes"):
        make_unique(codes, z, books, method=method)


def test_suffix_counts_within_a_group_and_keeps_the_codes() -> None:
    codes = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 2]])
    made = make_unique(codes, torch.zeros(4, 3), torch.zeros(2, 4, 3), method="suffix")
    assert made.codes.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 2, 2]]


def test_a_suffix_group_above_k_is_refused_with_its_size() -> None:
    with pytest.raises(UserError, match="5 items share the codes"):
        make_unique(
            torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 3), torch.zeros(2, 4, 3), method="suffix"
        )


def test_an_unknown_method_is_refused() -> None:
    codes, z, books = draw(4, 2, 4, 0)
    with pytest.raises(UserError, match="assign, sinkhorn or suffix"):
        make_unique(codes, z, books, method="hash")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 999), st.sampled_from(["assign", "suffix"]))
def test_new_items_get_unused_semantic_ids(new: int, seed: int, method: str) -> None:
    codes, z, books = draw(24, 2, 24, seed)  # as many codes as items: no suffix group can be too large
    taken = make_unique(codes[: 24 - new], z[: 24 - new], books, method=method).codes
    trie = Trie.from_codes(taken, 24)
    placed = place_new(codes[24 - new :], z[24 - new :], books, taken=trie, method=method)
    assert distinct(torch.cat([taken, placed]))


def test_a_new_item_keeps_its_nearest_code_where_that_is_free() -> None:
    codes, z, books = draw(1, 2, 8, 3)
    taken = Trie.from_codes((codes + 1) % 8, 8)
    assert torch.equal(place_new(codes, z, books, taken=taken), codes)


@pytest.mark.parametrize("method", ["assign", "sinkhorn", "suffix"])
@pytest.mark.parametrize("seed", range(4))
def test_ids_too_long_for_one_integer_are_repaired_like_short_ones(
    method: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, z, books = draw(60, 3, 6, seed)
    codes[:10, :-1] = codes[0, :-1]  # more than a group holds
    packed = make_unique(codes, z, books, method=method) if method != "suffix" else None
    monkeypatch.setattr(collisions, "_is_packable", lambda size, levels: False)
    if packed is None:
        wanted = [codes[:i].eq(row).all(1).sum().item() for i, row in enumerate(codes)]
        assert collisions._suffix(codes, 60)[:, -1].tolist() == wanted
        return
    rows = make_unique(codes, z, books, method=method)
    assert torch.equal(rows.codes, packed.codes)
    assert rows.moved_items == packed.moved_items > 0


def test_only_groups_with_colliding_items_are_held_in_the_order_of_their_first_items() -> None:
    codes = torch.tensor([[2, 0], [1, 3], [0, 1], [2, 0], [1, 3], [0, 2], [2, 5]])
    movable = collisions._colliding(codes, 6)
    assert movable.tolist() == [True, True, False, True, True, False, False]
    assert list(collisions._groups(codes, 6, movable).items()) == [((2,), [0, 3, 6]), ((1,), [1, 4])]
    sizes = collisions._sizes(codes, 6)
    assert [sizes[(prefix,)] for prefix in (0, 1, 2, 5)] == [2, 2, 3, 0]
