"""Rotary embeddings that depend on the sequence length, against the plain forward of each row alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cemg.decoding import Decoder
from cemg.decoding.models.rope_lengths import rope_of_lengths
from cemg.errors import UserError

from ..conftest import START, Bench, random_catalog
from .families import build
from .test_families import ITEMS, TOLERANCE, beam_search, forward_scores

pytestmark = pytest.mark.medium

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 2.0, 3.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "longrope": (
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG},
    ),
}


def model_of(case: str) -> PreTrainedModel:
    name, settings = CASES[case]
    return build(name, False, **settings)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("lengths", [[15], [16], [23, 40], [40, 11], [40, 23, 15, 9]])
@pytest.mark.parametrize("case", CASES)
def test_prompts_past_the_bound_score_as_the_plain_forward_of_each_row(case, lengths, checked):
    model = model_of(case)
    made = Bench(model, random_catalog(ITEMS, 3))
    fresh = copy.deepcopy(model)
    decoder = Decoder(model, made.catalog, START, check=checked)
    ids, mask = made.prompts(lengths)
    for beams in (ITEMS, 5):
        found = decoder.decode(ids, mask, beams)
        for row in range(len(lengths)):
            scores = _alone(fresh, made, ids[row][mask[row].bool()])
            torch.testing.assert_close(
                found.scores[row], scores.sum(0)[found.items[row]], rtol=0, atol=TOLERANCE
            )
            expected = beam_search(scores, made.catalog, beams)
            torch.testing.assert_close(found.scores[row], expected, rtol=0, atol=TOLERANCE)


def _alone(fresh: PreTrainedModel, made: Bench, prompt: torch.Tensor) -> torch.Tensor:
    """Scores [levels, N] by forwards of a fresh model, whose calls only grow in length."""
    return forward_scores(copy.deepcopy(fresh), made.catalog, prompt)


def test_the_path_names_the_reason_and_a_fast_backend_is_refused():
    made = Bench(model_of("dynamic"), random_catalog(ITEMS, 3))
    path = Decoder(made.model, made.catalog, START).path
    assert "recomputed at every step, prompts grouped by length" in path and "type dynamic" in path
    with pytest.raises(UserError, match="type dynamic"):
        Decoder(made.model, made.catalog, START, backend="torch")


def test_the_parity_check_passes_if_the_bound_is_between_its_own_lengths():
    """Its prompts of 9 tokens grow to 11."""
    for case, key in (("dynamic", "max_position_embeddings"), ("longrope", "")):
        name, settings = CASES[case]
        settings = copy.deepcopy(settings)
        if key:
            settings[key] = 10
        else:
            settings["original_max_position_embeddings"] = 10
            settings["rope_parameters"]["original_max_position_embeddings"] = 10
        Decoder(build(name, False, **settings), random_catalog(ITEMS, 3), START)


def test_the_rope_type_is_found_in_the_parameters_of_a_layer_type():
    model = build("llama", False)
    assert rope_of_lengths(model) is None
    model.config.rope_parameters = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}
    assert rope_of_lengths(model) == "dynamic"
