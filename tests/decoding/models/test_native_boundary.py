"""Invalid tokens, prompts, beams and weights are refused before C++ reads them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cemg.decoding import Decoder
from cemg.decoding.models.causal import CausalPlan
from cemg.decoding.models.layers import Projection
from cemg.decoding.models.native import NativePlan, NativeState, prompt_fields
from cemg.decoding.models.t5 import T5Plan
from cemg.decoding.protocol import LogitsRequest, Unsupported
from cemg.errors import UserError

from ..conftest import FAMILIES, LEVELS, SIZE, START, VOCABULARY, Bench, make_model, random_catalog

FIRST = LogitsRequest(START, SIZE, logsumexp=False)
NEXT = LogitsRequest(START + SIZE, SIZE, logsumexp=False)
CODES = range(START, START + LEVELS * SIZE)


def started(family: str = "llama") -> NativeState:
    """A state of two users after its prefill."""
    made = Bench(make_model(family), random_catalog(60, 1))
    kind = T5Plan if made.seq2seq else CausalPlan
    state = NativePlan(kind(made.model, CODES)).new_state()
    state.prefill(*made.prompts([4, 2]), FIRST)
    return state


def test_a_step_without_prompts_is_refused():
    state = NativePlan(CausalPlan(make_model("llama"), CODES)).new_state()
    beams = torch.zeros(0, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="there are no prompts yet; call prefill first"):
        state.decode_step(beams, beams, NEXT)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**62, -(2**63)])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_error_names_a_token_outside_the_vocabulary(family, token):
    beams = torch.tensor([[3], [token]])
    with pytest.raises(ValueError, match=f"token {token} is outside the decoder's vocabulary"):
        started(family).decode_step(beams, torch.zeros_like(beams), NEXT)


def test_beams_of_another_shape_or_dtype_are_refused():
    state, right = started(), torch.full((2, 1), 3)
    parents, rows = torch.zeros_like(right), torch.ones(2, 1, dtype=torch.bool)
    for tokens, own, asked in (
        (right.int(), parents, None), (right, parents.int(), None), (right[:1], parents, None),
        (right.flatten(), parents, None), (torch.cat((right, right)), parents, None),
        (right, torch.zeros(2, 2, dtype=torch.int64), None), (right, parents, rows[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="tokens"):
            state.decode_step(tokens, own, NEXT._replace(rows=asked))
    with pytest.raises(ValueError, match="its parent was not an active beam"):
        state.decode_step(right, parents + 1, NEXT)
    assert state.decode_step(right, parents, NEXT).values.shape == (
        2,
        1,
        SIZE,
    )  # the refused steps had no effect


@pytest.mark.parametrize(
    ("ids", "mask"),
    [((2, 3), (2, 2)), ((2, 3), (3, 2)), ((6,), (6,)), ((1, 2, 3), (1, 2, 3))],
)
def test_prompts_and_masks_of_different_shapes_are_refused(ids, mask):
    with pytest.raises(UserError, match="with a mask of that shape"):
        prompt_fields(torch.ones(ids, dtype=torch.int64), torch.ones(mask, dtype=torch.int64))


def test_prompts_that_are_not_integers_are_refused():
    with pytest.raises(UserError, match=r"torch\.float32"):
        prompt_fields(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("field", ["qkv", "out", "norm"])
def test_a_layer_of_a_different_size_is_refused(field):
    plan = CausalPlan(make_model("llama"), CODES)
    layer = plan.layers[1]
    short = getattr(layer, field).weight[:-1].contiguous()
    part = Projection(short) if field != "norm" else dataclasses.replace(layer.norm, weight=short)
    plan.layers[1] = dataclasses.replace(layer, **{field: part})
    with pytest.raises(Unsupported, match="one of its layers is"):
        NativePlan(plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_not_finite_return_the_same_lists_as_in_pytorch(family, value):
    made = Bench(make_model(family), random_catalog(60, 1))
    decoder = Decoder(made.model, made.catalog, START, backend="native")
    kind = T5Plan if made.seq2seq else CausalPlan
    prompts = made.prompts([5, 3])
    with torch.no_grad():
        made.model.get_output_embeddings().weight[START + 2, 1] = value  # of one code
    decoder.plan = NativePlan(kind(made.model, CODES))
    ours = decoder.decode(*prompts, 10)
    decoder.plan = kind(made.model, CODES)
    theirs = decoder.decode(*prompts, 10)
    assert torch.equal(ours.items, theirs.items)
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.fill_(value)
    decoder.plan = NativePlan(kind(made.model, CODES))
    assert (decoder.decode(*prompts, 10).items == -1).all()
