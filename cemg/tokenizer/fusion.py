"""Collaborative-guided fusion of image and text (paper §3.2.3, equations 2 and 3).

N items, d = ``dim`` of the fused content, D_v, D_t, D_c widths of the three inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cemg.errors import UserError

CONTENT = ("image", "text")
MODALITIES = (*CONTENT, "collab")


@dataclass(frozen=True, slots=True)
class Scaling:
    """What makes modalities comparable: ``mean`` [D] and ``rms``, the root mean square norm of e − mean."""

    mean: Tensor
    rms: float

    @classmethod
    def of(cls, values: Tensor, present: Tensor) -> Scaling:
        """Measured over the rows that are present; an rms of 1 where they are all the same."""
        rows = values[present]
        if len(rows) == 0:
            return cls(torch.zeros(values.shape[1]), 1.0)
        mean = rows.mean(0)
        rms = (rows - mean).square().sum(1).mean().sqrt().item()
        rounding = 1e-6 * rows.norm(dim=1).max().item()  # of the mean: not to be blown up to a norm of 1
        return cls(mean, rms if rms > rounding else 1.0)

    def __call__(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.rms


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """The three modalities of N items, scaled (SPEC §3): ``values[k]`` [N, D_k], ``present`` [N, 3] bool.

    A modality that is absent has zeros in its row and False in its column; columns follow MODALITIES.
    """

    values: dict[str, Tensor]
    present: Tensor

    def __len__(self) -> int:
        return len(self.present)

    def rows(self, index: Tensor | slice) -> ItemFeatures:
        """The same for some of the items."""
        return ItemFeatures({k: v[index] for k, v in self.values.items()}, self.present[index])

    def to(self, device: str | torch.device) -> ItemFeatures:
        return ItemFeatures({k: v.to(device) for k, v in self.values.items()}, self.present.to(device))

    def widths(self) -> dict[str, int]:
        """D_k of each modality."""
        return {name: self.values[name].shape[1] for name in MODALITIES}

    @classmethod
    def scaled(
        cls,
        values: dict[str, Tensor],
        present: dict[str, Tensor],
        scaling: dict[str, Scaling],
        without: Sequence[str] = (),
    ) -> ItemFeatures:
        """Scale raw modalities; those named in ``without`` are masked for every item (the ablations).

        Whatever stands in an absent row, even NaN, becomes zeros. Raises UserError for a name in ``without``
        that is no modality.
        """
        for name in without:
            if name not in MODALITIES:
                raise UserError(
                    f"{name!r} is no modality to leave out", fix=f"one of {', '.join(MODALITIES)}"
                )
        mask = {k: torch.zeros_like(p) if k in without else p for k, p in present.items()}
        columns = torch.stack([mask[k] for k in MODALITIES], dim=1)  # [N, 3]
        return cls(
            {k: scaling[k](values[k]).masked_fill(~mask[k][:, None], 0.0) for k in MODALITIES}, columns
        )


class Fusion(nn.Module):
    """h = (α_v W_V e_v ⊕ α_t W_V e_t) ‖ e_c ‖ presence, α = softmax_k((W_Q e_c)ᵀ (W_K e_k) / √d).

    Where e_c is absent α is uniform over what is present; where neither image nor text is, both are 0.
    W_K and W_V are one per modality. Inputs are multiplied by √D first, so that a component is about 1.
    """

    def __init__(self, widths: dict[str, int], *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.query = nn.Linear(widths["collab"], dim, bias=False)
        self.key = nn.ModuleDict({k: nn.Linear(widths[k], dim, bias=False) for k in CONTENT})
        self.value = nn.ModuleDict({k: nn.Linear(widths[k], dim, bias=False) for k in CONTENT})
        self.out_dim = dim + widths["collab"] + len(MODALITIES)

    def attention(self, items: ItemFeatures) -> Tensor:
        """α [N, 2] over (image, text): equation 2, with absent modalities masked."""
        query = self.query(_unit(items.values["collab"]))  # [N, d]
        keys = torch.stack([self.key[k](_unit(items.values[k])) for k in CONTENT], dim=1)  # [N, 2, d]
        logits = torch.einsum("nd,nkd->nk", query, keys) / self.dim**0.5
        has_query = items.present[:, 2:]  # [N, 1]
        logits = torch.where(has_query, logits, torch.zeros_like(logits))
        here = items.present[:, :2]
        weights = logits.masked_fill(~here, float("-inf")).softmax(1)
        return torch.where(here, weights, torch.zeros_like(weights))

    def forward(self, items: ItemFeatures) -> tuple[Tensor, Tensor]:
        """h [N, out_dim] and α [N, 2]: equation 3, with the three presence bits appended."""
        alpha = self.attention(items)
        values = torch.stack([self.value[k](_unit(items.values[k])) for k in CONTENT], dim=1)  # [N, 2, d]
        content = (alpha[:, :, None] * values).sum(1)  # [N, d]
        parts = (content, _unit(items.values["collab"]), items.present.to(content.dtype))
        return torch.cat(parts, dim=1), alpha


def _unit(scaled: Tensor) -> Tensor:
    """From a norm of about 1 to components of about 1."""
    return scaled * float(scaled.shape[1] ** 0.5)
