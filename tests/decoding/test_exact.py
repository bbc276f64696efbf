"""``score_all`` against brute force and against a search with one beam per item."""

from __future__ import annotations

import pytest
import torch

from cemg.decoding import Decoder, score_all
from cemg.decoding.models.t5 import T5State
from cemg.decoding.protocol import DecoderState, Logits, LogitsRequest
from cemg.errors import UserError

from .conftest import FAMILIES, SIZE, START

pytestmark = pytest.mark.medium

NORMALIZE = ("vocab", "level", "valid")


@pytest.mark.parametrize("rows", [None, 1, 7, 130])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_of_every_item_equals_brute_force(bench, family, normalize, rows):
    """For chunks of one rank, for chunks that split a prefix, and for users in groups of two."""
    made = bench(family)
    ids, mask = made.prompts([7, 2, 4])
    scores = score_all(Decoder(made.model, made.catalog, START, normalize), ids, mask, rows=rows)
    assert scores.shape == (3, 60) and scores.dtype == torch.float32
    for row in range(3):
        expected = made.all_scores(ids[row, mask[row].bool()], normalize)
        torch.testing.assert_close(scores[row], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("items", [1, 2, 30, 216])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_scores_equal_those_of_a_search_with_one_beam_per_item(bench, family, normalize, items, backend):
    """For one item, a few items, and a full trie."""
    made = bench(family, items)
    prompts = made.prompts([5, 3])
    decoder = Decoder(made.model, made.catalog, START, normalize, backend=backend)
    found = decoder.decode(*prompts, items)
    scores = score_all(decoder, *prompts)
    torch.testing.assert_close(scores.gather(1, found.items), found.scores, rtol=0, atol=1e-4)


def test_a_valid_prefix_with_one_item_is_not_computed(bench, monkeypatch):
    """60 of 216 items: fewer rows than prefixes for "valid", all of them for "level"."""
    from cemg.decoding.models.native import NativeState

    made, fed = bench("llama"), []
    step = NativeState.decode_step
    monkeypatch.setattr(
        NativeState,
        "decode_step",
        lambda self, tokens, *rest: fed.append(tokens.shape[1]) or step(self, tokens, *rest),
    )
    codes = made.catalog.codes
    for normalize in ("level", "valid"):
        decoder = Decoder(made.model, made.catalog, START, normalize, check=False)
        score_all(decoder, *made.prompts([4]))
    counts = [codes[:, :m].unique(dim=0, return_counts=True)[1] for m in (1, 2)]
    assert fed == [len(c) for c in counts] + [int((c > 1).sum()) for c in counts]
    assert fed[3] < fed[1]


def test_fewer_than_one_row_is_refused(bench):
    made = bench("gpt2")
    with pytest.raises(UserError, match="rows must be at least 1, got 0"):
        score_all(Decoder(made.model, made.catalog, START), *made.prompts([3, 3, 3]), rows=0)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_reset_to_its_prefill_returns_the_logits_of_a_new_one(bench, family, backend):
    """After steps with other numbers of beams, and right after the prefill."""
    made = bench(family)
    plan = Decoder(made.model, made.catalog, START, backend=backend).plan
    requests = [LogitsRequest(START + level * SIZE, SIZE, logsumexp=True) for level in range(3)]
    prompts = made.prompts([7, 2])

    def feed(state: DecoderState, beams: int) -> list[Logits]:
        codes = torch.arange(2 * beams).view(2, beams) % SIZE
        first = state.decode_step(codes + START, torch.zeros_like(codes), requests[1])
        return [first, state.decode_step(codes + START + SIZE, codes.flip(1) % beams, requests[2])]

    used, fresh = plan.new_state(), plan.new_state()
    with torch.inference_mode():
        used.prefill(*prompts, requests[0])
        fresh.prefill(*prompts, requests[0])
        feed(used, 5)
        used.reset_to_prefill()
        used.reset_to_prefill()
        for mine, other in zip(feed(used, 3), feed(fresh, 3), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_encoder_runs_once_per_prompt_for_all_chunks(bench, backend, monkeypatch):
    made, calls = bench("t5"), []
    encode = T5State._encode
    decoder = Decoder(made.model, made.catalog, START, backend=backend)
    monkeypatch.setattr(T5State, "_encode", lambda self, *of: calls.append(1) or encode(self, *of))
    hook = made.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    score_all(decoder, *made.prompts([4, 6]), rows=7)
    hook.remove()
    assert len(calls) == 2  # one per user
