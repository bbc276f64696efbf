"""Every trie operation, on both backends, against a dict of prefixes.

B rows, L levels, K codes a level, N items.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cemg_kernels
from cemg_kernels import ItemFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.trie.arrays import DuplicateCodes
from cemg_kernels.trie.build import build, build_reference

from ...helpers import draw_codes

SHAPES = [  # N, L, K
    (1, 1, 1),
    (5, 1, 7),
    (7, 1, 7),  # a full root
    (30, 3, 4),
    (64, 3, 4),  # full everywhere
    (200, 4, 256),
    (200, 2, 300),  # two-byte codes
    (40, 8, 4096),  # keys of 96 bits
]


class DictTrie:
    """Brute force: the rows below each prefix."""

    def __init__(self, codes: Tensor, allowed: set[int] | None = None) -> None:
        self.below: dict[tuple[int, ...], set[int]] = {}
        for row, code in enumerate(codes.tolist()):
            for m in range(len(code) + 1):
                if allowed is None or row in allowed:
                    self.below.setdefault(tuple(code[:m]), set()).add(row)

    def children(self, prefix: tuple[int, ...], size: int) -> list[int]:
        return [k for k in range(size) if (*prefix, k) in self.below]


def assert_trie_equals_dict(trie: Trie, codes: Tensor, brute: DictTrie, filter: ItemFilter | None) -> None:
    everything = DictTrie(codes)
    prefixes = sorted(everything.below, key=lambda p: (len(p), p))
    for length, group in itertools.groupby(prefixes, key=len):
        batch = list(group)
        nodes = trie.lookup(torch.tensor(batch, dtype=torch.int64).view(len(batch), length), filter=filter)
        assert (nodes >= 0).tolist() == [p in brute.below for p in batch]
        mask = trie.mask(nodes, filter=filter)
        codes_below, nodes_below = trie.children(nodes, filter=filter)
        for i, prefix in enumerate(batch):
            expected = brute.children(prefix, trie.codebook_size)
            assert mask[i].nonzero()[:, 0].tolist() == expected
            assert codes_below[i][codes_below[i] >= 0].tolist() == expected
            assert codes_below[i][: len(expected)].tolist() == expected  # the valid children come first
            child_nodes = nodes_below[i][: len(expected)]
            assert torch.equal(
                child_nodes, trie.advance(nodes[i].expand(len(expected)), codes_below[i][: len(expected)])
            )
            assert (nodes_below[i][len(expected) :] == -1).all()
            low, high = trie.interval(nodes[i : i + 1])[0].tolist()
            rows = set(trie.rows[low:high].tolist())
            assert rows == (everything.below[prefix] if int(nodes[i]) >= 0 else set())


@pytest.mark.parametrize(("num_items", "levels", "size"), SHAPES)
def test_every_operation_equals_a_dict_of_prefixes(backend, num_items, levels, size):
    codes = draw_codes(num_items, levels, size)
    trie = Trie.from_codes(codes, size)
    assert (trie.num_items, trie.levels, trie.codebook_size) == (num_items, levels, size)
    assert_trie_equals_dict(trie, codes, DictTrie(codes), None)
    assert trie.items(trie.lookup(codes)).tolist() == list(range(num_items))


@pytest.mark.parametrize(("num_items", "levels", "size"), SHAPES)
def test_native_and_reference_build_the_same_arrays(num_items, levels, size):
    codes = draw_codes(num_items, levels, size, seed=1).to(torch.int32)
    actual, reference = build(codes, size, backend="native"), build_reference(codes, size)
    for name in ("code", "first_child", "rows"):
        assert torch.equal(getattr(actual, name), getattr(reference, name)), name
        assert getattr(actual, name).dtype == getattr(reference, name).dtype


@pytest.mark.parametrize(("levels", "size"), [(4, 256), (8, 4096)])
def test_parallel_builds_equal_the_reference(levels, size):
    """Above 65,536 items the native builder works in parallel."""
    codes = torch.unique(
        torch.randint(size, (200_000, levels), generator=torch.Generator().manual_seed(4)) // 7, dim=0
    )
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(5))]
    actual, reference = build(codes, size, backend="native"), build_reference(codes, size)
    for name in ("code", "first_child", "rows"):
        assert torch.equal(getattr(actual, name), getattr(reference, name)), name
    twice = torch.cat((codes, codes[[5, 70_000]]))
    for backend in ("native", "reference"):
        with pytest.raises(DuplicateCodes) as error:
            build(twice, size, backend=backend)
        assert sorted(error.value.pairs) == [(5, len(codes)), (70_000, len(codes) + 1)]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"])
def test_codes_of_any_integer_dtype_build_the_same_trie(backend, dtype):
    codes = draw_codes(30, 3, 4)
    assert (
        Trie.from_codes(codes.to(getattr(torch, dtype)), 4).fingerprint
        == Trie.from_codes(codes, 4).fingerprint
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_tries_and_filters_equal_a_dict_of_prefixes(data):
    levels = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 6))
    item = st.tuples(*[st.integers(0, size - 1)] * levels)
    codes = torch.tensor(data.draw(st.lists(item, min_size=1, max_size=25, unique=True)))
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes))))
    brute = DictTrie(codes, set(allowed.nonzero()[:, 0].tolist()))
    for fast in (False, True):
        cemg_kernels.use_fast_kernels(fast)
        trie = Trie.from_codes(codes, size)
        assert_trie_equals_dict(trie, codes, brute, ItemFilter.from_mask(trie, allowed))
    cemg_kernels.use_fast_kernels(None)


def test_lookup_of_the_empty_prefix_is_the_root(backend):
    trie = Trie.from_codes(torch.tensor([[1, 2]]), 3)
    assert trie.lookup(torch.zeros(4, 0, dtype=torch.int64)).tolist() == [0, 0, 0, 0]


def test_empty_inputs_give_empty_outputs(backend):
    trie = Trie.from_codes(torch.tensor([[1, 2]]), 3)
    none = torch.empty(0, dtype=torch.int32)
    assert trie.mask(none).shape == (0, 3)
    assert trie.children(none)[0].shape == (0, 3)
    assert trie.interval(none).shape == (0, 2)
    assert trie.items(none).shape == (0,)
    assert trie.advance(none, none).shape == (0,)
    assert trie.lookup(torch.empty(0, 2, dtype=torch.int64)).shape == (0,)


def test_codes_outside_the_codebook_have_no_node(backend):
    trie = Trie.from_codes(torch.tensor([[0, 2], [1, 0], [2, 2]]), 3)
    wrong = torch.tensor([-1, 3, 2**40, -(2**40)])
    assert trie.advance(torch.zeros(4, dtype=torch.int32), wrong).tolist() == [-1] * 4


def test_a_number_that_is_not_an_inner_node_has_no_children(backend):
    trie = Trie.from_codes(torch.tensor([[0, 2], [1, 0]]), 3)
    nodes = torch.tensor([-1, -7, 3, 4, 5, 2**31 - 1])  # none, the leaves 3 and 4, out of range
    assert not trie.mask(nodes).any()
    assert trie.advance(nodes, torch.zeros(6, dtype=torch.int64)).tolist() == [-1] * 6
    assert trie.items(nodes).tolist() == [-1, -1, 0, 1, -1, -1]
    assert trie.interval(nodes).tolist() == [[0, 0], [0, 0], [0, 1], [1, 2], [0, 0], [0, 0]]


def test_leaves_return_the_item_ids(backend):
    codes = draw_codes(30, 3, 4)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(2))[:30]
    trie = Trie.from_codes(codes, 4, ids)
    assert torch.equal(trie.items(trie.lookup(codes)), ids)
    assert trie.items(torch.tensor([[-1, 0], [1, -1]])).tolist() == [[-1, -1], [-1, -1]]


def test_advance_returns_the_shape_of_its_nodes(backend):
    trie = Trie.from_codes(draw_codes(64, 3, 4), 4)
    codes = torch.arange(4).view(2, 2)
    assert trie.advance(torch.zeros(2, 2, dtype=torch.int32), codes).tolist() == [[1, 2], [3, 4]]


def test_operands_can_be_strided_and_of_any_integer_dtype(backend):
    trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
    columns = torch.tensor([[0, 9], [3, 9], [2, 9]])
    root = torch.zeros(3, dtype=torch.int32)
    assert trie.advance(root, columns[:, 0]).tolist() == [1, 2, -1]
    assert trie.advance(root, torch.tensor([3]).expand(3)).tolist() == [2, 2, 2]
    wide = torch.tensor([[0, 9], [2**32, 9], [-1, 9], [2**40 + 1, 9]])[:, 0]  # the root, then invalid numbers
    assert trie.mask(wide).any(1).tolist() == [True, False, False, False]
    assert trie.advance(wide, torch.zeros(4, dtype=torch.uint8)).tolist() == [1, -1, -1, -1]
    assert trie.items(torch.tensor([3, 2**32 + 3, -(2**40)])).tolist() == [0, -1, -1]
    assert trie_softmax(torch.zeros(4, 4), wide, trie, "valid").isneginf().all(1).tolist() == [
        False, True, True, True]  # fmt: skip
    step = trie_beam_step(torch.zeros(1, 4, 4), torch.zeros(1, 4), wide[None], trie, 3, "valid")
    assert step.nodes.tolist() == [[1, 2, -1]]


def test_large_batches_equal_small_batches(backend):
    """Above 512 rows the native loops run in parallel."""
    codes = draw_codes(2000, 4, 256, seed=3)
    trie = Trie.from_codes(codes, 256)
    nodes = trie.lookup(codes[:, :2])
    whole = trie.mask(nodes)
    parts = torch.cat([trie.mask(part) for part in nodes.split(100)])
    assert torch.equal(whole, parts)
    assert torch.equal(trie.items(trie.lookup(codes)), torch.arange(2000))


@pytest.mark.parametrize(("size", "most"), [(256, 2.8), (2048, 6.5)])
def test_a_trie_of_a_million_random_items_takes_few_bytes_per_item(size, most):
    codes = torch.randint(size, (1_000_000, 4), generator=torch.Generator().manual_seed(0))
    trie = Trie.from_codes(torch.unique(codes, dim=0), size)
    assert trie.nbytes / trie.num_items <= most  # measured 2.65 and 6.38


@pytest.mark.parametrize(
    ("codes", "size", "message"),
    [
        ([[0, 1], [0, 4]], 4, "row 1 has code 4 on level 1"),
        ([[0, -1]], 4, "row 0 has code -1"),
        ([[0.0, 1.0]], 4, "must be integers"),
        ([0, 1], 4, r"got \[2\]"),
        ([[]], 4, r"got \[1, 0\]"),
        ([[0]], 0, "codebook_size"),
        ([[0]], 40000, "codebook_size"),
    ],
)
def test_invalid_codes_are_rejected(backend, codes, size, message):
    with pytest.raises(ValueError, match=message):
        Trie.from_codes(torch.tensor(codes), size)


def test_equal_codes_are_rejected_with_the_names_of_the_items(backend):
    codes = torch.tensor([[1, 1], [0, 2], [1, 1], [0, 2]])
    with pytest.raises(ValueError, match=r"items 1 and 3 \(\[0, 2\]\), items 0 and 2"):
        Trie.from_codes(codes, 3)
    with pytest.raises(ValueError, match=r"items 11 and 13"):
        Trie.from_codes(codes, 3, [10, 11, 12, 13])


@pytest.mark.parametrize(
    ("ids", "message"), [([1, 1], "twice"), ([0, -3], "-3"), ([1], r"\[1\]"), ([0.5, 1], "integers")]
)
def test_invalid_item_ids_are_rejected(ids, message):
    with pytest.raises(ValueError, match=message):
        Trie.from_codes(torch.tensor([[0], [1]]), 2, ids)


def test_wrong_arguments_are_rejected():
    trie = Trie.from_codes(torch.tensor([[0, 1]]), 2)
    with pytest.raises(ValueError, match="m <= 2"):
        trie.lookup(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        trie.mask(torch.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        trie.advance(torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one-dimensional"):
        trie.mask(torch.zeros(1, 1, dtype=torch.int32))
