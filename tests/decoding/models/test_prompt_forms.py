"""Every path returns the same results for padding on either side, for gaps, and for any start token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.decoding import Decoder, TransformersDecoder, score_all
from cemg.decoding.beams import pad_left, pad_right, trim_padding
from cemg.errors import UserError

from ..conftest import START, Bench, random_catalog
from . import families
from .fast_models import SHAPES, build
from .test_families import forward_scores

pytestmark = pytest.mark.medium

BACKENDS = ["native", "torch", "reference", "transformers"]
CAUSAL = ["gpt2", "llama, as many key heads"]
FORMS = ("left", "right", "mixed", "gaps")


def decoder_of(backend: str, made: Bench) -> Any:
    if backend == "transformers":
        return TransformersDecoder(made.model, made.catalog, START)
    return Decoder(made.model, made.catalog, START, backend=backend)


def in_form(form: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts in another form; padding cells hold a token that must not be read."""
    rows = [own[held.bool()] for own, held in zip(ids, mask, strict=True)]
    width = ids.shape[1] + 3
    placed, there = torch.full((len(rows), width), START + 7), torch.zeros(len(rows), width, dtype=mask.dtype)
    for row, tokens in enumerate(rows):
        place = torch.arange(len(tokens))
        if form == "left" or (form == "mixed" and row % 2):
            place += width - len(tokens)
        elif form == "gaps":
            place = place + torch.linspace(0, 2, len(tokens)).long()
        placed[row, place], there[row, place] = tokens, 1
    return placed, there


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", CAUSAL)
def test_the_lists_of_a_decoder_only_model_do_not_depend_on_where_padding_is(
    shape, backend, form, same_lists
):
    made = Bench(build(*SHAPES[shape]), random_catalog(60, 1))
    ids, mask = made.prompts([7, 2, 5])
    expected = Decoder(made.model, made.catalog, START).decode(ids, mask, 20)
    same_lists(decoder_of(backend, made).decode(*in_form(form, ids, mask), 20), expected)


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("form", FORMS)
def test_exact_searches_do_not_depend_on_where_padding_is(form, backend, same_lists):
    made = Bench(build(*SHAPES["gpt2"]), random_catalog(60, 1))
    ids, mask = made.prompts([7, 2, 5])
    decoder, moved = decoder_of(backend, made), in_form(form, ids, mask)
    same_lists(decoder.decode_exact(*moved, 5, 6), decoder.decode_exact(ids, mask, 5, 6))
    torch.testing.assert_close(score_all(decoder, *moved), score_all(decoder, ids, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lists_of_an_encoder_do_not_depend_on_where_padding_is(backend, form, same_lists):
    made = Bench(build(*SHAPES["t5 tied"]), random_catalog(60, 1))
    ids, mask = made.prompts([7, 2, 5])
    expected = Decoder(made.model, made.catalog, START).decode(ids, mask, 20)
    same_lists(decoder_of(backend, made).decode(*in_form(form, ids, mask), 20), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bart", "longt5", "t5"])
def test_the_scores_of_an_encoder_equal_its_plain_forward_wherever_padding_is(name, form):
    """BART has absolute positions; LongT5 sums blocks of 4 tokens from the first position on."""
    more = {"encoder_attention_type": "transient-global", "global_block_size": 4, "local_radius": 3}
    made = Bench(families.build(name, True, **(more if name == "longt5" else {})), random_catalog(60, 1))
    ids, mask = made.prompts([19, 2, 5, 12])
    decoder = Decoder(made.model, made.catalog, START)
    found = decoder.decode(*in_form(form, ids, mask), 60)
    for row in range(len(ids)):
        expected = forward_scores(made.model, made.catalog, ids[row][mask[row].bool()]).sum(0)
        torch.testing.assert_close(found.scores[row], expected[found.items[row]], rtol=0, atol=1e-3)


def test_tokens_keep_their_order_and_prompts_without_needless_padding_are_not_copied():
    ids = torch.tensor([[5, 6, 0, 7], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]])
    moved, there = pad_left(ids, mask)
    assert moved.tolist() == [[0, 5, 6, 7], [0, 0, 8, 9]] and there.tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    first, held = pad_right(ids, mask)
    assert first.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]] and held.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    for causal, prompts in ((True, (moved[:, 1:], there[:, 1:])), (False, (first[:, :3], held[:, :3]))):
        again, same = trim_padding(*prompts, causal=causal)
        assert again is prompts[0] and same is prompts[1]
    cut, short = trim_padding(F.pad(ids, (2, 1)), F.pad(mask, (2, 1)), causal=True)
    assert cut.tolist() == [[5, 6, 7], [0, 8, 9]] and short.tolist() == [[1, 1, 1], [0, 1, 1]]
    cut, short = trim_padding(F.pad(ids, (2, 1)), F.pad(mask, (2, 1)), causal=False)
    assert cut.tolist() == [[5, 6, 7], [8, 9, 0]] and short.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_padding_on_the_right_takes_no_positions():
    made = Bench(build("GPT2", SHAPES["gpt2"][1] | {"n_positions": 10}), random_catalog(60, 1))
    ids, mask = (F.pad(part, (0, 7)) for part in made.prompts([8]))
    for backend in BACKENDS[:3]:
        assert (decoder_of(backend, made).decode(ids, mask, 5).items >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_start_token_is_that_of_generate(backend, same_lists):
    """transformers 5 stores it in ``generation_config``; it may also be in the configuration alone."""
    made = Bench(build(*SHAPES["t5 tied"]), random_catalog(60, 1))
    prompts = made.prompts([5, 3])
    with_two = decoder_of(backend, made).decode(*prompts, 20)
    for own, generation in ((None, 2), (2, None), (5, 2)):
        made.model.config.decoder_start_token_id = own
        made.model.generation_config.decoder_start_token_id = generation
        same_lists(decoder_of(backend, made).decode(*prompts, 20), with_two)
    made.model.generation_config.decoder_start_token_id = 5
    other = decoder_of(backend, made).decode(*prompts, 20)
    assert (other.scores - with_two.scores).abs().max() > 1e-2


@pytest.mark.parametrize("backend", [None, "native", "torch", "reference"])
def test_a_model_without_a_start_token_is_refused(backend):
    model = build(*SHAPES["t5 tied"])
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(UserError, match="decoder_start_token_id"):
        Decoder(model, random_catalog(60, 1), START, backend=backend)
