"""PCA of the features of one modality: fitted once, saved, and applied to items that are added later.

N items, F feature width, D components.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cemg.errors import DamagedError, UserError
from cemg.features.encoding import Features
from cemg.storage import files
from cemg.storage.files import scratch_tensor
from cemg.storage.read import check_tensors, read_tensor_file

SPEC = {
    "mean": (torch.float64, ("F",)), "components": (torch.float64, ("D", "F")),
    "variance": (torch.float64, ("D",)), "explained_variance_ratio": (torch.float64, ("D",)),
}  # fmt: skip
BLOCK = 1 << 16  # rows that are converted to float64 at once
WHOLE = 1 << 18  # items up to which scikit-learn fits the components to all rows at once
NOISE = 1e-12  # times the largest variance: what is below is rounding noise


@dataclass(frozen=True, slots=True)
class PCA:
    """A fitted projection ``(x - mean) @ components.T``, divided by the standard deviations if ``whiten``.

    Attributes:
        mean: Mean of the features, [F] float64.
        components: Principal components, [D, F] float64.
        variance: Variance of each component, [D] float64.
        explained_variance_ratio: Share of the variance per component, [D] float64.
        whiten: Whether projected vectors are scaled to unit variance.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    explained_variance_ratio: Tensor
    whiten: bool = False

    @property
    def dim(self) -> int:
        """D, the width of a projected vector."""
        return self.components.shape[0]

    @classmethod
    def fit(cls, features: Features, *, dim: int = 128, whiten: bool = False, seed: int = 0) -> PCA:
        """Fit the first ``dim`` principal components to the items that have this modality.

        The solvers are exact and deterministic: the same features give the same components and signs. Above
        WHOLE items, the covariance is summed in blocks, so memory-mapped features are not copied.

        Args:
            features: The features, [N, F].
            dim: D, the number of components.
            whiten: Whether projected vectors are scaled to unit variance.
            seed: Passed to scikit-learn.

        Raises:
            UserError: There are fewer than ``dim`` items or columns, a value is not finite, or all vectors
                are equal.
        """
        if int(features.present.sum()) > WHOLE:
            mean, components, variance, ratio = _fit_in_blocks(features, dim)
        else:
            mean, components, variance, ratio = _fit_whole(features, dim, seed)
        if whiten:
            _check_variance(variance)
        return cls(mean, components, variance.clamp(min=0), ratio.clamp(min=0), whiten)

    def without_noise(self) -> PCA:
        """Return a copy without the components that consist of rounding noise, for features of low rank."""
        rank = max(int((self.variance > self.variance[0] * NOISE).sum()), 1)
        parts = (self.components[:rank], self.variance[:rank], self.explained_variance_ratio[:rank])
        return PCA(self.mean, *parts, self.whiten)

    def transform(self, values: Tensor, present: Tensor, *, scratch: Path | None = None) -> Tensor:
        """Project features, in blocks.

        Args:
            values: Features, [N, F].
            present: Which items have this modality, bool [N].
            scratch: A folder for the projected features, see `scratch_tensor`.

        Returns:
            The projected features, [N, D] float32; zero for the other items.

        Raises:
            UserError: ``values`` has another width than the features that the PCA was fitted to.
        """
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise UserError(
                f"this PCA was fitted to vectors of {len(self.mean)} numbers, got {list(values.shape)}",
                fix="use the encoder that the PCA was fitted to, or fit it again",
            )
        mean, components = self.mean.to(values.device), self.components.T.to(values.device)
        scale = self.variance.sqrt().to(values.device) if self.whiten else 1.0
        projected = scratch_tensor((len(values), self.dim), scratch).to(values.device)  # [N, D]
        for block, here, out in zip(
            values.split(BLOCK), present.split(BLOCK), projected.split(BLOCK), strict=True
        ):
            out[here] = (((block[here].double() - mean) @ components) / scale).float()
        return projected

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, completely or not at all."""
        names = ("mean", "components", "variance", "explained_variance_ratio")
        tensors = {name: getattr(self, name) for name in names}
        files.save_tensors(tensors, path, metadata={"whiten": str(self.whiten).lower()})

    @classmethod
    def load(cls, path: str | Path) -> PCA:
        """Read a file written by `save`.

        Raises:
            UserError: The file is missing, damaged or not a saved PCA.
        """
        fix = "fit it again and save it"
        try:
            tensors, metadata = read_tensor_file(Path(path), fix=fix)
            check_tensors(Path(path), tensors, SPEC, fix=fix)
        except DamagedError as error:
            cause = f"{error.message}: {error.cause}" if error.cause else error.message
            raise DamagedError(f"{path} is not a saved PCA", cause=cause, fix=fix) from error
        if metadata.get("whiten") not in ("true", "false"):
            raise DamagedError(f"{path} is not a saved PCA", cause="`whiten` is missing", fix=fix)
        return cls(**tensors, whiten=metadata["whiten"] == "true")


Fitted = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, components, variance and its shares


def _fit_whole(features: Features, dim: int, seed: int) -> Fitted:
    from sklearn.decomposition import PCA as ExactPCA

    rows = features.values[features.present].double()  # [n, F]
    _check_rows(rows, dim)
    solver = "covariance_eigh" if rows.shape[0] >= rows.shape[1] else "full"
    fitted = ExactPCA(n_components=dim, svd_solver=solver, random_state=seed).fit(rows.numpy())
    names = ("mean_", "components_", "explained_variance_", "explained_variance_ratio_")
    mean, components, variance, ratio = (torch.tensor(getattr(fitted, name)) for name in names)
    return mean, components, variance, ratio


def _fit_in_blocks(features: Features, dim: int) -> Fitted:
    """The eigenvectors of the covariance, with the signs of scikit-learn: the largest entry is positive."""

    def blocks() -> Iterator[Tensor]:
        for rows, here in zip(features.values.split(BLOCK), features.present.split(BLOCK), strict=True):
            yield rows[here].double()

    count, width = int(features.present.sum()), features.width
    total = torch.zeros(width).double()
    for rows in blocks():
        total += rows.sum(0)
    mean = total / count
    covariance = torch.zeros(width, width).double()
    for rows in blocks():
        centred = rows - mean
        covariance += centred.T @ centred
    covariance /= count - 1
    _check_fit(count, width, dim, is_finite=bool(covariance.isfinite().all()), differ=features.differ())
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    variance = values.flip(0).clamp(min=0)
    components = vectors.T.flip(0)[:dim]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return mean, components * largest.sign(), variance[:dim], variance[:dim] / variance.sum()


def _check_rows(rows: Tensor, dim: int) -> None:
    is_finite = bool(torch.isfinite(rows).all())
    differ = not bool((rows == rows[:1]).all())
    _check_fit(len(rows), rows.shape[1], dim, is_finite=is_finite, differ=differ)


def _check_fit(count: int, width: int, dim: int, *, is_finite: bool, differ: bool) -> None:
    if dim < 1:
        raise UserError(f"PCA cannot project to {dim} dimensions", fix="use a dim of at least 1")
    if count < 2 or dim > min(count, width):
        raise UserError(
            f"PCA to {dim} dimensions needs at least {max(dim, 2)} items with at least {dim} numbers each",
            cause=f"{count} items have this modality, with {width} numbers each",
            fix=f"use dim={min(count, width)} or less" if count >= 2 else "leave this modality out",
        )
    if not is_finite:
        raise UserError(
            "the features have values that are not finite", fix="encode in float32, without the cache"
        )
    if not differ:
        raise UserError(f"all {count} items have the same vector", fix="leave this modality out")


def _check_variance(variance: Tensor) -> None:
    """Raise UserError for a component of rounding noise, which whitening would scale to unit variance."""
    rank = int((variance > variance[0] * NOISE).sum())
    if rank < len(variance):
        raise UserError(
            f"cannot whiten {len(variance)} components: only {rank} of them have any variance",
            fix=f"use dim={rank} or less, or whiten=False",
        )
