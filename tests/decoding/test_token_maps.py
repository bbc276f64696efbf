"""Token maps of other projects' checkpoints: every engine returns the items of ``generate()``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from cemg.decoding import Decoder, TransformersDecoder, TrieLogitsProcessor, score_all
from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens

from ..helpers import generate_over_prefixes

VOCABULARY, LEVELS, K, START = 80, 3, 12, 5
BACKENDS = ("native", "torch", "reference")
SIZES = {
    "per level": (9, 12, 7),
    "lexicographic": (12, 12, 12),
    "scattered": (12, 10, 12),
    "one for all": (12,) * 3,
}


def lexicographic() -> list[list[int]]:
    """Tokens in the order in which LETTER and LC-Rec add them: sorted names, <a_10> before <a_2>."""
    names = [[f"<{'abc'[level]}_{code}>" for code in range(K)] for level in range(LEVELS)]
    place = {name: START + rank for rank, name in enumerate(sorted(itertools.chain(*names)))}
    return [[place[name] for name in level] for level in names]


def scattered() -> Tensor:
    """Tokens in any order; two codes of a level have no token, and two levels share one."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randperm(VOCABULARY - START, generator=generator)[:K] + START for _ in range(LEVELS)]
    rows[2][0] = rows[0][1]
    table = torch.stack(rows)
    table[1, 10:] = -1
    return table


MAPS: dict[str, Any] = {
    "per level": START, "lexicographic": lexicographic(), "scattered": scattered(),
    "one for all": [list(range(20, 20 + K))] * LEVELS,
}  # fmt: skip


def tokens_by_hand(kind: str) -> list[list[int]]:
    """The token of every code, without the code under test."""
    if kind != "per level":
        given = MAPS[kind]
        return given.tolist() if isinstance(given, Tensor) else given
    begins = [START, START + 9, START + 9 + 12]
    return [[b + c for c in range(size)] for b, size in zip(begins, SIZES[kind], strict=True)]


def catalog_of(kind: str, items: int = 90, *, own: bool = True) -> Catalog:
    generator = torch.Generator().manual_seed(1)
    every = torch.cartesian_prod(*[torch.arange(size) for size in SIZES[kind]])
    codes = every[torch.randperm(len(every), generator=generator)[:items]]
    return Catalog.from_codes(codes, SIZES[kind], tokens=MAPS[kind] if own else None)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            initializer_range=0.2,
        )
    )  # fmt: skip
    for model in (t5, llama):
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_(0, 0.5)
    return {"t5": t5.eval(), "llama": llama.eval()}


def prompts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = torch.randint(START, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        mask[1, 4:] = 0
    else:
        mask[1, :3] = 0
    return ids * mask, mask


def by_generate(
    model: PreTrainedModel, catalog: Catalog, kind: str, beams: int, processors: list[Any]
) -> tuple[Tensor, Tensor]:
    """Item rows and scores [B, W] of ``generate`` over the sequences of tokens written by hand."""
    tokens = tokens_by_hand(kind)
    rows = [tuple(tokens[m][c] for m, c in enumerate(codes)) for codes in catalog.codes.tolist()]
    ids, mask = prompts(model)
    sequences, scores = generate_over_prefixes(
        model, {"input_ids": ids, "attention_mask": mask}, rows, beams, processors,
        renormalize_logits="valid" in [getattr(p, "name", "") for p in processors],
    )  # fmt: skip
    return torch.tensor([[rows.index(row) for row in user] for user in sequences]), scores


class OverTheLevel:
    """Log-softmax over the tokens of the next level."""

    name = "level"

    def __init__(self, tokens: list[list[int]], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        own = [token for token in self.tokens[input_ids.shape[1] - self.start] if token >= 0]
        out = torch.full_like(scores, float("-inf"))
        out[:, own] = scores[:, own].log_softmax(1)
        return out


class Renormalized:
    """A marker that makes ``by_generate`` renormalize."""

    name = "valid"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("kind", MAPS)
def test_every_backend_and_the_reference_engine_return_the_items_of_generate(models, kind, family, normalize):
    model, catalog, beams = models[family], catalog_of(kind), 8
    start = 1 if family == "t5" else prompts(model)[0].shape[1]
    extra = {"vocab": [], "level": [OverTheLevel(tokens_by_hand(kind), start)], "valid": [Renormalized()]}
    items, scores = by_generate(model, catalog, kind, beams, extra[normalize])
    decoders = [Decoder(model, catalog, normalize=normalize, backend=b) for b in BACKENDS]
    for decoder in (*decoders, TransformersDecoder(model, catalog, normalize=normalize)):
        found = decoder.decode(*prompts(model), beams)
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
        assert torch.equal(found.items, items)  # no two of these scores are equal
        assert torch.equal(found.codes, catalog.codes[items])


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("kind", MAPS)
def test_the_exact_ranking_equals_a_search_with_one_beam_per_item(models, kind, family):
    model, catalog = models[family], catalog_of(kind)
    for normalize in ("vocab", "level", "valid"):
        decoder = Decoder(model, catalog, normalize=normalize)
        every = decoder.decode(*prompts(model), len(catalog))
        scores = score_all(decoder, *prompts(model))
        torch.testing.assert_close(scores.gather(1, every.items), every.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("kind", MAPS)
def test_the_logits_processor_keeps_the_mapped_tokens(models, kind, family):
    model, catalog = models[family], catalog_of(kind)
    items, _ = by_generate(model, catalog, kind, 6, [])
    ids, mask = prompts(model)
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=6, num_return_sequences=6, max_new_tokens=LEVELS,
        min_new_tokens=LEVELS, length_penalty=0.0, early_stopping=False, do_sample=False,
        logits_processor=LogitsProcessorList([TrieLogitsProcessor(catalog)]),
    )  # fmt: skip
    codes = catalog.code_tokens().codes_of(out[:, -LEVELS:])
    assert torch.equal(catalog.trie.items(catalog.trie.lookup(codes)).view(3, 6), items)


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
def test_a_model_with_one_row_per_beam_takes_a_map_too(normalize):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0,
                         bos_token_id=1, eos_token_id=1, initializer_range=0.2)  # fmt: skip
    model = BloomForCausalLM(config).eval()
    catalog = catalog_of("scattered")
    decoder = Decoder(model, catalog, normalize=normalize)
    assert "one row per beam" in decoder.path
    found = decoder.decode(*prompts(model), 8)
    expected = TransformersDecoder(model, catalog, normalize=normalize).decode(*prompts(model), 8)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert torch.equal(found.items, expected.items)


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_more_beams_than_items_if_code_0_has_no_token(models, family, normalize):
    codes = torch.tensor([[3, 2, 7], [3, 5, 7], [4, 2, 6]])
    table = torch.full((3, 8), -1)
    for level, used in enumerate(([3, 4], [2, 5], [6, 7])):
        table[level, used] = torch.tensor([70 - level, 30 + level])
    catalog = Catalog.from_codes(codes, 8, tokens=table)
    model = models[family]
    found = [
        Decoder(model, catalog, normalize=normalize, backend=b).decode(*prompts(model), 9) for b in BACKENDS
    ]
    scores = score_all(Decoder(model, catalog, normalize=normalize), *prompts(model))
    for one in found:
        assert torch.equal(one.items, found[-1].items) and (one.items >= 0).sum() == 9
        torch.testing.assert_close(
            one.scores[:, :3], scores.sort(1, descending=True).values, rtol=0, atol=1e-5
        )


def test_a_map_passed_to_the_decoder_equals_one_in_the_catalog(models):
    own = Decoder(models["t5"], catalog_of("scattered")).decode(*prompts(models["t5"]), 5)
    given = Decoder(models["t5"], catalog_of("scattered", own=False), scattered())
    assert torch.equal(given.decode(*prompts(models["t5"]), 5).items, own.items)


def test_equal_sizes_per_level_are_the_consecutive_layout():
    tokens = CodeTokens.of(7, (4, 4))
    assert tokens.start == 7 and tokens.table.tolist() == [[7, 8, 9, 10], [11, 12, 13, 14]]


def test_a_smaller_level_moves_the_tokens_of_the_next_one():
    tokens = CodeTokens.of(7, (2, 4))
    assert tokens.start is None and tokens.table.tolist() == [[7, 8, -1, -1], [9, 10, 11, 12]]
    assert tokens.codes_of(torch.tensor([[8, 12], [9, 8]])).tolist() == [[1, 3], [-1, -1]]


def test_a_code_beyond_its_own_level_is_refused_with_the_size_of_that_level():
    with pytest.raises(UserError, match="no catalog can be built") as caught:
        Catalog.from_codes(torch.tensor([[0, 3], [2, 0]]), (2, 4))
    assert "row 1 has code 2 on level 0, which has 2 codes" in str(caught.value.cause)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2]], "the token map has 1 levels, the catalog 2"),
        ([[1, 2, 3], [4, 5]], "3 tokens on level 0, the catalog 2 codes"),
        ([[1, 1], [4, 5]], "two codes of level 0 have the token 1"),
        ([[1, -2], [4, 5]], "token -2 of level 0 is negative"),
        ([[1, 2], [4, -1]], "code 1 of level 1 has no token"),
        ([[1, 2], [4]], "code 1 of level 1 has no token"),
        (-1, "code_token_start must be 0 or more, got -1"),
    ],
)
def test_a_map_that_does_not_fit_its_catalog_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Catalog.from_codes(torch.tensor([[0, 1], [1, 0]]), 2, tokens=given)


def test_a_decoder_without_a_map_raises_an_error_that_names_the_fix(models):
    with pytest.raises(UserError, match="tokens of the codes are not known") as caught:
        Decoder(models["t5"], catalog_of("per level", own=False))
    assert "code_token_start" in str(caught.value.fix)


def test_two_maps_that_differ_are_refused(models):
    with pytest.raises(UserError, match="differs from the token map of the catalog"):
        Decoder(models["t5"], catalog_of("lexicographic"), START)


def test_a_map_with_tokens_beyond_the_vocabulary_is_refused(models):
    catalog = Catalog.from_codes(torch.tensor([[0, 1], [1, 0]]), 2, tokens=[[1, 2], [3, VOCABULARY]])
    with pytest.raises(UserError, match="does not belong") as caught:
        Decoder(models["t5"], catalog)
    assert "need 81 tokens, the model has 80" in str(caught.value.cause)
