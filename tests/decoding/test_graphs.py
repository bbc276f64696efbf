"""Recorded searches: buckets, padding, and which recordings are kept. Here a recording is a plain call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cemg.decoding import Decoder, Normalize, graphs
from cemg.decoding.graphs import GraphCache, Outputs, bucket_of
from cemg_kernels import ItemFilter, ItemPrior, RequestFilter

from .conftest import FAMILIES, START, Bench

CPU = torch.device("cpu")


class Recorder:
    """Replaces the CUDA capture: the search runs over the static tensors at each replay."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, search: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
        self.times += 1
        return search


def decoders(made: Bench, normalize: Normalize = "vocab") -> tuple[Decoder, Decoder, Recorder]:
    """A decoder that records, one that does not, and the recorder of the first."""
    recorded, plain = (
        Decoder(made.model, made.catalog, START, normalize, backend="torch", graphs=graphs)
        for graphs in (True, False)
    )
    recorder = Recorder()
    recorded.graphs = GraphCache(pad_left=not made.seq2seq, device=CPU, capture=recorder)
    return recorded, plain, recorder


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [((1, 1), (1, 16)), ((2, 16), (2, 16)), ((3, 17), (4, 32)), ((64, 80), (64, 80)), ((65, 81), (128, 96))],
)
def test_a_bucket_is_a_power_of_two_of_users_and_a_multiple_of_16_tokens(shape, bucket):
    assert bucket_of(*shape) == bucket


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalize", ["vocab", "valid"])
def test_a_replayed_search_returns_the_results_of_the_search(family, normalize, bench, same_lists):
    made = bench(family)
    recorded, plain, recorder = decoders(made, normalize)
    assert recorded.path == plain.path + ", CUDA graphs"
    for lengths in ([5, 5], [7, 2, 4], [3], [11, 1, 2]):
        prompts = made.prompts(lengths, seed=len(lengths))
        for beams in (4, 9):
            same_lists(recorded.decode(*prompts, beams), plain.decode(*prompts, beams))
    assert recorder.times == 3 * 2
    full = made.prompts([16, 15, 14])  # a known bucket, but with more tokens
    same_lists(recorded.decode(*full, 4), plain.decode(*full, 4))
    assert recorder.times == 3 * 2 + 1
    recorded.graphs.recordings.popitem()
    buckets = sorted((bucket, tokens) for _, bucket, tokens, *_ in recorded.graphs.recordings)
    assert buckets == sorted(
        2 * [((1, 16), 4), ((2, 16), 16), ((4, 16), 16)]
    )  # token counts are quarters of the cells


@pytest.mark.parametrize("normalize", ["vocab", "valid"])
def test_a_recording_serves_every_filter_of_its_kind(normalize, bench, same_lists):
    """Filters are created and dropped, so that a later one may get the address of an earlier one."""
    made = bench("llama")
    recorded, plain, recorder = decoders(made, normalize)
    trie, generator = plain.trie, torch.Generator().manual_seed(0)

    def some() -> ItemFilter:
        return ItemFilter.from_mask(trie, torch.rand(60, generator=generator) < 0.4)

    def left_out(users: int, most: int) -> RequestFilter:
        return RequestFilter.excluding(trie, torch.randint(-1, 60, (users, most), generator=generator))

    def stacked(users: int) -> RequestFilter:
        own = [some() for _ in range(3)]
        return RequestFilter.stack([*own, None][:users])

    for users, most in ((3, 5), (4, 16), (4, 1), (3, 9)):
        prompts = made.prompts([4, 7, 1, 3][:users], seed=most)
        both = stacked(users) & left_out(users, most)
        for filter in (some(), left_out(users, most), stacked(users), both, None):
            for _ in range(2):  # the second time it is not written
                found = recorded.decode(*prompts, 6, filter=filter)
                same_lists(found, plain.decode(*prompts, 6, filter=filter))
    assert recorder.times == 5  # one per kind
    recorded.decode(*made.prompts([1, 1, 1]), 6, filter=left_out(3, 60))
    assert recorder.times == 6  # a longer list is another kind


@pytest.mark.parametrize("normalize", ["vocab", "valid"])
def test_a_recording_serves_every_prior_of_its_bucket(normalize, bench, same_lists, monkeypatch):
    """With and without a filter; the items of a prior are padded to 4, 8, 16, ..."""
    monkeypatch.setattr(graphs, "MIN_PRIOR_ITEMS", 4)
    made = bench("t5")
    recorded, plain, recorder = decoders(made, normalize)
    drawn = np.random.default_rng(0)

    def some(users: int, most: int) -> ItemPrior:
        items = [drawn.choice(60, most - user, replace=False) for user in range(users)]
        return ItemPrior(items, [drawn.random(len(one)) for one in items])

    for users, most in ((3, 7), (4, 5), (3, 8), (4, 6)):
        prompts = made.prompts([4, 7, 1, 3][:users], seed=most)
        left_out = RequestFilter.excluding(plain.trie, torch.arange(users * 5).view(users, 5))
        for filter in (None, left_out):
            options = {
                "filter": filter, "prior": some(users, most), "prior_weight": [0.5, 1.0, 0.0, 0.9][:users]
            }  # fmt: skip
            found, expected = recorded.decode(*prompts, 6, **options), plain.decode(*prompts, 6, **options)
            same_lists(found, expected)
            assert torch.equal(found.certified, expected.certified)
    assert recorder.times == 2  # with a filter, and without
    recorded.decode(*made.prompts([1, 1, 1]), 6, prior=some(3, 9))
    assert recorder.times == 3  # more than 8 items
    recorded.decode(*made.prompts([4, 7, 1], seed=7), 6)
    assert recorder.times == 4  # no prior


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_without_tokens_do_not_count_for_the_bucket(family, bench, same_lists):
    made = bench(family)
    recorded, plain, recorder = decoders(made)
    ids, mask = made.prompts([5, 9])
    wide = [torch.nn.functional.pad(part, (20, 20)) for part in (ids, mask)]
    same_lists(recorded.decode(*wide, 4), plain.decode(ids, mask, 4))
    recorded.decode(ids, mask, 4)
    assert recorder.times == 1


def test_a_replay_refuses_a_filter_of_another_trie(bench):
    made, other = bench("t5", 60), bench("t5", 60, 1)
    recorded, *_ = decoders(made)
    prompts = made.prompts([3])
    recorded.decode(*prompts, 4, filter=ItemFilter.everything(made.catalog.trie))
    with pytest.raises(ValueError, match="the filter belongs to another trie"):
        recorded.decode(*prompts, 4, filter=ItemFilter.everything(other.catalog.trie))


def test_results_stay_unchanged_after_the_next_call(bench):
    made = bench("t5")
    recorded, *_ = decoders(made)
    first = recorded.decode(*made.prompts([5]), 4)
    kept = first.scores.clone()
    recorded.decode(*made.prompts([5], seed=1), 4)
    assert torch.equal(first.scores, kept)


def test_threads_that_share_a_recording_get_their_own_results(bench, same_lists):
    made = bench("t5")
    recorded, plain, _ = decoders(made)
    asked = [made.prompts([5, 5], seed=seed) for seed in range(8)]
    wanted = [plain.decode(*prompts, 4) for prompts in asked]
    recorded.decode(*asked[0], 4)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found, own in zip(
                threads.map(lambda prompts: recorded.decode(*prompts, 4), asked), wanted, strict=True
            ):
                same_lists(found, own)


def test_the_least_recently_used_recording_is_dropped_first(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    recorder = Recorder()
    kept = GraphCache(pad_left=True, device=CPU, capture=recorder)
    prompts = torch.ones(1, 4, dtype=torch.int64)
    for key in "ab", "a", "c", "a", "b":  # "b" was used before "a", so "c" replaces it
        for one in key:
            kept.run(lambda ids, mask, *_: (ids + mask,), one, prompts, prompts)
    assert recorder.times == 4 and len(kept.recordings) == 2


def test_a_model_on_its_own_forward_is_never_recorded(bench):
    made = bench("t5")
    assert Decoder(made.model, made.catalog, START, backend="reference", graphs=True).graphs is None
