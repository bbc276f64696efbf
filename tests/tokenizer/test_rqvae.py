"""The terms of equation 4 by hand, and which parameter each of them moves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cemg.distributed import ALONE, Rows
from cemg.errors import UserError
from cemg.tokenizer import MODALITIES, RQVAE, ItemFeatures, TokenizerConfig
from cemg.tokenizer.rqvae import negative_entropy

WIDTHS = {"image": 4, "text": 3, "collab": 2}
TINY = TokenizerConfig(levels=3, codebook_size=5, dim=4, latent=3, hidden=(8,), diversity=0.0)


def batch(present: Tensor | None = None) -> ItemFeatures:
    """Six random items, all of them whole unless ``present`` [6, 3] says otherwise."""
    generator = torch.Generator().manual_seed(5)
    here = torch.ones(6, 3, dtype=torch.bool) if present is None else present
    values = {
        k: torch.randn(6, w, generator=generator) * here[:, [i]] for i, (k, w) in enumerate(WIDTHS.items())
    }
    return ItemFeatures(values, here)


def model_of(**changes: object) -> RQVAE:
    torch.manual_seed(1)
    return RQVAE(WIDTHS, config=dataclasses.replace(TINY, **changes))


def residuals(z: Tensor, model: RQVAE, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(r_m, v_m) of each level by the definition."""
    pairs, residual = [], z
    for level in range(model.config.levels):
        chosen = model.codebooks[level][codes[:, level]]
        pairs.append((residual, chosen))
        residual = residual - chosen
    return pairs


def test_codes_are_the_nearest_vectors_to_the_residual_of_the_earlier_levels():
    model, items = model_of(), batch()
    codes, z = model.tokenize(items)
    assert codes.shape == (6, 3) and codes.dtype == torch.int64 and z.shape == (6, 3)
    for level, (residual, _) in enumerate(residuals(z, model, codes)):
        distance = (residual[:, None] - model.codebooks[level]).square().sum(2)  # [B, K]
        assert torch.equal(codes[:, level], distance.argmin(1))


def test_the_commitment_loss_is_the_sum_over_levels_of_both_terms():
    model, items = model_of(), batch()
    losses, codes = model(items)
    pairs = residuals(model.encode(items), model, codes)
    wanted = sum(1.25 * (r - v).square().sum(1).mean() for r, v in pairs)  # 1 to the code, 0.25 back
    torch.testing.assert_close(losses.commit, wanted)


def test_the_commitment_loss_on_one_code_by_hand():
    model = model_of(levels=2, codebook_size=1, latent=2)
    with torch.no_grad():
        model.codebooks.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
    z = torch.tensor([[2.0, 2.0]])
    quantized, commit, _ = model._quantize(z, torch.zeros(1, 2, dtype=torch.int64))
    assert quantized.tolist() == [[1.0, 2.0]]
    assert commit.item() == 1.25 * (1 + 4) + 1.25 * (1 + 0)  # residuals (1, 2) and then (1, 0)


def test_the_straight_through_gradient_passes_the_quantizer_unchanged():
    model, items = model_of(), batch()
    z = model.encode(items).detach().requires_grad_()
    codes, _ = model.tokenize(items)
    quantized, _, _ = model._quantize(z, codes)
    decoded = model.decoder(z + (quantized - z).detach())
    (through,) = torch.autograd.grad(decoded.square().sum(), z)
    at = quantized.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(model.decoder(at).square().sum(), at)
    torch.testing.assert_close(through, wanted)


def test_the_encoder_gets_the_commitment_gradient_of_every_level():
    model, items = model_of(), batch()
    codes, z = model.tokenize(items)
    z.requires_grad_()
    _, commit, _ = model._quantize(z, codes)
    (gradient,) = torch.autograd.grad(commit, z)
    # d/dz of 0.25 Σ_m ‖r_m − v_m‖², and r_m − v_m = r_{m+1}, with d r_m / dz = 1 at every level
    wanted = sum(0.5 * (r - v) for r, v in residuals(z.detach(), model, codes)) / len(items)
    torch.testing.assert_close(gradient, wanted.detach())


def test_the_codebooks_get_no_gradient_from_the_reconstruction():
    model = model_of()
    losses, _ = model(batch())
    (gradient,) = torch.autograd.grad(losses.recon, model.codebooks, allow_unused=True)
    assert gradient is None


def test_the_encoder_and_the_fusion_get_a_gradient_from_the_reconstruction():
    model = model_of()
    model(batch())[0].recon.backward()
    assert all(bool(p.grad.any()) for p in model.encoder.parameters())
    assert all(bool(p.grad.any()) for p in model.fusion.parameters())


def test_a_codebook_vector_is_pulled_towards_its_residuals_alone():
    model, items = model_of(), batch()
    losses, codes = model(items)
    (gradient,) = torch.autograd.grad(losses.commit, model.codebooks)
    wanted = torch.zeros_like(gradient)
    for level, (r, v) in enumerate(residuals(model.encode(items), model, codes)):
        wanted[level].index_add_(0, codes[:, level], (2 * (v - r) / len(items)).detach())
    torch.testing.assert_close(gradient, wanted)


def test_the_total_weighs_the_terms_by_alpha_and_beta():
    losses, _ = model_of(commit=0.3, diversity=0.7)(batch())
    torch.testing.assert_close(losses.total, losses.recon + 0.3 * losses.commit + 0.7 * losses.diversity)


def test_the_diversity_loss_is_the_sum_over_levels():
    model, items = model_of(), batch()
    losses, codes = model(items)
    pairs = residuals(model.encode(items), model, codes)
    wanted = sum(negative_entropy(r, book) for (r, _), book in zip(pairs, model.codebooks, strict=True))
    torch.testing.assert_close(losses.diversity, wanted)


def test_negative_entropy_is_lowest_when_all_codes_are_used_equally():
    codebook = 10 * torch.eye(4)
    lowest = -math.log(4)
    uniform = negative_entropy(codebook + 0.1, codebook)
    skewed = negative_entropy(codebook[[0, 0, 0, 1]] + 0.1, codebook)
    single = negative_entropy(codebook[[0, 0, 0, 0]] + 0.1, codebook)
    assert uniform.item() == pytest.approx(lowest, abs=1e-6)
    assert lowest < skewed.item() < single.item() == pytest.approx(0.0, abs=1e-6)


def test_a_very_distant_code_keeps_the_gradient_finite():
    """exp(-distance / temperature) underflows to 0, where the logarithm's gradient is infinite."""
    residual = torch.tensor([[0.0, 0.0], [0.2, 0.0]], requires_grad=True)
    codebook = torch.tensor([[0.1, 0.0], [1e3, 1e3]], requires_grad=True)
    loss = negative_entropy(residual, codebook)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert residual.grad.isfinite().all() and codebook.grad.isfinite().all()


def test_negative_entropy_by_its_formula_with_the_mean_least_distance_as_temperature():
    residual, codebook = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [2.0]])
    # squared distances (0.25, 4) and (0.25, 1), so the temperature is 0.25
    soft = torch.softmax(torch.tensor([[-1.0, -16.0], [-1.0, -4.0]]), dim=1).mean(0)
    wanted = (soft * soft.log()).sum().item()
    assert negative_entropy(residual, codebook).item() == pytest.approx(wanted, rel=1e-5)


def test_descending_the_diversity_loss_brings_an_unused_code_nearer_to_the_items():
    residual = torch.tensor([[0.0, 0.0], [0.2, 0.0]])
    codebook = torch.tensor([[0.1, 0.0], [0.2, 0.15]], requires_grad=True)
    negative_entropy(residual, codebook).backward()
    centre = residual.mean(0)
    moved = codebook.detach() - 1e-3 * codebook.grad
    assert (moved[1] - centre).norm() < (codebook[1] - centre).norm()


def test_the_reconstruction_is_the_mean_over_the_modalities_present():
    present = torch.tensor(
        [[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool
    )
    model, items = model_of(), batch(present)
    decoded = torch.randn(6, sum(WIDTHS.values()), generator=torch.Generator().manual_seed(2))
    loss, _ = model._reconstruction(decoded, torch.zeros(6, 1), items, Rows(ALONE, len(items)))
    parts = dict(zip(MODALITIES, decoded.split(list(WIDTHS.values()), dim=1), strict=True))
    of_items = []
    for row in range(6):
        errors = [
            (parts[k][row] - items.values[k][row]).square().sum()
            for i, k in enumerate(MODALITIES)
            if present[row, i]
        ]
        of_items.append(torch.stack(errors).mean() if errors else torch.tensor(0.0))
    torch.testing.assert_close(loss, torch.stack(of_items).mean())


def test_explained_variance_is_one_for_a_perfect_copy_and_zero_for_the_mean():
    model, items = model_of(), batch()
    copy = torch.cat([items.values[k] for k in MODALITIES], dim=1)
    _, perfect = model._reconstruction(copy, torch.zeros(6, 1), items, Rows(ALONE, len(items)))
    _, nothing = model._reconstruction(
        torch.zeros_like(copy), torch.zeros(6, 1), items, Rows(ALONE, len(items))
    )
    _, half = model._reconstruction(copy / 2, torch.zeros(6, 1), items, Rows(ALONE, len(items)))
    for name in MODALITIES:
        assert perfect[name].item() == 1.0
        assert nothing[name].item() == pytest.approx(0.0, abs=1e-6)
        assert half[name].item() == pytest.approx(0.75, abs=1e-6)  # a quarter of the square is left


def test_explained_variance_is_not_reported_for_a_modality_nobody_has():
    present = torch.tensor([[True, False, True]] * 6)
    losses, _ = model_of()(batch(present))
    assert set(losses.explained) == {"image", "collab"}


def test_the_target_h_is_detached():
    model, items = model_of(recon_target="h"), batch()
    h = model.fusion(items)[0].detach().requires_grad_()
    decoded = torch.zeros_like(h, requires_grad=True)
    loss, explained = model._reconstruction(decoded, h, items, Rows(ALONE, len(items)))
    to_decoded, to_h = torch.autograd.grad(loss, (decoded, h), allow_unused=True)
    assert to_h is None and bool(to_decoded.any())
    torch.testing.assert_close(loss, h.detach().square().sum(1).mean())
    assert set(explained) == {"h"}


def test_the_target_h_gives_the_decoder_the_width_of_h():
    model = model_of(recon_target="h")
    assert model.decoder[-1].out_features == model.fusion.out_dim == 4 + 2 + 3
    assert model_of().decoder[-1].out_features == sum(WIDTHS.values())


@pytest.mark.parametrize(
    "name, value",
    [
        ("levels", 0), ("codebook_size", 0), ("codebook_size", 65_537), ("latent", 0), ("commit", -0.1),
        ("diversity", -1.0), ("recon_target", "modality"), ("unique", "hash"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_its_name_and_value(name, value):
    with pytest.raises(UserError, match=rf"tokenizer\.{name} .* got {value!r}"):
        TokenizerConfig(**{name: value})
