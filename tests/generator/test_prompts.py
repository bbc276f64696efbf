"""Prompts and training samples built from histories."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg.generator import Prompter, Vocabulary
from cemg.generator.samples import Buckets, Samples

PAD, BOS, EOS, START = 0, 1, 2, 3
VOCABULARY = Vocabulary(levels=2, codebook_size=50, code_token_start=START, pad=PAD, bos=BOS, eos=EOS)
CODES = torch.stack([torch.arange(50), torch.arange(50).flip(0)], dim=1)  # item i is (i, 49 - i)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def prompter(*, history_items: int = 4, seq2seq: bool = False, instruction: tuple[int, ...] = ()) -> Prompter:
    vocabulary = Vocabulary(2, 50, START, PAD, BOS, EOS, instruction)
    return Prompter(vocabulary, CODES, history_items=history_items, seq2seq=seq2seq)


def tokens_of(*items: int) -> list[int]:
    return VOCABULARY.tokens(CODES[list(items)]).flatten().tolist()


def items_in(tokens: torch.Tensor) -> list[int]:
    """The items whose first codes are among these tokens, in order."""
    return [int(t) - START for t in tokens if START <= int(t) < START + 50]


def read(samples: Samples, index: int) -> tuple[list[int], list[int]]:
    """The items that the model reads in a sample, and those that it predicts."""
    batch = samples.batch([index])
    return batch.items[0].tolist(), batch.targets.tolist()


def test_a_decoder_reads_the_newest_items_oldest_first_after_the_opening():
    history = np.array([9, 8, 7, 6, 5, 4], dtype=np.int32)
    assert prompter().prompt(history).tolist() == [BOS, *tokens_of(7, 6, 5, 4)]
    assert prompter(instruction=(30, 31)).prompt(history[:1]).tolist() == [BOS, 30, 31, *tokens_of(9)]


def test_an_encoder_reads_the_same_items_and_an_end():
    assert prompter(seq2seq=True).prompt(np.array([3, 2, 1, 0, 5])).tolist() == [*tokens_of(2, 1, 0, 5), EOS]


def test_an_empty_history_still_gives_a_prompt():
    assert prompter().prompt(np.array([], dtype=np.int32)).tolist() == [BOS]
    assert prompter(seq2seq=True).prompt(np.array([], dtype=np.int32)).tolist() == [EOS]


@pytest.mark.parametrize("seq2seq", [False, True])
def test_prompts_are_padded_on_the_left_for_a_decoder_and_on_the_right_for_an_encoder(seq2seq):
    made = prompter(seq2seq=seq2seq)
    ids, mask = made.batch([np.array([1, 2, 3]), np.array([4])])
    short = made.prompt(np.array([4])).tolist()
    padding = [PAD] * (ids.shape[1] - len(short))
    assert ids[1].tolist() == (short + padding if seq2seq else padding + short)
    assert torch.equal(mask == 1, ids != PAD) and int(mask[1].sum()) == len(short)


@quick
@given(lengths=st.lists(st.integers(0, 40), max_size=6), history_items=st.integers(1, 9))
def test_each_training_item_is_a_target_exactly_once(lengths, history_items):
    train = [np.arange(n, dtype=np.int32) for n in lengths]
    samples = Samples(prompter(history_items=history_items), train)
    trained: Counter[tuple[int, int]] = Counter()
    for index in range(len(samples)):
        items, targets = read(samples, index)
        assert len(items) <= history_items + 1
        trained.update((samples.spans[index][0], item) for item in targets)
    assert trained == Counter((user, item) for user, n in enumerate(lengths) for item in range(n))


@quick
@given(length=st.integers(1, 40), history_items=st.integers(2, 9))
def test_a_target_of_a_later_window_has_half_a_history_before_it(length, history_items):
    samples = Samples(prompter(history_items=history_items), [np.arange(length, dtype=np.int32)])
    for index in range(len(samples)):
        items, targets = read(samples, index)
        wanted = 0 if index == 0 else history_items // 2
        assert items.index(targets[0]) >= wanted


@quick
@given(
    lengths=st.lists(st.integers(0, 20), max_size=4), history_items=st.integers(1, 6), seq2seq=st.booleans()
)
def test_a_cropped_sample_keeps_its_end_and_an_item_before_each_target(lengths, history_items, seq2seq):
    train = [np.arange(n, dtype=np.int32) for n in lengths]
    made = prompter(history_items=history_items, seq2seq=seq2seq)
    whole, cropped = Samples(made, train), Samples(made, train, crop=1.0, first_item=False, seed=5)
    ends = {
        (user, target, end): read(whole, i)[1]
        for i, (user, _, target, end) in enumerate(whole.spans.tolist())
    }
    for cropped.epoch in range(3):
        for index, span in enumerate(cropped.spans.tolist()):
            items, targets = read(cropped, index)
            known = items[: items.index(targets[0])] if not seq2seq else items
            assert known and targets == ends[tuple(span[:1] + span[2:])][-len(targets) :]
            assert items == list(range(items[0], items[0] + len(items)))
    assert len(cropped) == sum(span[3] - span[1] > 1 for span in whole.spans)


def test_crops_follow_the_seed_and_the_epoch_and_spare_what_is_not_drawn():
    train = [np.arange(12, dtype=np.int32)] * 40

    def starts(crop: float, seed: int, epoch: int) -> list[int]:
        samples = Samples(prompter(history_items=11), train, crop=crop, seed=seed)
        samples.epoch = epoch
        return [read(samples, index)[0][0] for index in range(len(samples))]

    assert starts(0.5, 1, 2) == starts(0.5, 1, 2)
    assert starts(0.5, 1, 2) != starts(0.5, 1, 3) != starts(0.5, 2, 3)
    assert set(starts(1.0, 0, 0)) == set(range(1, 11)) and set(starts(0.0, 0, 1)) == {0}
    assert 10 < starts(0.5, 1, 2).count(0) < 35


def test_the_first_item_of_a_crop_is_not_a_target_and_that_of_a_history_is_by_default():
    train = [np.arange(6, dtype=np.int32)]

    def targets(**options: object) -> list[int]:
        return read(Samples(prompter(history_items=5), train, **options), 0)[1]

    assert targets() == [0, 1, 2, 3, 4, 5] and targets(first_item=False) == [1, 2, 3, 4, 5]
    cropped = targets(crop=1.0)
    samples = Samples(prompter(history_items=5), train, crop=1.0)
    assert read(samples, 0)[0][1:] == cropped == list(range(6 - len(cropped), 6))


def test_a_crop_shortens_the_prompt_of_an_encoder():
    train = [np.arange(30, dtype=np.int32)]
    samples = Samples(prompter(history_items=4, seq2seq=True), train, crop=1.0)
    lengths = [len(read(samples, index)[0]) for index in range(len(samples))]
    assert max(lengths[1:]) < 4 and min(lengths) == 1


def test_context_of_a_later_window_is_read_and_is_no_target():
    samples = Samples(prompter(history_items=4, instruction=(30,)), [np.arange(8, dtype=np.int32)])
    batch = samples.batch([0, 1])
    assert batch.input_ids[0].tolist() == [BOS, 30, *tokens_of(0, 1, 2, 3, 4)]
    assert batch.input_ids[1].tolist() == [BOS, 30, *tokens_of(2, 3, 4, 5, 6)]
    assert batch.is_target.tolist() == [[True] * 5, [False] * 3 + [True] * 2]
    assert batch.targets.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.target_tokens.flatten().tolist() == tokens_of(0, 1, 2, 3, 4, 5, 6)


def test_an_encoder_decoder_trains_on_every_prefix_with_its_newest_items():
    samples = Samples(prompter(history_items=2, seq2seq=True), [np.array([5, 6, 7, 8]), np.array([9])])
    batch = samples.batch([0, 1, 2])
    assert batch.input_ids.tolist() == [
        [*tokens_of(5), EOS, PAD, PAD],
        [*tokens_of(5, 6), EOS],
        [*tokens_of(6, 7), EOS],
    ]
    assert batch.target_tokens.tolist() == [tokens_of(6), tokens_of(7), tokens_of(8)]
    assert len(samples) == 3 and not batch.is_target.any()


@quick
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seq2seq=st.booleans(), opening=st.booleans()
)
def test_training_reads_the_tokens_of_the_prompts_padded_on_the_right(lengths, seq2seq, opening):
    made = prompter(history_items=12, seq2seq=seq2seq, instruction=(30, 31) if opening else ())
    samples = Samples(made, [np.arange(n, n + n, dtype=np.int32) for n in lengths])
    batch = samples.batch(range(len(samples))) if len(samples) else None
    for row in range(len(samples)):
        items, targets = read(samples, row)
        tokens = made.prompt(np.array(items)).tolist()
        assert batch.input_ids[row].tolist() == tokens + [PAD] * (batch.input_ids.shape[1] - len(tokens))
        assert batch.attention_mask[row].tolist() == [
            p < len(tokens) for p in range(batch.input_ids.shape[1])
        ]
        assert targets == ([items[-1] + 1] if seq2seq else items)


@quick
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=300),
    batch_size=st.integers(1, 20),
    epoch=st.integers(0, 5),
)
def test_batches_contain_each_sample_once_per_epoch(lengths, batch_size, epoch):
    buckets = Buckets(lengths, batch_size=batch_size, seed=1)
    batches = [*buckets.of_epoch(epoch)]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(buckets) and max(map(len, batches)) <= batch_size


def test_batches_hold_samples_of_like_length_and_differ_between_epochs_and_seeds():
    lengths = torch.randint(1, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = Buckets(lengths, batch_size=10, seed=0)
    first = [*buckets.of_epoch(0)]
    assert [*buckets.of_epoch(0)] == first and [*buckets.of_epoch(0, 3)] == first[3:]
    assert [*buckets.of_epoch(1)] != first
    assert [*Buckets(lengths, batch_size=10, seed=1).of_epoch(0)] != first
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first]
    assert max(spread) <= 10  # 640 lengths within 1 … 99 in 64 sorted batches: 1.6 apart on average
