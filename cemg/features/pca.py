"""PCA of the features of one modality: fitted once, saved, and applied to items that are added later.

N items, F feature width, D components.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cemg.errors import DamagedError, UserError
from cemg.features.encoding import Features
from cemg.storage import files
from cemg.storage.read import check_tensors, read_tensor_file

SPEC = {
    "mean": (torch.float64, ("F",)), "components": (torch.float64, ("D", "F")),
    "variance": (torch.float64, ("D",)), "explained_variance_ratio": (torch.float64, ("D",)),
}  # fmt: skip
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

        The solvers are exact and deterministic: the same features give the same components and signs.

        Args:
            features: The features, [N, F].
            dim: D, the number of components.
            whiten: Whether projected vectors are scaled to unit variance.
            seed: Passed to scikit-learn.

        Raises:
            UserError: There are fewer than ``dim`` items or columns, a value is not finite, or all vectors
                are equal.
        """
        from sklearn.decomposition import PCA as ExactPCA

        rows = features.values[features.present].double()  # [n, F]
        _check_rows(rows, dim)
        solver = "covariance_eigh" if rows.shape[0] >= rows.shape[1] else "full"
        fitted = ExactPCA(n_components=dim, svd_solver=solver, random_state=seed).fit(rows.numpy())
        names = ("mean_", "components_", "explained_variance_", "explained_variance_ratio_")
        mean, components, variance, ratio = (torch.tensor(getattr(fitted, name)) for name in names)
        if whiten:
            _check_variance(variance)
        return cls(mean, components, variance.clamp(min=0), ratio.clamp(min=0), whiten)

    def without_noise(self) -> PCA:
        """Return a copy without the components that consist of rounding noise, for features of low rank."""
        rank = max(int((self.variance > self.variance[0] * NOISE).sum()), 1)
        parts = (self.components[:rank], self.variance[:rank], self.explained_variance_ratio[:rank])
        return PCA(self.mean, *parts, self.whiten)

    def transform(self, values: Tensor, present: Tensor) -> Tensor:
        """Project features.

        Args:
            values: Features, [N, F].
            present: Which items have this modality, bool [N].

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
        projected = torch.zeros(len(values), self.dim, device=values.device)  # [N, D]
        centred = values[present].double() - self.mean.to(values.device)  # [n, F]
        reduced = centred @ self.components.T.to(values.device)  # [n, D]
        scale = self.variance.sqrt().to(values.device) if self.whiten else 1.0
        projected[present] = (reduced / scale).float()
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


def _check_rows(rows: Tensor, dim: int) -> None:
    count, width = rows.shape
    if dim < 1:
        raise UserError(f"PCA cannot project to {dim} dimensions", fix="use a dim of at least 1")
    if count < 2 or dim > min(count, width):
        raise UserError(
            f"PCA to {dim} dimensions needs at least {max(dim, 2)} items with at least {dim} numbers each",
            cause=f"{count} items have this modality, with {width} numbers each",
            fix=f"use dim={min(count, width)} or less" if count >= 2 else "leave this modality out",
        )
    if not torch.isfinite(rows).all():
        raise UserError(
            "the features have values that are not finite", fix="encode in float32, without the cache"
        )
    if bool((rows == rows[0]).all()):
        raise UserError(f"all {count} items have the same vector", fix="leave this modality out")


def _check_variance(variance: Tensor) -> None:
    """Raise UserError for a component of rounding noise, which whitening would scale to unit variance."""
    rank = int((variance > variance[0] * NOISE).sum())
    if rank < len(variance):
        raise UserError(
            f"cannot whiten {len(variance)} components: only {rank} of them have any variance",
            fix=f"use dim={rank} or less, or whiten=False",
        )
