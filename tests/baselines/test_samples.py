"""Training batches: every target once, no item of another user, little padding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cemg.baselines.samples import Samples


def sequences_like_beauty(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 100, size=1 + rng.geometric(0.15)).astype(np.int32) for _ in range(count)]


BOTH = pytest.mark.parametrize("make", [Samples.positions, Samples.prefixes])
Make = Callable[[list[np.ndarray], int], Samples]


@BOTH
def test_every_next_item_is_a_target_once_and_follows_its_own_history(make: Make) -> None:
    sequences = [np.arange(10 * u, 10 * u + n, dtype=np.int32) for u, n in enumerate([2, 5, 9, 3, 0, 1, 7])]
    targets = []
    for batch in make(sequences, 50).batches(2, np.random.default_rng(0)):
        assert batch.inputs.shape[1] == int(batch.lengths.max())
        before = batch.inputs[batch.present]
        if not batch.every_position:
            before = batch.inputs[torch.arange(len(batch.inputs)), batch.lengths - 1]
            assert (batch.inputs[:, 0] % 10 == 0).all()  # the whole history
        assert torch.equal(before + 1, batch.targets)
        targets += batch.targets.tolist()
    assert sorted(targets) == sorted(int(i) for s in sequences for i in s[1:])


def test_positions_keep_the_newest_items_of_a_long_sequence() -> None:
    (batch,) = Samples.positions([np.arange(100)], 3).batches(4, np.random.default_rng(0))
    assert batch.inputs.tolist() == [[96, 97, 98]] and batch.targets.tolist() == [97, 98, 99]


def test_prefixes_keep_the_newest_items_before_each_target() -> None:
    (batch,) = Samples.prefixes([np.arange(5)], 2).batches(9, np.random.default_rng(0))
    samples = zip(batch.inputs.tolist(), batch.lengths.tolist(), batch.targets.tolist(), strict=True)
    assert sorted((i[:n], t) for i, n, t in samples) == [([0], 1), ([0, 1], 2), ([1, 2], 3), ([2, 3], 4)]


@BOTH
def test_batches_of_similar_length_have_little_padding(make: Make) -> None:
    samples = make(sequences_like_beauty(4000), 50)
    batches = list(samples.batches(64, np.random.default_rng(1)))
    assert len(batches) == samples.num_batches(64)
    present, cells = sum(int(b.present.sum()) for b in batches), sum(b.inputs.numel() for b in batches)
    assert present / cells > 0.9  # without sorting, the longest of 64 samples decides: about 0.2


@BOTH
def test_the_order_depends_only_on_the_generator(make: Make) -> None:
    samples = make(sequences_like_beauty(200), 50)

    def order(seed: int) -> list[list[list[int]]]:
        return [b.inputs.tolist() for b in samples.batches(16, np.random.default_rng(seed))]

    assert order(1) == order(1) != order(2)


@BOTH
def test_sequences_without_a_target_give_no_batch(make: Make) -> None:
    assert list(make([np.array([4]), np.empty(0)], 5).batches(4, np.random.default_rng(0))) == []
    assert list(make([], 5).batches(4, np.random.default_rng(0))) == []
