"""A Decoder compares paths with the model's own forward when it is created, and uses one that agrees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from cemg.decoding import Decoder, TransformersDecoder, score_all
from cemg.decoding.models import generic as generic_module
from cemg.decoding.models.causal import CausalState
from cemg.decoding.models.eval_mode import evaluating
from cemg.decoding.models.generic import TreeMaskState
from cemg.decoding.models.native import NativeState
from cemg.decoding.models.rows import RowsState
from cemg.decoding.models.t5 import T5State
from cemg.decoding.parity_check import BEAMS, ParityCheck, precision_of
from cemg.decoding.protocol import Logits
from cemg.errors import UserError
from cemg.tokenizer import Catalog

from .conftest import SIZE, START, VOCABULARY, Bench, random_catalog
from .models.fast_models import ROTARY, SHAPES, build

OWN = "the model's own forward"
STATES = {"gpt2": CausalState, "t5 tied": T5State}


def tilted(logits: Logits) -> Logits:
    """Adds a hundredth of the standard deviation of the logits to every other code."""
    columns = logits.values.clone()
    columns[..., ::2] += 0.01 * columns.std()
    return Logits(columns, logits.logsumexp)


def spoil(monkeypatch: pytest.MonkeyPatch, kind: type, method: str = "decode_step") -> None:
    whole = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *of: tilted(whole(self, *of)))


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("method", ["prefill", "decode_step"])
@pytest.mark.parametrize("shape", STATES)
def test_a_path_that_differs_from_the_model_is_skipped_and_named(shape, method, normalize, monkeypatch):
    model, catalog = build(*SHAPES[shape]), random_catalog(60, 1)
    kind = "T5" if shape == "t5 tied" else "decoder-only"
    prompts = Bench(model, catalog).prompts([5, 3])
    expected = Decoder(model, catalog, START, normalize).decode(*prompts, 20)
    spoil(monkeypatch, NativeState, method)
    torch_steps = Decoder(model, catalog, START, normalize)
    assert torch_steps.path.startswith(f"fast {kind}: C++: its log-probabilities differ from the model's by ")
    found = torch_steps.decode(*prompts, 20)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    spoil(monkeypatch, STATES[shape], method)
    own = Decoder(model, catalog, START, normalize)
    assert own.path.startswith(OWN) and "PyTorch steps: its log-probabilities differ" in own.path
    torch.testing.assert_close(own.decode(*prompts, 20).scores, expected.scores, rtol=0, atol=1e-4)


def test_a_model_without_a_correct_path_is_refused(monkeypatch):
    model = build(*SHAPES["gpt2"])
    for kind in (NativeState, CausalState, TreeMaskState, RowsState):
        spoil(monkeypatch, kind)
    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be decoded here") as error:
        Decoder(model, random_catalog(60, 1), START)
    for name in ("C++", "PyTorch steps", "tree mask", "one row per beam"):
        assert f"{name}: its log-probabilities differ" in str(error.value.cause)
    with pytest.raises(UserError, match=r"the native decoder does not serve this model: C\+\+: its log-prob"):
        Decoder(model, random_catalog(60, 1), START, backend="native")
    assert Decoder(model, random_catalog(60, 1), START, check=False).path == "fast decoder-only in C++"


def test_an_error_inside_a_path_counts_as_a_difference(monkeypatch):
    def broken(self: Any, *of: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'lost'\nand more")

    monkeypatch.setattr(NativeState, "decode_step", broken)
    decoder = Decoder(build(*SHAPES["gpt2"]), random_catalog(60, 1), START)
    reason = "C++: AttributeError: 'NoneType' object has no attribute 'lost'"
    assert decoder.path == f"fast decoder-only: {reason}"


def test_an_out_of_memory_error_is_raised_and_not_counted_as_a_difference(monkeypatch):
    def full(self: Any, *of: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(NativeState, "decode_step", full)
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(build(*SHAPES["gpt2"]), random_catalog(60, 1), START)


def faulty_padding(self: Any, ids: Any, mask: Any, *of: Any) -> Logits:
    return START_OF[type(self)](self, ids, torch.ones_like(mask), *of)


def faulty_parents(self: Any, tokens: Any, parents: Any, request: Any) -> Logits:
    return STEP_OF[type(self)](self, tokens, torch.zeros_like(parents), request)


START_OF = {kind: kind.prefill for kind in (NativeState, CausalState, T5State, TreeMaskState)}
STEP_OF = {kind: kind.decode_step for kind in START_OF}


@pytest.mark.parametrize("kind", START_OF)
@pytest.mark.parametrize(("method", "fault"), [("prefill", faulty_padding), ("decode_step", faulty_parents)])
def test_errors_in_padding_and_in_parents_are_detected(kind, method, fault, monkeypatch):
    model = build(*SHAPES["t5 tied" if kind is T5State else "llama, as many key heads"])
    backend = {NativeState: "native", TreeMaskState: "reference"}.get(kind, "torch")
    monkeypatch.setattr(kind, method, fault)
    if kind is TreeMaskState:
        path = Decoder(model, random_catalog(60, 1), START, backend=backend).path
        assert "tree mask: its log-probabilities differ" in path and "one row per beam" in path
        return
    with pytest.raises(UserError, match="its log-probabilities differ"):
        Decoder(model, random_catalog(60, 1), START, backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_not_counted_as_a_difference(shape, dtype):
    model = build(*SHAPES[shape]).to(dtype)
    assert Decoder(model, random_catalog(60, 1), START).path.startswith("fast")
    assert Decoder(model, random_catalog(60, 1), START, backend="reference").path.startswith(OWN)


def test_errors_are_detected_in_half_precision_too(monkeypatch):
    model = build(*SHAPES["llama, as many key heads"]).to(torch.bfloat16)
    whole = CausalState.decode_step
    monkeypatch.setattr(CausalState, "decode_step", lambda self, *of: quieter(whole(self, *of)))
    assert "PyTorch steps: its log-probabilities differ" in Decoder(model, random_catalog(60, 1), START).path


def quieter(logits: Logits) -> Logits:
    return Logits(logits.values * 0.8, logits.logsumexp)


def test_weights_that_amplify_roundings_are_compared_with_the_models_own_roundings():
    """With attention scores in the thousands, one rounding decides which token is attended to."""
    model = build(*SHAPES["t5 gated, uneven stacks"]).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".q." in name or ".k." in name:
                weight.mul_(30)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert Decoder(model, random_catalog(60, 1), START).path == "fast T5"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_the_precision_is_that_of_the_least_precise_weight():
    model: Any = build(*SHAPES["gpt2"])
    assert precision_of(model) == 2.0**-23
    model.transformer.h[0].to(torch.bfloat16)
    assert precision_of(model) == 2.0**-7
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.ones(2, dtype=torch.int8), False)
    assert precision_of(model.float()) == 2.0**-7


def test_the_check_leaves_the_model_and_the_random_state_unchanged():
    model = build(*SHAPES["gpt2"]).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state(), model.config.to_dict(), model.generation_config.to_dict()
    Decoder(model, random_catalog(60, 1), START)
    Decoder(model, random_catalog(60, 1), START, backend="reference")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before[1:]
    assert [module.training for module in model.modules()] == modes
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(not weight.is_inference() for weight in (*model.parameters(), *model.buffers()))


def test_a_model_whose_own_forward_fails_is_refused_with_its_error():
    model = build(*SHAPES["gpt2"])
    model.transformer.h[1].mlp.c_fc.weight.data = torch.ones(3, 3)
    with pytest.raises(UserError, match="the model's own forward fails") as error:
        Decoder(model, random_catalog(60, 1), START)
    assert "RuntimeError" in str(error.value.cause)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_nan_weights_are_refused(backend):
    model = build(*SHAPES["gpt2"])
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not numbers"):
        Decoder(model, random_catalog(60, 1), START, backend=backend)


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("shape", ["t5 tied", "gpt2"])
def test_catalogs_of_any_depth_and_models_with_few_positions_are_checked(shape, levels):
    kind, settings = SHAPES[shape]
    if shape == "gpt2":  # positions for one token and its codes
        settings = settings | {"n_positions": levels}
    model = build(kind, settings | {"vocab_size": 40})
    catalog = Catalog.from_codes(torch.cartesian_prod(*[torch.arange(2)] * levels).view(-1, levels), 2)
    assert Decoder(model, catalog, START).path.startswith("fast")
    own = Decoder(model, catalog, START, backend="reference")
    assert own.path.startswith(OWN) and "differ" not in own.path


def test_an_error_past_the_local_window_is_detected(monkeypatch):
    model, catalog = build("Mistral", ROTARY | {"sliding_window": 12}), random_catalog(60, 1)
    assert Decoder(model, catalog, START).path == f"{OWN}: attention over a sliding window"
    monkeypatch.setattr(generic_module, "WINDOWS", ())
    blind = Decoder(model, catalog, START)
    assert "tree mask: its log-probabilities differ" in blind.path and "one row per beam" in blind.path


def test_a_local_window_under_another_name_is_checked(same_lists):
    settings = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=VOCABULARY, initializer_range=0.2, bos_token_id=1, eos_token_id=1,
                     **shape, **settings)
    ).eval()  # fmt: skip
    decoder = Decoder(model, random_catalog(60, 1), START)
    assert "one row per beam" in decoder.path
    prompts = Bench(model, decoder.catalog).prompts([9, 4])
    same_lists(
        decoder.decode(*prompts, 20),
        TransformersDecoder(model, decoder.catalog, START).decode(*prompts, 20),
    )


def test_a_window_that_takes_too_long_to_check_is_skipped(monkeypatch):
    model = build("Mistral", ROTARY | {"sliding_window": 12})
    decoder = Decoder(model, random_catalog(60, 1), START)
    prompts = [len(case.prompts) for case in decoder._parity_check().cases]
    assert prompts == [2, 1]
    monkeypatch.setattr("cemg.decoding.parity_check.MAX_MULTIPLY_ADDS", 1)
    assert [len(case.prompts) for case in decoder._parity_check().cases] == [2]


def test_the_two_beams_of_the_check_differ():
    decoder = Decoder(build(*SHAPES["gpt2"]), random_catalog(60, 1), START)
    (case,) = decoder._parity_check().cases
    assert case.tokens.shape == (2, 2, BEAMS) and bool((case.tokens[..., 0] != case.tokens[..., 1]).all())
    assert len({prompt.shape[1] for prompt in case.prompts}) == 2
    assert all(not torch.equal(step[:, 0], step[:, 1]) for step in case.expected[1:])


def test_codes_without_a_token_are_not_checked():
    model = build(*SHAPES["gpt2"])
    table = torch.arange(3 * SIZE).view(3, SIZE) + START
    table[1, 4:] = -1
    codes = random_catalog(60, 1).codes
    catalog = Catalog.from_codes(codes[codes[:, 1] < 4], SIZE)
    assert Decoder(model, catalog, table).path.startswith("fast")
    assert "differ" not in Decoder(model, catalog, table, backend="reference").path


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("shape", ["t5 tied", "gpt2"])
def test_a_model_in_training_mode_decodes_without_dropout_and_stays_in_training_mode(
    shape, backend, same_lists
):
    kind, settings = SHAPES[shape]
    more = {"dropout_rate": 0.5} if kind == "T5" else {"resid_pdrop": 0.5, "embd_pdrop": 0.5}
    model, catalog = build(kind, settings | more), random_catalog(60, 1)
    prompts = Bench(model, catalog).prompts([5, 3])
    expected = Decoder(model, catalog, START, backend=backend).decode(*prompts, 20)
    model.train()
    decoder = Decoder(model, catalog, START, backend=backend)
    same_lists(decoder.decode(*prompts, 20), expected)
    same_lists(TransformersDecoder(model, catalog, START).decode(*prompts, 20), expected)
    torch.testing.assert_close(
        score_all(decoder, *prompts),
        score_all(Decoder(model.eval(), catalog, START), *prompts),
        rtol=0,
        atol=1e-4,
    )
    assert model.train().training and all(module.training for module in model.modules())


def test_training_mode_returns_only_after_the_last_of_several_searches():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        with evaluating(model):
            assert not model[1].training
        assert not model[1].training
    assert model.training and model[1].training and not model[0].training


def test_concurrent_searches_run_without_dropout(same_lists):
    model, catalog = build("GPT2", SHAPES["gpt2"][1] | {"embd_pdrop": 0.5}), random_catalog(60, 1)
    decoder = Decoder(model, catalog, START, backend="reference")
    prompts = Bench(model, catalog).prompts([5, 3])
    expected = decoder.decode(*prompts, 20)
    model.train()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: decoder.decode(*prompts, 20), range(8)):
            same_lists(found, expected)
    assert all(module.training for module in model.modules())


def test_the_reference_logits_are_computed_at_the_first_comparison():
    """A path may be refused before any comparison, so the reference is not computed earlier."""
    model = build(*SHAPES["gpt2"])
    decoder = Decoder(model, random_catalog(60, 1), START, check=False)
    levels = range(3)
    proof = ParityCheck(
        model,
        [decoder.logits_request(level) for level in levels],
        [decoder.tokens.table[level] for level in levels],
    )
    assert "cases" not in vars(proof)
    proof.check(decoder.plan)
    assert "cases" in vars(proof) and "_rounded_cases" not in vars(proof)
