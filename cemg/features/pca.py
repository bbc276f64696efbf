"""PCA of one modality's features: fitted once on the items that have it, saved, applied to later items.

N items, F width of the features, D components kept.
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
NOISE = 1e-12  # of the largest variance


@dataclass(frozen=True, slots=True)
class PCA:
    """A fitted projection: ``(x - mean) @ components.T``, over each component's deviation if ``whiten``.

    ``mean`` [F], ``components`` [D, F], ``variance`` [D] and ``explained_variance_ratio`` [D], all float64.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    explained_variance_ratio: Tensor
    whiten: bool = False

    @property
    def dim(self) -> int:
        """D, the length of a projected vector."""
        return self.components.shape[0]

    @classmethod
    def fit(cls, features: Features, *, dim: int = 128, whiten: bool = False, seed: int = 0) -> PCA:
        """The first ``dim`` principal components of the rows that are present.

        The solvers are exact and draw nothing: the same rows give the same components, signs included;
        ``seed`` is handed on to scikit-learn. Raises ``UserError`` where there are fewer than ``dim``
        rows or columns, on values that are not finite, and on rows without any variance.
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
        """The same without the components that hold rounding noise alone: features of a lower rank than D."""
        kept = max(int((self.variance > self.variance[0] * NOISE).sum()), 1)
        parts = (self.components[:kept], self.variance[:kept], self.explained_variance_ratio[:kept])
        return PCA(self.mean, *parts, self.whiten)

    def transform(self, values: Tensor, present: Tensor) -> Tensor:
        """Projected features float32 [N, D] of ``values`` [N, F]; rows not ``present`` stay zero."""
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise UserError(
                f"this PCA was fitted on vectors of {len(self.mean)} numbers, got {list(values.shape)}",
                fix="use the backbone that the PCA was fitted on, or fit it again",
            )
        projected = torch.zeros(len(values), self.dim, device=values.device)  # [N, D]
        centred = values[present].double() - self.mean.to(values.device)  # [n, F]
        reduced = centred @ self.components.T.to(values.device)  # [n, D]
        scale = self.variance.sqrt().to(values.device) if self.whiten else 1.0
        projected[present] = (reduced / scale).float()
        return projected

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        names = ("mean", "components", "variance", "explained_variance_ratio")
        tensors = {name: getattr(self, name) for name in names}
        files.save_tensors(tensors, path, metadata={"whiten": str(self.whiten).lower()})

    @classmethod
    def load(cls, path: str | Path) -> PCA:
        """Read what ``save`` wrote. Raises ``UserError`` on a file that is absent or something else."""
        fix = "fit it again and save it"
        try:
            tensors, metadata = read_tensor_file(Path(path), fix=fix)
            check_tensors(Path(path), tensors, SPEC, fix=fix)
        except DamagedError as error:
            cause = f"{error.message}: {error.cause}" if error.cause else error.message
            raise DamagedError(f"{path}: not a saved PCA", cause=cause, fix=fix) from error
        if metadata.get("whiten") not in ("true", "false"):
            raise DamagedError(f"{path}: not a saved PCA", cause="it does not tell `whiten`", fix=fix)
        return cls(**tensors, whiten=metadata["whiten"] == "true")


def _check_rows(rows: Tensor, dim: int) -> None:
    count, width = rows.shape
    if dim < 1:
        raise UserError(f"PCA to {dim} dimensions", fix="dim of at least 1")
    if count < 2 or dim > min(count, width):
        raise UserError(
            f"PCA to {dim} dimensions needs as many items, two at least, and as many numbers per item",
            cause=f"{count} items have this modality, with {width} numbers each",
            fix=f"dim={min(count, width)} or less" if count >= 2 else "leave this modality out",
        )
    if not torch.isfinite(rows).all():
        raise UserError(
            "features hold values that are not finite", fix="encode in float32, without the cache"
        )
    if bool((rows == rows[0]).all()):
        raise UserError(f"all {count} items have the same vector", fix="leave this modality out")


def _check_variance(variance: Tensor) -> None:
    """Whitening divides by a component's deviation: one that is rounding noise would be blown up to 1."""
    kept = int((variance > variance[0] * NOISE).sum())
    if kept < len(variance):
        raise UserError(
            f"whitening {len(variance)} components, of which only {kept} have any variance",
            fix=f"dim={kept} or less, or whiten=False",
        )
