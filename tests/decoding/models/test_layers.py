"""The layers of our own steps: padding, the head, and the table of codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cemg.decoding import Decoder, Recommendations
from cemg.decoding.models.layers import FeedForward, padding_mask

from ..conftest import LEVELS, SIZE, START, VOCABULARY, Bench, random_catalog
from .fast_models import SHAPES, build, by_item

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("shape", ["gpt2", "llama, as many key heads"])
def test_padding_takes_no_positions(shape, same_lists):
    """Ten positions, four prompt tokens and two codes: seven cells of padding have no effect."""
    model = build(*SHAPES[shape])
    if shape == "gpt2":
        model = build("GPT2", SHAPES["gpt2"][1] | {"n_positions": 10})
    catalog = random_catalog(60, 1)
    ids, mask = Bench(model, catalog).prompts([4])
    pad = (7, 0)
    wide = torch.nn.functional.pad(ids, pad), torch.nn.functional.pad(mask, pad)
    for backend in ("native", "torch"):
        decoder = Decoder(model, catalog, START, backend=backend)
        same_lists(decoder.decode(*wide, 9), decoder.decode(ids, mask, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_score_added_to_the_padding_mask_stays_finite(dtype):
    """The lowest float16 plus a score below -16 is -inf, and the softmax of a row of -inf is NaN."""
    padding = padding_mask(torch.tensor([[1, 0]]), dtype)
    assert (padding - 1000.0).isfinite().all() and padding[0, 0] == 0
    assert padding.float().softmax(1).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("shape", ["t5 tied", "gpt2", "llama, as many key heads"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_does_not_change_results_in_half_precision(shape, dtype):
    model = build(*SHAPES[shape]).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in (".q.", "q_proj", "c_attn", ".k.", "k_proj")):
                weight.mul_(30)
    decoder = Decoder(model, random_catalog(60, 1), START, backend="torch", check=False)  # rounding decides
    ids, mask = Bench(model, decoder.catalog).prompts([7, 3])
    together = by_item(decoder.decode(ids, mask, 80))
    own = mask[1].bool()
    alone = by_item(decoder.decode(ids[1:, own], mask[1:, own], 80))
    assert len(alone) == 60 and all(math.isfinite(score) for score in alone.values())
    for (_, item), score in alone.items():
        assert abs(together[1, item] - score) <= 0.05 * abs(
            score
        )  # a batch of another size rounds differently


def test_the_head_in_blocks_of_rows_equals_the_head_at_once(monkeypatch, same_lists):
    from cemg.decoding.models import layers

    model = build(*SHAPES["gpt2"])
    catalog = random_catalog(60, 1)
    prompts = Bench(model, catalog).prompts([4, 4, 4])
    whole = Decoder(model, catalog, START, backend="torch").decode(*prompts, 9)
    monkeypatch.setattr(layers, "MAX_LOGITS", 3 * VOCABULARY)
    same_lists(Decoder(model, catalog, START, backend="torch").decode(*prompts, 9), whole)


def test_codes_beyond_the_tables_limit_are_projected_at_each_step(monkeypatch, same_lists):
    from cemg.decoding.models import layers

    for shape in ("t5 tied", "qwen3, normed heads"):
        model = build(*SHAPES[shape])
        prompts: tuple[Tensor, Tensor] = Bench(model, random_catalog(60, 1)).prompts([4, 2])
        with_table = Decoder(model, random_catalog(60, 1), START, backend="torch")
        with monkeypatch.context() as patch:
            patch.setattr(layers, "MAX_TABLE_CODES", LEVELS * SIZE - 1)
            without = Decoder(model, random_catalog(60, 1), START, backend="torch")
        assert with_table.plan.table is not None and without.plan.table is None
        same_lists(without.decode(*prompts, 9), with_table.decode(*prompts, 9))


@pytest.mark.parametrize("more", [0, 3, 8])
@pytest.mark.parametrize("shape", ["t5 gated, uneven stacks", "gpt2", "qwen3, normed heads"])
def test_prompts_of_different_lengths_are_computed_without_padding(shape, more, monkeypatch, same_lists):
    """15 tokens in 27 cells. ``more`` tokens are reserved, since recordings round the count up."""
    made = Bench(build(*SHAPES[shape]), random_catalog(60, 1))
    ids, mask = made.prompts([9, 2, 4])
    decoder = Decoder(made.model, made.catalog, START, backend="torch")
    call, rows = FeedForward.__call__, []
    monkeypatch.setattr(FeedForward, "__call__", lambda self, x: rows.append(len(x)) or call(self, x))
    with torch.inference_mode():
        packed = decoder._beam_search(ids, mask, 20, None, num_tokens=15 + more)
        assert rows[0] == 15 + more
        rows.clear()
        whole = decoder._beam_search(ids, mask, 20, None, num_tokens=27)
    assert rows[0] == 27
    same_lists(packed, whole)
    same_lists(decoder.decode(ids, mask, 20), whole)
    for row, length in enumerate((9, 2, 4)):  # as in a batch of its own
        held = mask[row].bool()
        alone = decoder.decode(ids[row, held][None], torch.ones(1, length, dtype=torch.int64), 20)
        same_lists(alone, Recommendations(*(part[row : row + 1] for part in packed.tensors())))


@pytest.mark.parametrize("shape", ["t5 gated, uneven stacks", "gpt2", "qwen3, normed heads"])
def test_nan_in_one_users_prompt_does_not_affect_other_users(shape):
    """The embedding of token 22, which is not a code, is NaN. It ends the first of three prompts."""
    made = Bench(build(*SHAPES[shape]), random_catalog(60, 1))
    ids, mask = made.prompts([4, 2, 9])
    spoilt = ids.clone()
    spoilt[0, mask[0].nonzero()[-1]] = 22
    decoder = Decoder(made.model, made.catalog, START, "level", backend="torch")
    table = getattr(decoder.plan, "encoder_embedding", decoder.plan.embedding)
    table[22] = float("nan")
    found, wanted = (decoder.decode(prompt, mask, 6) for prompt in (spoilt, ids))
    assert (found.items[0] < 0).all() and (wanted.items[0] >= 0).any()
    assert torch.equal(found.items[1:], wanted.items[1:]) and torch.equal(found.scores[1:], wanted.scores[1:])
