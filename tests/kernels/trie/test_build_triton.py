"""Tries built by the interpreted Triton kernels have the same arrays as the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import Trie
from cemg_kernels.runtime import dispatch
from cemg_kernels.trie.arrays import DuplicateCodes
from cemg_kernels.trie.build import build, build_reference
from cemg_kernels.trie.build_triton import BLOCK

from ...helpers import draw_codes


def assert_builds_the_references_arrays(codes: Tensor, size: int) -> None:
    actual, reference = build(codes, size, backend="triton"), build_reference(codes, size)
    for name in ("code", "first_child", "rows"):
        assert torch.equal(getattr(actual, name), getattr(reference, name)), name
        assert getattr(actual, name).dtype == getattr(reference, name).dtype


@pytest.mark.parametrize(
    ("num_items", "levels", "size"),
    [(1, 1, 1), (1, 8, 4096), (7, 1, 7), (30, 3, 4), (64, 3, 4), (200, 4, 256), (200, 2, 300), (40, 8, 4096)],
)
def test_one_item_full_nodes_and_keys_over_64_bits_equal_the_reference(num_items, levels, size):
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert_builds_the_references_arrays(draw_codes(num_items, levels, size).to(dtype), size)
    assert_builds_the_references_arrays(
        draw_codes(num_items, levels, size).to(torch.int64).t().clone().t(), size
    )


@pytest.mark.parametrize(("levels", "size"), [(1, 4096), (3, 12), (8, 4096)])
@pytest.mark.parametrize("num_items", [BLOCK - 1, BLOCK, BLOCK + 1, 1700])
def test_nodes_that_span_blocks_of_ranks_equal_the_reference(num_items, levels, size):
    assert_builds_the_references_arrays(draw_codes(num_items, levels, size, seed=2), size)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_codes_build_the_arrays_of_the_reference(data):
    levels, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    item = st.tuples(*[st.integers(0, size - 1)] * levels)
    codes = torch.tensor(data.draw(st.lists(item, min_size=1, max_size=30, unique=True)))
    assert_builds_the_references_arrays(codes, size)


def test_equal_codes_are_named_in_the_order_of_the_reference(monkeypatch):
    codes = torch.tensor([[2, 0], [1, 1], [2, 0], [0, 3], [1, 1], [2, 0]])
    for builder in ("triton", "native", "reference"):
        with pytest.raises(DuplicateCodes) as error:
            build(codes, 4, backend=builder)
        assert error.value.pairs == [(1, 4), (0, 2), (2, 5)]
    monkeypatch.setitem(dispatch.ON_REQUEST, "triton", "")  # as on a GPU
    dispatch.use_fast_kernels(None)
    assert dispatch.choose("trie_build", torch.device("cpu")).backend == "triton"
    with pytest.raises(ValueError, match=r"items 1 and 4 \(\[1, 1\]\), items 0 and 2"):
        Trie.from_codes(codes, 4)
    monkeypatch.undo()
    dispatch.use_fast_kernels(None)
    assert dispatch.choose("trie_build", torch.device("cpu")).backend == "native"
