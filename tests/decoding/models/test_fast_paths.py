"""The fast paths against the models' own forward, for every supported architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cemg.decoding import Decoder, score_all
from cemg.errors import UserError

from ..conftest import START, VOCABULARY, Bench, random_catalog
from .fast_models import ROTARY, SHAPES, WINDOW, build, by_item, with_adapters

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fast_path_returns_the_lists_of_the_models_own_forward(shape, normalize, backend, same_lists):
    """For prompts of equal and of mixed lengths, for one beam, and for more beams than items of a code."""
    model = build(*SHAPES[shape])
    catalog = random_catalog(60, 1)
    fast = Decoder(model, catalog, START, normalize, backend=backend)
    slow = Decoder(model, catalog, START, normalize, backend="reference")
    assert fast.path.startswith("fast") and slow.path.startswith("the model's own forward")
    for lengths in ([5, 5], [7, 2, 4]):
        for beams in (1, 4, 80):
            prompts = Bench(model, catalog).prompts(lengths)
            same_lists(fast.decode(*prompts, beams), slow.decode(*prompts, beams))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Mistral", ROTARY | {"sliding_window": 12}, "sliding window"),
        ("Qwen2", ROTARY | WINDOW, "sliding window"),
        ("GPTNeoX", {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"}, "gpt_neox"),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1,
                  "eos_token_id": 1, "scale_attn_by_inverse_layer_idx": True}, "scaled"),
    ],
)  # fmt: skip
def test_an_unsupported_model_runs_on_its_own_forward_and_the_path_names_the_reason(kind, settings, reason):
    decoder = Decoder(build(kind, settings), random_catalog(60, 1), START)
    assert decoder.path.startswith("the model's own forward") and reason in decoder.path
    assert (decoder.decode(torch.tensor([[5, 6]]), torch.ones(1, 2).long(), 3).items >= 0).all()


def test_a_partial_rotary_embedding_has_no_fast_path():
    model: Any = build(*SHAPES["llama, as many key heads"])
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]
    with pytest.raises(UserError, match="a part of each head"):
        Decoder(model, random_catalog(60, 1), START, backend="native")


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("shape", ["t5 tied", "t5 gated, uneven stacks", "gpt2", "qwen3, normed heads"])
def test_the_fast_path_applies_lora_adapters(shape, backend, same_lists):
    model = build(*SHAPES[shape])
    prompts = Bench(model, random_catalog(60, 1)).prompts([5, 3])
    before = Decoder(model, random_catalog(60, 1), START, backend=backend).decode(*prompts, 80)
    adapted = with_adapters(model)
    fast = Decoder(adapted, random_catalog(60, 1), START, backend=backend)
    assert fast.path.startswith("fast")
    found = fast.decode(*prompts, 80)
    same_lists(
        found, Decoder(adapted, random_catalog(60, 1), START, backend="reference").decode(*prompts, 80)
    )
    assert (found.scores - before.scores).nan_to_num().abs().max() > 0.1  # the adapters have an effect
    with adapted.disable_adapter():
        off = Decoder(adapted, random_catalog(60, 1), START)
        assert "switched off" in off.path


def test_the_fast_path_reads_the_trained_copy_of_the_embeddings(same_lists):
    adapted = with_adapters(
        build(*SHAPES["qwen3, normed heads"]), modules_to_save=["embed_tokens", "lm_head"]
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    prompts = Bench(adapted, random_catalog(60, 1)).prompts([5, 3])
    fast = Decoder(adapted, random_catalog(60, 1), START, backend="native")
    assert fast.path.startswith("fast")
    same_lists(
        fast.decode(*prompts, 80),
        Decoder(adapted, random_catalog(60, 1), START, backend="reference").decode(*prompts, 80),
    )


def test_adapters_that_scale_the_weight_run_on_the_models_own_forward():
    adapted = with_adapters(build(*SHAPES["gpt2"]), use_dora=True)
    assert "DoRA" in Decoder(adapted, random_catalog(60, 1), START).path


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
@pytest.mark.parametrize("lengths", [[9, 4], [11, 4], [12, 4], [30, 11, 2]])
def test_sequences_past_the_sliding_window_use_the_models_own_masks(kind, lengths):
    """A window of 12 fits the first sequences; the second exceed it in the last step, the others before."""
    window = {"sliding_window": 12} if kind == "Mistral" else WINDOW | {"sliding_window": 12}
    made = Bench(build(kind, ROTARY | window), random_catalog(60, 1))
    ids, mask = made.prompts(lengths)
    decoder = Decoder(made.model, made.catalog, START)
    every = score_all(decoder, ids, mask, rows=80)
    found = decoder.decode(ids, mask, 60)
    for row in range(len(lengths)):
        expected = made.all_scores(ids[row, mask[row].bool()], "vocab")
        torch.testing.assert_close(found.scores[row], expected[found.items[row]], rtol=0, atol=1e-4)
        torch.testing.assert_close(every[row], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", ["t5 tied", "gpt2", "llama, as many key heads"])
def test_in_bfloat16_the_scores_stay_within_its_rounding(shape):
    """Compared with float32: bfloat16 keeps 8 bits, and a score sums three steps."""
    model = build(*SHAPES[shape])
    catalog = random_catalog(60, 1)
    prompts = Bench(model, catalog).prompts([5, 3])
    exact = by_item(Decoder(model, catalog, START).decode(*prompts, 80))
    half = by_item(Decoder(model.to(torch.bfloat16), catalog, START).decode(*prompts, 80))
    assert half.keys() == exact.keys()
    worst = max(abs(half[place] - exact[place]) for place in exact)
    assert 0 < worst < 0.15 * max(abs(score) for score in exact.values())


@pytest.mark.parametrize("shape", ["t5 tied", "t5 gated, uneven stacks"])
def test_a_float16_t5_whose_hidden_states_exceed_its_range_returns_float32_scores(shape):
    model = build(*SHAPES[shape])
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            for block in stack.block:
                block.layer[-1].DenseReluDense.wo.weight.mul_(1e6).clamp_(-6e4, 6e4)
    catalog = random_catalog(60, 1)
    prompts = Bench(model, catalog).prompts([5, 3])
    exact = by_item(Decoder(model, catalog, START).decode(*prompts, 80))
    half_model = model.to(torch.float16)
    with pytest.raises(UserError, match="differ from the model's"):  # its own forward clamps hidden states
        Decoder(half_model, catalog, START, backend="torch")
    half = by_item(Decoder(half_model, catalog, START, backend="torch", check=False).decode(*prompts, 80))
    assert half.keys() == exact.keys()
    worst = max(abs(half[place] - exact[place]) for place in exact)
    assert 0 < worst < 0.02 * max(abs(score) for score in exact.values())


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("shape", ["t5 tied", "gpt2"])
def test_an_empty_batch_returns_empty_results(shape, backend):
    made = Bench(build(*SHAPES[shape]), random_catalog(60, 1))
    decoder = Decoder(made.model, made.catalog, START, backend=backend)
    ids, mask = made.prompts([4])
    found = decoder.decode(ids[:0], mask[:0], 5)
    assert [list(part.shape) for part in found.tensors()] == [
        [0, 5],
        [0, 5],
        [0, 5, found.codes.shape[2]],
        [0],
    ]
    assert decoder.decode_exact(ids[:0], mask[:0], 3, 5).items.shape == (0, 3)
