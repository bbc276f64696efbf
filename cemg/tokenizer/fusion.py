"""Collaborative-guided fusion of image and text (paper §3.2.3, equations 2 and 3).

N items, d = ``dim`` of the fused content, D_v, D_t, D_c widths of the three inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cemg.errors import UserError

CONTENT = ("image", "text")
MODALITIES = (*CONTENT, "collab")
BLOCK = 1 << 16  # items that are scaled or encoded at once
WHOLE = 1 << 18  # rows up to which a mean is computed from one copy of them
COLUMNS = 64  # of a mean of more rows; with so many, it has the bits of the mean of all columns


@dataclass(frozen=True, slots=True)
class Scaling:
    """Scaling of one modality: its ``mean`` [D] and ``rms``, the root mean square norm of e − mean."""

    mean: Tensor
    rms: float

    @classmethod
    def of(cls, values: Tensor, present: Tensor) -> Scaling:
        """Computed over the present rows, in blocks. If they are all equal, rms is 1."""
        count = int(present.sum())
        if count == 0:
            return cls(torch.zeros(values.shape[1]), 1.0)
        columns = COLUMNS if count > WHOLE else values.shape[1]
        mean = torch.cat([part[present].mean(0) for part in values.split(columns, dim=1)])
        squares, norms = [], []
        for block, here in zip(values.split(BLOCK), present.split(BLOCK), strict=True):
            rows = block[here]
            squares.append((rows - mean).square().sum(1))
            norms.append(rows.norm(dim=1))
        rms = torch.cat(squares).mean().sqrt().item()
        rounding = 1e-6 * torch.cat(norms).max().item()  # error of the mean, which must not be scaled up
        return cls(mean, rms if rms > rounding else 1.0)

    def __call__(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.rms


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """The scaled features of N items in three modalities.

    Attributes:
        values: [N, D_k] per modality; zeros if an item lacks the modality.
        present: [N, 3] bool, columns in the order of MODALITIES.
    """

    values: dict[str, Tensor]
    present: Tensor

    def __len__(self) -> int:
        return len(self.present)

    def rows(self, index: Tensor | slice) -> ItemFeatures:
        """The features of some of the items."""
        return ItemFeatures({k: v[index] for k, v in self.values.items()}, self.present[index])

    def to(self, device: str | torch.device) -> ItemFeatures:
        return ItemFeatures({k: v.to(device) for k, v in self.values.items()}, self.present.to(device))


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """The raw features of N items, which may be in a file by memory map. Rows are scaled when they are read.

    Attributes:
        values: [N, D_k] per modality. Rows of absent items are ignored, even if they are NaN.
        present: [N, 3] bool, columns in the order of MODALITIES.
        scaling: The scaling of each modality.
    """

    values: dict[str, Tensor]
    present: Tensor
    scaling: dict[str, Scaling]

    def __len__(self) -> int:
        return len(self.present)

    def rows(self, index: Tensor | slice) -> ItemFeatures:
        """The scaled features of some of the items."""
        present = self.present[index]
        scaled = {
            k: self.scaling[k](self.values[k][index]).masked_fill(~present[:, column, None], 0.0)
            for column, k in enumerate(MODALITIES)
        }
        return ItemFeatures(scaled, present)

    def blocks(self) -> Iterator[ItemFeatures]:
        """The scaled features of all items, BLOCK at a time."""
        return (self.rows(slice(low, low + BLOCK)) for low in range(0, len(self), BLOCK))

    def to(self, device: str | torch.device) -> FeatureTable | ItemFeatures:
        """The table itself on a CPU; on other devices, the scaled features of all items."""
        on_cpu = torch.device(device).type == "cpu"
        return self if on_cpu else self.rows(slice(None)).to(device)

    def widths(self) -> dict[str, int]:
        """D_k of each modality."""
        return {name: self.values[name].shape[1] for name in MODALITIES}

    @classmethod
    def of(
        cls,
        values: dict[str, Tensor],
        present: dict[str, Tensor],
        scaling: dict[str, Scaling],
        without: Sequence[str] = (),
    ) -> FeatureTable:
        """Collect the features of all modalities, and mask those that are left out.

        Args:
            values: [N, D_k] per modality.
            present: [N] bool per modality.
            scaling: The scaling of each modality.
            without: Modalities that are masked for every item (the ablations).

        Raises:
            UserError: ``without`` names an unknown modality.
        """
        for name in without:
            if name not in MODALITIES:
                raise UserError(f"unknown modality {name!r}", fix=f"choose from {', '.join(MODALITIES)}")
        mask = {k: torch.zeros_like(p) if k in without else p for k, p in present.items()}
        return cls(values, torch.stack([mask[k] for k in MODALITIES], dim=1), scaling)


class Fusion(nn.Module):
    """h = (α_v W_V e_v ⊕ α_t W_V e_t) ‖ e_c ‖ presence, α = softmax_k((W_Q e_c)ᵀ (W_K e_k) / √d).

    If e_c is absent, α is uniform over the present modalities; if image and text are absent, both are 0.
    Each modality has its own W_K and W_V. Inputs are multiplied by √D, so that a component is about 1.
    Without guidance, h = W_V e_v ‖ W_T e_t ‖ e_c ‖ presence, and α is 1 for a present modality.

    Source: CEMG paper, equations 2 and 3 (docs/method.md).
    """

    def __init__(self, widths: dict[str, int], *, dim: int, guided: bool = True) -> None:
        super().__init__()
        self.dim, self.guided = dim, guided
        if guided:
            self.query = nn.Linear(widths["collab"], dim, bias=False)
            self.key = nn.ModuleDict({k: nn.Linear(widths[k], dim, bias=False) for k in CONTENT})
        self.value = nn.ModuleDict({k: nn.Linear(widths[k], dim, bias=False) for k in CONTENT})
        self.out_dim = (dim if guided else len(CONTENT) * dim) + widths["collab"] + len(MODALITIES)

    def attention(self, items: ItemFeatures) -> Tensor:
        """α [N, 2] over (image, text): equation 2, with absent modalities masked."""
        here = items.present[:, :2]
        if not self.guided:
            return here.to(items.values["collab"].dtype)
        query = self.query(_unit(items.values["collab"]))  # [N, d]
        keys = torch.stack([self.key[k](_unit(items.values[k])) for k in CONTENT], dim=1)  # [N, 2, d]
        logits = torch.einsum("nd,nkd->nk", query, keys) / self.dim**0.5
        has_query = items.present[:, 2:]  # [N, 1]
        logits = torch.where(has_query, logits, torch.zeros_like(logits))
        weights = logits.masked_fill(~here, float("-inf")).softmax(1)
        return torch.where(here, weights, torch.zeros_like(weights))

    def forward(self, items: ItemFeatures) -> tuple[Tensor, Tensor]:
        """h [N, out_dim] and α [N, 2]: equation 3, with the three presence bits appended."""
        alpha = self.attention(items)
        values = torch.stack([self.value[k](_unit(items.values[k])) for k in CONTENT], dim=1)  # [N, 2, d]
        weighted = alpha[:, :, None] * values
        content = weighted.sum(1) if self.guided else weighted.flatten(1)  # [N, d] or [N, 2 d]
        parts = (content, _unit(items.values["collab"]), items.present.to(content.dtype))
        return torch.cat(parts, dim=1), alpha


def _unit(scaled: Tensor) -> Tensor:
    """From a norm of about 1 to components of about 1."""
    return scaled * float(scaled.shape[1] ** 0.5)
