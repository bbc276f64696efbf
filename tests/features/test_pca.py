"""PCA: against its definition, with missing items, saved and loaded, and invalid input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cemg.errors import UserError
from cemg.features import PCA, Features, pca


def drawn(rows: int, width: int, *, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.5, width)
    return Features(
        torch.randn(rows, width, generator=generator) * scale + 5, torch.ones(rows, dtype=torch.bool)
    )


@pytest.mark.parametrize("rows, width", [(40, 12), (12, 40)])  # the two solvers
def test_the_projection_preserves_the_inner_products_of_the_best_subspace(rows: int, width: int):
    features = drawn(rows, width)
    reduced = PCA.fit(features, dim=5).transform(features.values, features.present).double()
    centred = features.values.double() - features.values.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ (u[:, :5] * s[:5]).T
    # coordinates up to 30 rounded to float32: 2 * 30 * 30 * 5 terms * 2**-24 = 6e-4
    torch.testing.assert_close(reduced @ reduced.T, expected, rtol=0, atol=6e-4)


def test_explained_variance_ratios_fall_and_sum_to_one_at_full_width():
    ratio = PCA.fit(drawn(40, 12), dim=12).explained_variance_ratio
    assert bool((ratio[:-1] >= ratio[1:]).all())
    assert ratio.sum().item() == pytest.approx(1, abs=1e-12)  # 12 float64 terms


def test_a_fit_and_a_projection_in_blocks_equal_those_of_all_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    features = drawn(400, 12)
    features.present[::7] = False
    features.values[::7] = float("nan")  # of items without the modality
    whole = PCA.fit(features, dim=5, whiten=True)
    expected = whole.transform(features.values, features.present)
    monkeypatch.setattr(pca, "WHOLE", 10)
    monkeypatch.setattr(pca, "BLOCK", 33)
    blocks = PCA.fit(features, dim=5, whiten=True)
    for name in ("mean", "components", "variance", "explained_variance_ratio"):
        # 400 float64 terms, and eigenvalues that are well apart
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), rtol=1e-9, atol=1e-10)
    found = blocks.transform(features.values, features.present, scratch=tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # rounded to float32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rows, message",
    [(torch.ones(40, 3), "same vector"), (torch.full((40, 3), torch.inf), "not finite")],
)
def test_a_fit_in_blocks_refuses_what_the_fit_of_all_rows_refuses(
    rows: torch.Tensor, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pca, "WHOLE", 10)
    with pytest.raises(UserError, match=message):
        PCA.fit(Features(rows, torch.ones(40, dtype=torch.bool)), dim=2)


def test_items_without_the_modality_are_not_fitted_and_stay_zero():
    features = drawn(41, 12)
    present = torch.ones(41, dtype=torch.bool)
    present[7] = False
    values = features.values.clone()
    values[7] = 1e6  # would turn the first component towards itself
    fitted = PCA.fit(Features(values, present), dim=4)
    alone = PCA.fit(Features(features.values[present], present[present]), dim=4)
    reduced = fitted.transform(values, present)
    assert torch.equal(fitted.components, alone.components)
    assert torch.equal(reduced[7], torch.zeros(4))
    assert reduced.dtype == torch.float32 and reduced[present].abs().sum(1).min() > 0


def test_whitened_components_have_unit_variance():
    features = drawn(60, 12)
    reduced = PCA.fit(features, dim=6, whiten=True).transform(features.values, features.present)
    # float32 coordinates of order 1: 2**-23 each, squares doubled
    torch.testing.assert_close(reduced.var(0), torch.ones(6), rtol=0, atol=16 * 2**-23)


def test_a_saved_pca_projects_bit_for_bit_as_before(tmp_path: Path):
    features = drawn(40, 12)
    fitted = PCA.fit(features, dim=4, whiten=True)
    fitted.save(tmp_path / "pca.safetensors")
    loaded = PCA.load(tmp_path / "pca.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["pca.safetensors"]
    assert loaded.whiten
    before, after = (pca.transform(features.values, features.present) for pca in (fitted, loaded))
    assert torch.equal(before, after)


def test_fitting_twice_gives_the_same_components():
    assert torch.equal(
        PCA.fit(drawn(12, 40), dim=5).components, PCA.fit(drawn(12, 40), dim=5, seed=9).components
    )


@pytest.mark.parametrize("rows, width, limit", [(10, 40, 10), (40, 10, 10), (1, 40, None)])
def test_too_many_dimensions_are_refused_with_the_largest_possible_number(rows, width, limit):
    with pytest.raises(UserError) as error:
        PCA.fit(drawn(rows, width), dim=11)
    assert f"{rows} items" in (error.value.cause or "")
    assert error.value.fix == (f"use dim={limit} or less" if limit else "leave this modality out")


def test_vectors_that_are_all_equal_or_not_finite_are_refused():
    same = Features(torch.ones(20, 8), torch.ones(20, dtype=torch.bool))
    with pytest.raises(UserError, match="same vector"):
        PCA.fit(same, dim=2)
    broken = drawn(20, 8)
    broken.values[3, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        PCA.fit(broken, dim=2)


def test_whitening_a_component_without_variance_is_refused():
    flat = torch.zeros(20, 8)
    flat[:, :2] = drawn(20, 2).values
    with pytest.raises(UserError, match="only 2") as error:
        PCA.fit(Features(flat, torch.ones(20, dtype=torch.bool)), dim=3, whiten=True)
    assert "dim=2" in (error.value.fix or "")


def test_vectors_of_another_width_are_refused():
    fitted = PCA.fit(drawn(40, 12), dim=4)
    with pytest.raises(UserError, match="12 numbers"):
        fitted.transform(torch.zeros(3, 11), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_file_that_is_not_a_pca_is_refused_with_its_name(tmp_path: Path, content: bytes | None):
    path = tmp_path / "pca.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"pca\.safetensors"):
        PCA.load(path)


def test_features_of_a_wrong_shape_or_dtype_are_refused():
    with pytest.raises(UserError, match="float32"):
        Features(torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="present"):
        Features(torch.zeros(3, 2), torch.ones(4, dtype=torch.bool))
