"""Packed numbers against the unpacked list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg_kernels.trie.packed import at, pack, unpack, unpack_any


def numbers_of(gaps: list[int]) -> torch.Tensor:
    return torch.tensor(gaps).cumsum(0).to(torch.int32)


def assert_packs(numbers: torch.Tensor) -> None:
    words = pack(numbers)
    assert torch.equal(at(words, torch.arange(len(numbers))), numbers.long())
    assert torch.equal(unpack(words, len(numbers)), numbers.long())
    assert unpack_any(words, len(numbers)) is not None


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("gap", [1, 7, 8, 9, 4096])
def test_any_count_and_distance_of_numbers_round_trips(count, gap):
    """64 numbers with gaps of 8 span 505 values and fit a bitmap; with gaps of 9 they do not."""
    assert_packs(torch.arange(count, dtype=torch.int32) * gap)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(1), st.integers(1, 12), st.integers(1, 5000)), min_size=1, max_size=300))
def test_packed_numbers_are_found(gaps):
    assert_packs(numbers_of(gaps))


def test_dense_numbers_take_less_than_three_bits_each():
    """As for nodes with one child each: 64 bits of data and a 64-bit head for 64 numbers."""
    words = pack(torch.arange(64_000))
    assert words.nbytes * 8 / 64_000 < 2.1


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_words_that_are_not_packed_numbers_are_rejected(kind):
    numbers = torch.arange(200) * (3 if kind == "dense" else 900)
    good = pack(numbers)
    generator = torch.Generator().manual_seed(0)
    heads = [(word, bit) for word in range(4) for bit in range(63)]
    drawn = torch.randint(63 * len(good), (300,), generator=generator).tolist()
    refused = 0
    for word, bit in [*heads, *(divmod(one, 63) for one in drawn)]:
        bad = good.clone()
        bad[word] ^= 1 << bit
        refused += unpack_any(bad, len(numbers)) is None
    assert refused > 400  # changing a number in a list may give another valid list
    assert unpack_any(good[:-1], len(numbers)) is None and unpack_any(good, len(numbers) + 1) is None
    assert unpack_any(torch.cat((good, torch.zeros(1, dtype=torch.int64))), len(numbers)) is None
