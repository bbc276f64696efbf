"""Fusion against equations 2 and 3 worked out by hand, and what happens where a modality is absent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cemg.errors import UserError
from cemg.tokenizer import MODALITIES, Fusion, ItemFeatures, Scaling
from cemg.tokenizer import fusion as fusion_module
from cemg.tokenizer.fusion import FeatureTable

WIDTHS = {"image": 5, "text": 3, "collab": 4}
ALL_PATTERNS = torch.tensor([[bool(n & 4), bool(n & 2), bool(n & 1)] for n in range(8)])  # [8, 3]


def items_of(present: torch.Tensor, seed: int = 0) -> ItemFeatures:
    """Random features, zero where absent."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(len(present), width, generator=generator) * present[:, [i]]
        for i, (name, width) in enumerate(WIDTHS.items())
    }
    return ItemFeatures(values, present)


@pytest.fixture
def fusion() -> Fusion:
    torch.manual_seed(0)
    return Fusion(WIDTHS, dim=6)


def test_equations_2_and_3_on_numbers_worked_out_by_hand():
    fusion = Fusion({"image": 1, "text": 1, "collab": 1}, dim=1)
    weights = {"query": 2.0, "key.image": 1.0, "key.text": 0.5, "value.image": 3.0, "value.text": -1.0}
    fusion.load_state_dict({f"{name}.weight": torch.tensor([[w]]) for name, w in weights.items()})
    values = {"image": torch.tensor([[1.0]]), "text": torch.tensor([[4.0]]), "collab": torch.tensor([[0.5]])}
    h, alpha = fusion(ItemFeatures(values, torch.ones(1, 3, dtype=torch.bool)))
    image = 1 / (1 + math.e)  # query 1, keys 1 and 2, so the logits are 1 and 2
    torch.testing.assert_close(alpha, torch.tensor([[image, 1 - image]]))
    torch.testing.assert_close(h, torch.tensor([[3 * image - 4 * (1 - image), 0.5, 1.0, 1.0, 1.0]]))


def test_wider_inputs_follow_the_formula_written_in_numpy(fusion):
    items = items_of(torch.ones(4, 3, dtype=torch.bool))
    h, alpha = fusion(items)
    w = {name: p.detach().double().numpy() for name, p in fusion.named_parameters()}
    e = {k: items.values[k].double().numpy() * WIDTHS[k] ** 0.5 for k in MODALITIES}
    query = e["collab"] @ w["query.weight"].T
    logits = [(query * (e[k] @ w[f"key.{k}.weight"].T)).sum(1) / 6**0.5 for k in ("image", "text")]
    odds = np.exp(np.stack(logits, axis=1))
    wanted = odds / odds.sum(1, keepdims=True)
    content = sum(wanted[:, [i]] * (e[k] @ w[f"value.{k}.weight"].T) for i, k in enumerate(("image", "text")))
    np.testing.assert_allclose(
        alpha.detach().numpy(), wanted, rtol=1e-5
    )  # sums of 6 float32 terms of about 1
    whole = np.concatenate([content, e["collab"], np.ones((4, 3))], axis=1)
    np.testing.assert_allclose(h.detach().numpy(), whole, rtol=1e-5, atol=1e-5)


def test_alpha_sums_to_one_over_the_modalities_present_and_is_zero_where_one_is_absent(fusion):
    alpha = fusion.attention(items_of(ALL_PATTERNS))
    content = ALL_PATTERNS[:, :2]
    assert not alpha[~content].any()
    torch.testing.assert_close(alpha.sum(1), content.any(1).float())


def test_alpha_is_uniform_where_the_collaborative_embedding_is_absent(fusion):
    alpha = fusion.attention(items_of(torch.tensor([[True, True, False], [True, True, True]])))
    assert alpha[0].tolist() == [0.5, 0.5]
    assert alpha[1].tolist() != [0.5, 0.5]


def test_h_is_content_then_collaborative_then_the_presence_bits(fusion):
    items = items_of(ALL_PATTERNS)
    h, _ = fusion(items)
    assert h.shape == (8, fusion.out_dim) and fusion.out_dim == 6 + 4 + 3
    assert torch.equal(h[:, -3:], ALL_PATTERNS.float())
    assert torch.equal(h[:, 6:10], items.values["collab"] * 2)  # √4
    assert not h[~ALL_PATTERNS[:, :2].any(1), :6].any()
    assert not h[~ALL_PATTERNS[:, 2], 6:10].any()


def test_an_item_without_any_modality_keeps_every_gradient_finite(fusion):
    h, _ = fusion(items_of(ALL_PATTERNS))
    h.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in fusion.parameters())


def test_without_collab_treats_every_item_like_one_without_an_embedding(fusion):
    raw = items_of(torch.ones(5, 3, dtype=torch.bool)).values
    here, none = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    scaling = {k: Scaling.of(raw[k], here) for k in MODALITIES}
    present = {"image": here, "text": here, "collab": here}
    ablated = FeatureTable.of(raw, present, scaling, without=["collab"]).rows(slice(None))
    absent = FeatureTable.of(raw, present | {"collab": none}, scaling).rows(slice(None))
    for one, other in zip(fusion(ablated), fusion(absent), strict=True):
        assert torch.equal(one, other)
    assert not ablated.values["collab"].any() and not ablated.present[:, 2].any()
    assert torch.equal(fusion.attention(ablated), torch.full((5, 2), 0.5))


def test_scaling_centers_and_gives_a_root_mean_square_norm_of_one():
    values = torch.tensor([[1.0, 0.0], [3.0, 4.0], [99.0, 99.0]])
    scaling = Scaling.of(values, torch.tensor([True, True, False]))
    assert scaling.mean.tolist() == [2.0, 2.0]
    assert scaling.rms == pytest.approx(5**0.5)  # both rows lie (1, 2) away from the mean
    assert scaling(values[:2]).square().sum(1).mean().item() == pytest.approx(1.0)


def test_scaling_in_blocks_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    values, present = torch.randn(1000, 128, generator=generator), torch.rand(1000, generator=generator) < 0.9
    whole = Scaling.of(values, present)
    monkeypatch.setattr(fusion_module, "WHOLE", 10)
    monkeypatch.setattr(fusion_module, "BLOCK", 64)
    blocks = Scaling.of(values, present)
    assert torch.equal(blocks.mean, whole.mean) and blocks.rms == whole.rms


def test_a_modality_with_equal_values_scales_to_zero():
    values = torch.full((1000, 7), 0.1).cumsum(1)  # the float32 mean of equal rows is not exactly the row
    scaling = Scaling.of(values, torch.ones(1000, dtype=torch.bool))
    assert scaling(values).abs().max() < 1e-5


def test_a_modality_that_no_item_has_scales_without_a_nan():
    scaling = Scaling.of(torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool))
    assert scaling(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_absent_rows_become_zeros_whatever_their_values():
    values = {k: torch.randn(2, w, generator=torch.Generator().manual_seed(1)) for k, w in WIDTHS.items()}
    values["image"][1] = float("nan")
    present = {k: torch.tensor([True, k != "image"]) for k in MODALITIES}
    scaling = {k: Scaling.of(values[k], present[k]) for k in MODALITIES}
    items = FeatureTable.of(values, present, scaling).rows(slice(None))
    assert items.values["image"][1].tolist() == [0.0] * WIDTHS["image"]
    assert items.present.tolist() == [[True] * 3, [False, True, True]]


def test_a_modality_that_does_not_exist_cannot_be_left_out():
    values = {k: torch.zeros(1, w) for k, w in WIDTHS.items()}
    present = {k: torch.ones(1, dtype=torch.bool) for k in MODALITIES}
    scaling = {k: Scaling.of(values[k], present[k]) for k in MODALITIES}
    with pytest.raises(UserError, match="unknown modality 'images'"):
        FeatureTable.of(values, present, scaling, without=["images"]).rows(slice(None))


def test_without_guidance_h_is_the_concatenation_and_absent_modalities_are_zero() -> None:
    torch.manual_seed(0)
    widths = {"image": 3, "text": 4, "collab": 2}
    values = {name: torch.randn(3, width) for name, width in widths.items()}
    present = torch.tensor([[True, True, True], [False, True, True], [True, False, False]])
    values = {k: v * present[:, i, None] for i, (k, v) in enumerate(values.items())}
    plain = Fusion(widths, dim=5, guided=False)
    h, alpha = plain(ItemFeatures(values, present))
    assert alpha.tolist() == [[1, 1], [0, 1], [1, 0]] and h.shape == (3, 5 + 5 + 2 + 3) == (3, plain.out_dim)
    expected = [plain.value[k](values[k] * widths[k] ** 0.5) for k in ("image", "text")]
    torch.testing.assert_close(h[:, :10], torch.cat(expected, dim=1))
    assert not h[1, :5].any() and not h[2, 5:10].any()
    assert [name for name, _ in plain.named_parameters()] == ["value.image.weight", "value.text.weight"]
