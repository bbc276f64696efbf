"""The C++ decoder: threads, memory, activations, refusals, and the search in one call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cemg.decoding import Decoder, record_timings, score_all
from cemg.decoding.models.native import large_pages
from cemg.errors import UserError
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter, _native, use_fast_kernels

from ..conftest import LEVELS, SIZE, START, VOCABULARY, Bench, random_catalog, step_by_step
from .fast_models import SHAPES, build

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", ["t5 gated, uneven stacks", "gpt2", "llama, as many key heads"])
def test_the_number_of_threads_does_not_change_a_bit(shape, threads):
    model = build(*SHAPES[shape])
    decoder = Decoder(model, random_catalog(60, 1), START, backend="native")
    prompts = Bench(model, decoder.catalog).prompts([7, 2, 4])
    torch.set_num_threads(1)  # the conftest sets it back
    alone = decoder.decode(*prompts, 30)
    torch.set_num_threads(threads)
    shared = decoder.decode(*prompts, 30)
    assert torch.equal(shared.items, alone.items) and torch.equal(shared.scores, alone.scores)


@pytest.mark.parametrize("normalize", ["vocab", "valid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_prompts_of_a_batch_do_not_change_a_bit(shape, normalize):
    """Prompts of different lengths, in batches of 1, 2, 13 (the most rows of a tile) and 14."""
    model = build(*SHAPES[shape])
    decoder = Decoder(model, random_catalog(60, 1), START, normalize, backend="native")
    ids, mask = Bench(model, decoder.catalog).prompts([2 + n % 7 for n in range(14)])
    whole = decoder.decode(ids, mask, 30)
    for size in (1, 2, 13):
        for start in range(0, 14, size):
            rows = slice(start, start + size)
            part = decoder.decode(ids[rows], mask[rows], 30)
            assert torch.equal(part.items, whole.items[rows]), (size, start)
            assert torch.equal(part.scores, whole.scores[rows]), (size, start)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not on Linux")
def test_large_pages_are_private_to_the_process():
    """A shared mapping has small pages, and a forked child would write into its parent's weights."""
    pages = large_pages(2**20)
    assert pages.shape == (2**20,) and not pages.any()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= pages.data_ptr() < end:
            assert line.split()[1] == "rw-p"
            return
    raise AssertionError("the pages are not in any mapping")


@pytest.mark.parametrize(("shape", "longest"), [("t5 tied", 6), ("llama, as many key heads", 600)])
def test_concurrent_searches_return_the_same_lists_and_keep_their_buffers(shape, longest, same_lists):
    """With 600 tokens, the rotary tables grow while other threads read them."""
    model = build(*SHAPES[shape])
    fresh, decoder = (Decoder(model, random_catalog(60, 1), START, backend="native") for _ in range(2))
    lengths = [2 + seed * (longest - 2) // 11 for seed in range(12)]
    asked = [Bench(model, decoder.catalog).prompts([n, 4], n) for n in lengths]
    alone = [decoder.decode(*prompts, 20) for prompts in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompts: fresh.decode(*prompts, 20), asked))
    for one, other in zip(together, alone, strict=True):
        same_lists(one, other)
    assert 1 <= len(fresh.plan._idle) <= 4  # one a thread


def test_a_search_with_large_buffers_is_not_kept(monkeypatch):
    from cemg.decoding.models import native

    monkeypatch.setattr(native, "MAX_KEPT_BYTES", 0)
    made = Bench(build(*SHAPES["gpt2"]), random_catalog(60, 1))
    decoder = Decoder(made.model, made.catalog, START, backend="native")
    assert (decoder.decode(*made.prompts([4]), 5).items >= 0).all() and not decoder.plan._idle


@pytest.mark.parametrize("shape", ["t5 tied", "qwen3, normed heads"])
def test_each_native_call_records_its_parts_while_ranges_are_on(shape):
    made = Bench(build(*SHAPES[shape]), random_catalog(60, 1))
    decoder = Decoder(made.model, made.catalog, START, backend="native")
    with record_timings() as timings:
        decoder.decode(*made.prompts([4]), 5)
    assert timings.native_events == []
    with record_timings() as timings, step_by_step():
        decoder.decode(*made.prompts([4]), 5)
    calls = timings.native_events
    decoder.decode(*made.prompts([4]), 5)
    assert decoder.plan._idle[-1].profile_events == []  # the same search object, now in one call
    assert len(calls) == LEVELS and all(call[-1][0] == "head" for call in calls)
    for call in calls:
        ends = [end for _, end in call]
        assert ends == sorted(ends) and ends[0] > 0
        assert {"projection", "attention", "feed-forward", "norm"} <= {name for name, _ in call}


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_every_activation_in_cpp_equals_that_of_transformers(activation, same_lists):
    kind, settings = SHAPES["gpt2"]
    model = build(kind, settings | {"activation_function": activation})
    prompts = Bench(model, random_catalog(60, 1)).prompts([5, 3])
    fast = Decoder(model, random_catalog(60, 1), START, backend="native")
    slow = Decoder(model, random_catalog(60, 1), START, backend="reference")
    same_lists(fast.decode(*prompts, 80), slow.decode(*prompts, 80))


def test_a_model_that_cpp_does_not_support_runs_in_torch_or_is_refused():
    kind, settings = SHAPES["gpt2"]
    model = build(kind, settings | {"activation_function": "quick_gelu"})
    assert Decoder(model, random_catalog(60, 1), START).path == "fast decoder-only"
    with pytest.raises(UserError, match="does not have its activation QuickGELU"):
        Decoder(model, random_catalog(60, 1), START, backend="native")
    half = build(kind, settings).to(torch.bfloat16)
    assert Decoder(half, random_catalog(60, 1), START).path == "fast decoder-only"
    with pytest.raises(UserError, match="bfloat16"):
        Decoder(half, random_catalog(60, 1), START, backend="native")


def test_tokens_and_positions_outside_the_models_tables_are_refused():
    model = build(*SHAPES["gpt2"])
    decoder = Decoder(model, random_catalog(60, 1), START, backend="native")
    with pytest.raises(ValueError, match="prompt 1 has token 24 outside the model's vocabulary"):
        decoder.decode(torch.tensor([[5, 6], [5, VOCABULARY]]), torch.ones(2, 2).long(), 3)
    with pytest.raises(UserError, match="65 tokens do not fit the model's 64 positions"):
        decoder.decode(torch.full((1, 64), 5), torch.ones(1, 64).long(), 3)


def test_invalid_prompts_are_refused_before_cpp_reads_them():
    made = Bench(build(*SHAPES["gpt2"]), random_catalog(60, 1))
    decoder = Decoder(made.model, made.catalog, START, backend="native")
    ids, mask = made.prompts([4, 3])
    none = mask.clone()
    none[1] = 0
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        score_all(decoder, ids, none)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        decoder.plan.new_state().prefill(ids, none, decoder.logits_request(0))
    with pytest.raises(ValueError, match="there is no prompt"):
        no_prompts, tables = _native.Prompts(tokens=0, mask=0, batch=0, length=4), _native.PositionTables()
        request = _native.LogitsRequest(columns=_native.Linear(), logits=0)
        decoder.plan.new_state().search.prefill(no_prompts, tables, 0, tables, request)
    assert score_all(decoder, ids[:0], mask[:0]).shape == (0, 60)
    whole = decoder.decode(ids, mask, 5)
    half = decoder.decode(ids, mask * 0.5, 5)  # every nonzero entry is a token
    assert torch.equal(half.scores, whole.scores)


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("shape", ["t5 gated, uneven stacks", "gpt2", "llama, as many key heads"])
def test_a_search_in_one_call_returns_the_bits_of_a_search_step_by_step(shape, normalize):
    """For filters of each kind, more and fewer beams than items, and one code per item."""
    model = build(*SHAPES[shape])
    catalogs = [random_catalog(items, items) for items in (1, 25, 90)]
    for catalog in (*catalogs, Catalog.from_codes(torch.arange(SIZE)[:, None], SIZE)):
        items, trie = len(catalog), catalog.trie
        decoder = Decoder(model, catalog, START, normalize, backend="native")
        prompts = Bench(model, catalog).prompts([7, 2, 4])
        some = ItemFilter.from_mask(trie, torch.arange(items) % 3 > 0)
        none = ItemFilter.from_mask(trie, torch.zeros(items, dtype=torch.bool))
        requests = RequestFilter.stack([some, none, None]) & RequestFilter.excluding(trie, [[0], [], [0]])
        for filter in (None, some, none, requests):
            for beams in (1, 20, 100):
                whole = decoder.decode(*prompts, beams, filter=filter)
                with step_by_step():
                    stepped = decoder.decode(*prompts, beams, filter=filter)
                for mine, other in zip(whole.tensors(), stepped.tensors(), strict=True):
                    assert torch.equal(mine, other)


def test_a_prompt_that_fills_the_positions_is_decoded_if_no_step_needs_more():
    """The first code determines the item, so under "valid" no step follows the prefill."""
    model = build(*SHAPES["gpt2"])
    catalog = Catalog.from_codes(torch.arange(SIZE)[:, None].expand(-1, LEVELS), SIZE)
    prompts = Bench(model, catalog).prompts([model.config.n_positions])
    found = Decoder(model, catalog, START, "valid", backend="native").decode(*prompts, SIZE)
    assert sorted(found.items[0].tolist()) == list(range(SIZE))
    for backend in ("native", "torch"):
        with pytest.raises(UserError, match="do not fit the model's"):
            Decoder(model, catalog, START, "vocab", backend=backend).decode(*prompts, SIZE)
        with pytest.raises(UserError, match="do not fit the model's"):
            score_all(Decoder(model, catalog, START, "vocab", backend=backend), *prompts)


def test_without_fast_kernels_the_reference_selects(monkeypatch, same_lists):
    made = Bench(build(*SHAPES["gpt2"]), random_catalog(60, 1))
    decoder = Decoder(made.model, made.catalog, START, backend="native")
    whole = decoder.decode(*made.prompts([4]), 5)
    monkeypatch.setattr(decoder.plan, "beam_search", None)
    use_fast_kernels(False)
    try:
        same_lists(decoder.decode(*made.prompts([4]), 5), whole)
    finally:
        use_fast_kernels(None)
