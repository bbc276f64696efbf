"""Training batches: every target once, no item of another user, little padding."""

from __future__ import annotations

import numpy as np
import torch

from cemg.baselines.sequences import num_batches, pad_histories, training_batches


def sequences_like_beauty(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 100, size=1 + rng.geometric(0.15)).astype(np.int32) for _ in range(count)]


def test_every_next_item_is_a_target_once_and_follows_its_own_history() -> None:
    sequences = [np.arange(10 * u, 10 * u + n, dtype=np.int32) for u, n in enumerate([2, 5, 9, 3, 1, 7])]
    targets = []
    for batch in training_batches(sequences, 2, max_length=50, rng=np.random.default_rng(0)):
        assert torch.equal(batch.inputs[batch.valid] + 1, batch.targets[batch.valid])
        targets += batch.targets[batch.valid].tolist()
    assert sorted(targets) == sorted(int(i) for s in sequences for i in s[1:])


def test_only_the_newest_items_of_a_long_sequence_are_used() -> None:
    (batch,) = training_batches([np.arange(100)], 4, max_length=3, rng=np.random.default_rng(0))
    assert batch.inputs.tolist() == [[96, 97, 98]] and batch.targets.tolist() == [[97, 98, 99]]


def test_batches_of_similar_length_have_little_padding() -> None:
    sequences = sequences_like_beauty(4000)
    batches = list(training_batches(sequences, 64, max_length=50, rng=np.random.default_rng(1)))
    assert len(batches) == num_batches(sequences, 64)
    valid, cells = sum(int(b.valid.sum()) for b in batches), sum(b.valid.numel() for b in batches)
    assert valid / cells > 0.75  # without sorting, the longest of 64 sequences decides: about 0.2


def test_the_order_depends_only_on_the_generator() -> None:
    sequences = sequences_like_beauty(200)

    def order(seed: int) -> list[list[list[int]]]:
        rng = np.random.default_rng(seed)
        return [b.inputs.tolist() for b in training_batches(sequences, 16, max_length=50, rng=rng)]

    assert order(1) == order(1) != order(2)


def test_histories_keep_the_newest_items_and_are_padded_on_the_right() -> None:
    items, lengths = pad_histories([np.array([1, 2, 3, 4]), np.array([9])], 3)
    assert items.tolist() == [[2, 3, 4], [9, 0, 0]] and lengths.tolist() == [3, 1]
