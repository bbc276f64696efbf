"""A search without the trie is that of ``generate()``, and what is not an item is dropped."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from cemg.decoding import Decoder, score_all
from cemg.decoding.free import FreeDecoder
from cemg.errors import UserError
from cemg.tokenizer import Catalog

LEVELS, SIZE, START, VOCABULARY = 3, 6, 3, 24  # of the models in conftest.py


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("beams", [1, 4, 9])
def test_the_beams_are_those_of_generate(bench, family, beams):
    made = bench(family, 40)
    ids, mask = made.prompts([5, 3, 7])
    _, found = FreeDecoder(Decoder(made.model, made.catalog, START)).beams(ids, mask, beams)
    specials = [token for token in range(VOCABULARY) if not START <= token < START + LEVELS * SIZE]
    settings = GenerationConfig(
        do_sample=False, num_beams=beams, num_return_sequences=beams, max_new_tokens=LEVELS,
        min_new_tokens=LEVELS, early_stopping=False, suppress_tokens=specials, pad_token_id=0, eos_token_id=1,
        **({} if beams == 1 else {"length_penalty": 0.0}),
    )  # fmt: skip
    if family == "t5":
        settings.decoder_start_token_id = made.model.config.decoder_start_token_id
    out = made.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    assert found.tolist() == (out[:, -LEVELS:].view(len(ids), beams, LEVELS) - START).tolist()


def test_with_every_beam_the_items_are_the_exact_ranking(bench):
    made = bench("t5", 40)
    decoder = Decoder(made.model, made.catalog, START)
    ids, mask = made.prompts([4, 6])
    found = FreeDecoder(decoder).decode(ids, mask, (LEVELS * SIZE) ** LEVELS)
    exact = score_all(decoder, ids, mask)  # [B, N]
    count = len(made.catalog)
    torch.testing.assert_close(
        found.scores[:, :count], exact.sort(1, descending=True).values, atol=1e-4, rtol=0
    )
    assert (found.items[:, count:] == -1).all() and not found.certified.any()


def test_items_that_share_ids_are_refused(bench):
    made = bench("t5", 40)
    shared = Catalog.from_codes(torch.zeros(3, LEVELS, dtype=torch.int64), SIZE, shared=True)
    with pytest.raises(UserError, match="one semantic ID per item"):
        FreeDecoder(Decoder(made.model, shared, START))
