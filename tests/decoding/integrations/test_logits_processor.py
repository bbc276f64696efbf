"""The logits processor in ``generate()`` returns the items of a prefix function over a dict trie."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, LogitsProcessorList

from cemg.decoding import TransformersDecoder, TrieLogitsProcessor, plain_generation
from cemg.errors import UserError
from cemg_kernels import Trie

from ..conftest import LEVELS, SIZE, START, VOCABULARY, Bench, random_catalog

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
def test_one_processor_serves_several_generations_in_turn(bench, family, beams):
    made = bench(family)
    processor = TrieLogitsProcessor(made.catalog.trie, START)
    for lengths in (
        [6, 3],
        [6, 6],
        [3, 3],
        [9, 2],
    ):  # 6 = 3 + 3 codes: the length alone does not identify a new prompt
        prompts = made.prompts(lengths)
        expected = TransformersDecoder(made.model, made.catalog, START).decode(*prompts, beams)
        assert torch.equal(generate(made, processor, prompts, beams), expected.codes)


def test_with_more_beams_than_items_all_items_come_before_the_filling(bench):
    made = bench("gpt2", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # filled beams cause no warning
        codes = generate(made, TrieLogitsProcessor(made.catalog.trie, START), made.prompts([4]), 5)
        generate(made, TrieLogitsProcessor(made.catalog.trie, START), made.prompts([4, 2, 3]), 5)
    assert {tuple(row) for row in codes[0, :3].tolist()} == {
        tuple(row) for row in made.catalog.codes.tolist()
    }


def test_each_row_keeps_only_the_codes_that_continue_an_item():
    processor = TrieLogitsProcessor(TRIE, START)
    scores = torch.arange(24.0).expand(3, -1)
    start = torch.full((3, 2), 7)
    assert processor(start, scores)[0].isfinite().nonzero().flatten().tolist() == [START, START + 4]
    grown = torch.cat((start, torch.tensor([[START], [START + 4], [START + 2]])), dim=1)
    found = processor(grown, scores)
    alive = [row.isfinite().nonzero().flatten().tolist() for row in found]
    assert alive == [
        [START + SIZE + 1],
        [START + SIZE],
        [START + SIZE],
    ]  # the last row is not a prefix of any item
    assert found[0, START + SIZE + 1] == scores[0, START + SIZE + 1]


def test_an_illegal_row_causes_a_warning_unless_every_prefix_has_a_row():
    scores, start = torch.zeros(2, 24), torch.full((2, 2), 7)
    for second, expected in (
        (4, 0),
        (0, 0),
        (2, 1),
    ):  # rows of both first codes, of one twice, and of one and none
        processor = TrieLogitsProcessor(TRIE, START)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            processor(start, scores)
            processor(torch.cat((start, torch.tensor([[START], [START + second]])), dim=1), scores)
        assert len(seen) == expected


def test_a_vocabulary_without_the_codes_is_refused():
    with pytest.raises(UserError, match="the codes of level 0 are tokens 3 … 8, the model has 8"):
        TrieLogitsProcessor(TRIE, START)(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 8))


QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
BART = {
    "num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 3, "min_length": 56, "max_length": 142,
    "length_penalty": 2.0, "forced_bos_token_id": 1, "forced_eos_token_id": 1,
}  # fmt: skip
OTHERS = {
    "suppress_tokens": [4, 12], "begin_suppress_tokens": [5], "bad_words_ids": [[13]],
    "sequence_bias": [[[6], 5.0]], "encoder_no_repeat_ngram_size": 1, "renormalize_logits": True,
    "exponential_decay_length_penalty": (1, 1.1),
}  # fmt: skip


def with_settings(made: Bench, settings: dict[str, Any], monkeypatch) -> Bench:
    own = made.model.generation_config.to_dict() | settings
    monkeypatch.setattr(made.model, "generation_config", GenerationConfig.from_dict(own))
    return made


def as_in_the_readme(
    made: Bench, processor: TrieLogitsProcessor, prompts: tuple[torch.Tensor, ...], beams: int
):
    tokens = made.model.generate(
        prompts[0], attention_mask=prompts[1], num_beams=beams, num_return_sequences=beams,
        length_penalty=0.0, max_new_tokens=LEVELS, logits_processor=[processor],
    )  # fmt: skip
    codes = tokens[:, -LEVELS:] - START - SIZE * torch.arange(LEVELS)
    return made.catalog.trie.items(made.catalog.trie.lookup(codes)).view(len(prompts[0]), beams)


def bart() -> Bench:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.2,
        forced_eos_token_id=2,
    )  # fmt: skip
    return Bench(BartForConditionalGeneration(config).eval(), random_catalog(60, 0))


@pytest.mark.parametrize("settings", [QWEN, BART, OTHERS], ids=["Qwen2.5-Instruct", "BART", "others"])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_within_plain_generation_the_checkpoints_settings_have_no_effect(
    bench, monkeypatch, family, settings
):
    made = with_settings(bart() if family == "bart" else bench(family), settings, monkeypatch)
    own = made.model.generation_config
    prompts = made.prompts([9, 4, 6])
    expected = TransformersDecoder(made.model, made.catalog, START).decode(*prompts, 15)
    assert bool((expected.items >= 0).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with plain_generation(made.model):
            found = as_in_the_readme(made, TrieLogitsProcessor(made.catalog.trie, START), prompts, 15)
    assert torch.equal(found, expected.items)
    assert made.model.generation_config is own


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("t5", {"forced_bos_token_id": 1}),
        ("t5", {"forced_eos_token_id": 1}),
        ("llama", {"no_repeat_ngram_size": 1}),
        ("llama", {"suppress_tokens": [4, 5, 12]}),
        ("llama", {"bad_words_ids": [[4], [12]]}),
        ("llama", {"do_sample": True, "top_k": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_without_plain_generation_the_processor_warns_once(bench, monkeypatch, family, settings):
    made = with_settings(bench(family), settings, monkeypatch)
    processor = TrieLogitsProcessor(made.catalog.trie, START)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="plain_generation") as seen:
        for lengths in ([9, 4, 6], [3, 5]):
            as_in_the_readme(made, processor, made.prompts(lengths), 15)
    assert sum("plain_generation" in str(each.message) for each in seen) == 1


def test_plain_generation_covers_the_model_under_peft_and_restores_both(bench, monkeypatch):
    from peft import LoraConfig, get_peft_model

    made = with_settings(bench("llama"), QWEN, monkeypatch)
    adapted = get_peft_model(made.model, LoraConfig(target_modules="all-linear", r=2)).eval()
    own = made.model.generation_config
    with pytest.raises(ZeroDivisionError), plain_generation(adapted):
        assert adapted.generation_config.top_k is None and made.model.generation_config.top_k is None
        adapted.generate(torch.tensor([[5, 6]]), max_new_tokens=1)
        raise ZeroDivisionError
    assert made.model.generation_config is own and adapted.generation_config is own
    adapted.unload()
