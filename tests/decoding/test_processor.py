"""The logits processor inside ``generate`` finds what the prefix function over a dict finds."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from cemg.decoding import TransformersDecoder, TrieLogitsProcessor
from cemg.errors import UserError
from cemg_kernels import Trie

START, LEVELS, SIZE = 3, 3, 6  # of the models in conftest.py
TRIE = Trie.from_codes(torch.tensor([[0, 1, 2], [0, 1, 5], [4, 0, 0]]), SIZE)


def generate(made, processor, prompts, beams):
    ids, mask = prompts
    config = GenerationConfig(
        num_beams=beams, num_return_sequences=beams, max_new_tokens=LEVELS, min_new_tokens=LEVELS,
        length_penalty=0.0, early_stopping=False, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    processors = LogitsProcessorList([processor])
    out = made.model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
    )
    codes = out[:, -LEVELS:] - torch.arange(LEVELS) * SIZE - START
    return codes.view(len(ids), beams, LEVELS)


@pytest.mark.parametrize("beams", [1, 7])
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_one_processor_serves_one_generation_after_the_other(bench, family, beams):
    made = bench(family)
    processor = TrieLogitsProcessor(made.catalog.trie, START)
    for lengths in ([6, 3], [6, 6], [3, 3], [9, 2]):  # 6 follows 3 + 3 codes: the length alone says nothing
        prompts = made.prompts(lengths)
        expected = TransformersDecoder(made.model, made.catalog, START).decode(*prompts, beams)
        assert torch.equal(generate(made, processor, prompts, beams), expected.codes)


def test_more_beams_than_items_leave_only_items_before_the_filling(bench):
    made = bench("gpt2", 3)
    codes = generate(made, TrieLogitsProcessor(made.catalog.trie, START), made.prompts([4]), 5)
    assert {tuple(row) for row in codes[0, :3].tolist()} == {
        tuple(row) for row in made.catalog.codes.tolist()
    }


def test_each_row_keeps_the_codes_that_go_on_and_loses_all_other_tokens():
    processor = TrieLogitsProcessor(TRIE, START)
    scores = torch.arange(24.0).expand(3, -1)
    start = torch.full((3, 2), 7)
    assert processor(start, scores)[0].isfinite().nonzero().flatten().tolist() == [START, START + 4]
    grown = torch.cat((start, torch.tensor([[START], [START + 4], [START + 2]])), dim=1)
    found = processor(grown, scores)
    alive = [row.isfinite().nonzero().flatten().tolist() for row in found]
    assert alive == [[START + SIZE + 1], [START + SIZE], [START + SIZE]]  # the last one fits no item
    assert found[0, START + SIZE + 1] == scores[0, START + SIZE + 1]


def test_a_vocabulary_without_the_codes_is_refused():
    with pytest.raises(UserError, match="the codes of level 0 are tokens 3 … 8, the model has 8"):
        TrieLogitsProcessor(TRIE, START)(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 8))
