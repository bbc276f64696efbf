"""The fast paths against the models' own forward, for every supported architecture."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cemg.decoding import Decoder, Recommendations, record_timings, score_all
from cemg.decoding.models.layers import FeedForward, padding_mask
from cemg.decoding.models.native import large_pages
from cemg.errors import UserError
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter, _native, use_fast_kernels

from ..conftest import LEVELS, SIZE, START, VOCABULARY, Bench, random_catalog, step_by_step

pytestmark = pytest.mark.medium

ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5 tied": ("T5", T5 | {"tie_word_embeddings": True}),
    "t5 gated, uneven stacks": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    "mt5": ("MT5", T5),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
                      "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}),
    "llama, as many key heads": ("Llama", ROTARY | {"num_key_value_heads": 4}),
    "llama with biases": ("Llama", ROTARY | {"attention_bias": True, "mlp_bias": True}),
    "llama3 rotation": ("Llama", ROTARY | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "mistral": ("Mistral", ROTARY | {"sliding_window": None}),
    "qwen2, biases of three projections": ("Qwen2", ROTARY),
    "qwen3, normed heads": ("Qwen3", ROTARY | {"head_dim": 16}),
}  # fmt: skip
CLASSES = {
    "T5": "T5ForConditionalGeneration",
    "MT5": "MT5ForConditionalGeneration",
    "GPT2": "GPT2LMHeadModel",
}
WINDOW: dict[str, Any] = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 0}


def build(kind: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name and weight.dim() == 1:
                weight.normal_(0, 0.3)
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model


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


def with_adapters(model: transformers.PreTrainedModel, **options: Any) -> Any:
    """The model with LoRA adapters whose weights are far from their initial values."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(**({"target_modules": "all-linear", "r": 2} | options))
    adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    return adapted


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


def by_item(found: Any) -> dict[tuple[int, int], float]:
    return {
        (row, item): score
        for row, (items, scores) in enumerate(zip(found.items.tolist(), found.scores.tolist(), strict=True))
        for item, score in zip(items, scores, strict=True)
        if item >= 0
    }


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no Linux")
def test_large_pages_are_private_to_the_process():
    """Shared ones stay small, and a forked child would write into its parent's weights."""
    room = large_pages(2**20)
    assert room.shape == (2**20,) and not room.any()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(place, 16) for place in line.split()[0].split("-"))
        if begin <= room.data_ptr() < end:
            assert line.split()[1] == "rw-p"
            return
    raise AssertionError("the room lies in no mapping")


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


@pytest.mark.parametrize(("shape", "longest"), [("t5 tied", 6), ("llama, as many key heads", 600)])
def test_searches_side_by_side_do_not_disturb_each_other_and_leave_their_room(shape, longest, same_lists):
    """600: the tables of rotations grow while others read them."""
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
