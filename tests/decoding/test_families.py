"""Every family of ``transformers`` against the definition: the plain forward of prompt and prefix, no cache,
no padding.

``pytest -m slow -s tests/decoding/test_families.py`` prints a table of all families.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.decoding import Decoder, score_all
from cemg.decoding.rows import start_token
from cemg.tokenizer import Catalog

from . import families
from .conftest import LEVELS, SIZE, START, Bench, random_catalog

ITEMS, BEAMS = 40, 5
TOLERANCE = (
    1e-3  # sums of three float32 log-probabilities of sharpened weights, in another order of operations
)
NAMED = [  # in bug reports
    "bloom", "falcon", "gemma3", "gemma3_text", "gpt_neo", "jamba", "lfm2", "llama4_text", "mamba", "mpt",
    "openai-gpt", "qwen3_next", "switch_transformers", "t5gemma",
]  # fmt: skip


@torch.inference_mode()
def forward_scores(model: PreTrainedModel, catalog: Catalog, prompt: Tensor) -> Tensor:
    """Log-probabilities [levels, N] of each item's codes after one prompt [S] without padding."""
    tokens = catalog.codes + START + SIZE * torch.arange(LEVELS)
    scores = torch.empty(LEVELS, len(catalog))
    for level in range(LEVELS):
        prefixes, row = tokens[:1, :0], torch.zeros(len(catalog), dtype=torch.int64)
        if level > 0:
            prefixes, row = tokens[:, :level].unique(dim=0, return_inverse=True)
        prompts = prompt.expand(len(prefixes), -1)
        inputs: dict[str, Any] = {"input_ids": torch.cat((prompts, prefixes), dim=1)}
        if model.config.is_encoder_decoder:
            start = torch.full((len(prefixes), 1), start_token(model))
            inputs = {"input_ids": prompts, "decoder_input_ids": torch.cat((start, prefixes), dim=1)}
        log_probs = model(**inputs).logits[:, -1].float().log_softmax(-1)
        scores[level] = log_probs[row, tokens[:, level]]
    return scores


def beam_search(scores: Tensor, catalog: Catalog, beams: int) -> Tensor:
    """The best ``beams`` total scores that a beam search ends on, by ``forward_scores`` [levels, N]."""
    total, alive = scores.cumsum(0), torch.ones(len(catalog), dtype=torch.bool)
    for level in range(LEVELS):
        prefixes, row = catalog.codes[:, : level + 1].unique(dim=0, return_inverse=True)
        best = torch.full((len(prefixes),), float("-inf"))
        best[row[alive]] = total[level][alive]
        alive &= (best >= best.topk(min(beams, len(best))).values[-1])[row]
    return total[-1][alive].sort(descending=True).values[:beams]


def check(decoder: Decoder, made: Bench, lengths: list[int]) -> list[Tensor]:
    """Assert that all items and a narrow beam search score as the definition says; returns its totals."""
    ids, mask = made.prompts(lengths)
    whole = decoder.decode(ids, mask, ITEMS)
    narrow = decoder.decode(ids, mask, BEAMS)
    totals = []
    for row in range(len(lengths)):
        scores = forward_scores(made.model, made.catalog, ids[row][mask[row].bool()])
        totals.append(scores.sum(0))
        assert sorted(whole.items[row].tolist()) == list(range(ITEMS))
        torch.testing.assert_close(whole.scores[row], totals[row][whole.items[row]], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(narrow.scores[row], totals[row][narrow.items[row]], rtol=0, atol=TOLERANCE)
        expected = beam_search(scores, made.catalog, BEAMS)
        torch.testing.assert_close(narrow.scores[row], expected, rtol=0, atol=TOLERANCE)
    return totals


def make(name: str, seq2seq: bool, **more: Any) -> Bench:
    return Bench(families.build(name, seq2seq, **more), random_catalog(ITEMS, 3))


def is_seq2seq(name: str) -> bool:
    return name not in families.names(False)


@pytest.mark.parametrize("name", NAMED)
def test_a_family_of_the_bug_reports_decodes_as_its_plain_forward_scores(name):
    made = make(name, is_seq2seq(name))
    decoder = Decoder(made.model, made.catalog, START)
    long, short = check(decoder, made, [9, 4])
    assert (long - short).abs().max() > 0.01  # the prompt matters
    check(decoder, made, [families.WINDOW + 8, 5])


@pytest.mark.parametrize("name", ["gpt_neo", "mamba"])
@pytest.mark.parametrize("normalize", ["level", "valid"])
def test_normalizations_and_exact_searches_hold_on_one_row_per_beam(name, normalize):
    made = make(name, False)
    ids, mask = made.prompts([20, 6])
    decoder = Decoder(made.model, made.catalog, START, normalize)
    found, exact = decoder.decode(ids, mask, ITEMS), decoder.decode_exact(ids, mask, 5, 5)
    every = score_all(decoder, ids, mask, rows=30)  # in chunks
    for row in range(2):
        expected = made.all_scores(ids[row][mask[row].bool()], normalize)
        torch.testing.assert_close(found.scores[row], expected[found.items[row]], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(every[row], expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(exact.scores[row], expected.topk(5).values, rtol=0, atol=TOLERANCE)
    assert exact.certified.tolist() == [5, 5]


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neo", "llama4_text", "mistral"])
def test_prompts_of_hundreds_of_tokens_pass_a_local_window_many_times(name):
    made = make(name, False)
    check(Decoder(made.model, made.catalog, START), made, [210, 3, 40])


def test_a_falcon_with_alibi_decodes_as_its_plain_forward_scores():
    made = make("falcon", False, alibi=True)
    check(Decoder(made.model, made.catalog, START), made, [24, 5])
