"""Recorded searches: buckets, padding, what is kept. A GPU records; here the recording is a plain call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cemg.decoding import Decoder, graphs
from cemg.decoding.graphs import Graphs, Search, bucket_of
from cemg_kernels import ItemFilter, RequestFilter

from .conftest import FAMILIES, START

CPU = torch.device("cpu")


class Recorder:
    """Stands in for the GPU: what it records runs over the static tensors at each replay."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, search: Search, input_ids: Tensor, attention_mask: Tensor):
        self.shapes.append(tuple(input_ids.shape))
        return lambda: search(input_ids, attention_mask)


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [((1, 1), (1, 16)), ((2, 16), (2, 16)), ((3, 17), (4, 32)), ((64, 80), (64, 80)), ((65, 81), (128, 96))],
)
def test_a_bucket_is_a_power_of_two_of_users_and_a_multiple_of_16_tokens(shape, bucket):
    assert bucket_of(*shape) == bucket


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalize", ["vocab", "valid"])
def test_a_replayed_search_gives_what_the_search_gives(family, normalize, bench, same_lists):
    made = bench(family)
    plain = Decoder(made.model, made.catalog, START, normalize, backend="torch", graphs=False)
    recorded = Decoder(made.model, made.catalog, START, normalize, backend="torch", graphs=True)
    assert recorded.path == plain.path + ", CUDA graphs"
    recorder = Recorder()
    recorded.graphs = Graphs(pad_left=not made.seq2seq, device=CPU, capture=recorder)
    allowed = ItemFilter.from_mask(made.catalog.trie, torch.arange(60) % 3 > 0)
    own = RequestFilter.excluding(made.catalog.trie, [[3], [4, 5], []])
    for lengths in ([5, 5], [7, 2, 4], [3], [11, 1, 2]):
        prompts = made.prompts(lengths, seed=len(lengths))
        for beams, filter in ((4, None), (4, allowed), (9, None), *([(4, own)] if len(lengths) == 3 else [])):
            same_lists(
                recorded.decode(*prompts, beams, filter=filter), plain.decode(*prompts, beams, filter=filter)
            )
    assert sorted(recorder.shapes) == sorted(
        3 * [(1, 16), (2, 16), (4, 16)]
    )  # each once a key, own filters never


def test_what_a_call_returned_outlives_the_next_call(bench):
    made = bench("t5")
    decoder = Decoder(made.model, made.catalog, START, backend="torch", graphs=True)
    decoder.graphs = Graphs(pad_left=False, device=CPU, capture=Recorder())
    first = decoder.decode(*made.prompts([5]), 4)
    kept = first.scores.clone()
    decoder.decode(*made.prompts([5], seed=1), 4)
    assert torch.equal(first.scores, kept)


def test_the_least_recently_used_recording_goes_first(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    recorder = Recorder()
    kept = Graphs(pad_left=True, device=CPU, capture=recorder)
    prompts = torch.ones(1, 4, dtype=torch.int64)
    for key in "ab", "a", "c", "a", "b":  # "b" was last used before "a", so "c" drives it out
        for one in key:
            kept.run(lambda ids, mask: (ids + mask,), (one,), prompts, prompts)
    assert len(recorder.shapes) == 4 and len(kept.recorded) == 2


def test_a_model_without_a_stepper_of_our_own_is_never_recorded(bench):
    made = bench("t5")
    assert Decoder(made.model, made.catalog, START, backend="reference", graphs=True).graphs is None
