"""The trained tokenizer: it computes semantic IDs from item features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor

from cemg.errors import DamagedError, UserError
from cemg.storage import files
from cemg.storage.read import STRICT, Shape, read_json, read_tensors
from cemg.tokenizer.fusion import MODALITIES, FeatureTable, ItemFeatures, Scaling
from cemg.tokenizer.rqvae import RQVAE, TokenizerConfig

Modality = Literal["image", "text", "collab"]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A trained RQ-VAE and the scaling of its inputs. Its codes for an item never change."""

    FILES: ClassVar[tuple[str, ...]] = ("tokenizer.json", "tokenizer.safetensors")

    model: RQVAE
    scaling: dict[str, Scaling]
    without: tuple[str, ...] = ()

    def features(self, values: dict[str, Tensor], present: dict[str, Tensor]) -> ItemFeatures:
        """Scale raw features (e_v, e_t, e_c by name, [N, D_k]) as in training."""
        return FeatureTable.of(values, present, self.scaling, self.without).rows(slice(None))

    @torch.no_grad()
    def tokenize(self, items: ItemFeatures) -> tuple[Tensor, Tensor]:
        """Codes [N, M] int64, which may collide, and latents z [N, Z]."""
        return self.model.tokenize(items)

    @torch.no_grad()
    def encode(self, values: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encode all items, a block at a time. Memory-mapped features are not copied.

        Args:
            values: [N, D_k] raw features per modality.
            present: [N] bool per modality.

        Returns:
            ``codes``, ``z``, ``attention`` and ``present``, as in `ITEMS`.
        """
        table = FeatureTable.of(values, present, self.scaling, self.without)
        parts = [(*self.tokenize(items), self.attention(items)) for items in table.blocks()]
        codes, z, attention = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"codes": codes, "z": z, "attention": attention, "present": table.present}

    @torch.no_grad()
    def attention(self, items: ItemFeatures) -> Tensor:
        """Fusion weights α [N, 2] over (image, text)."""
        return self.model.fusion.attention(items)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.safetensors`` and ``tokenizer.json``."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"mean.{k}": s.mean for k, s in self.scaling.items()}
        files.save_tensors(tensors, folder / "tokenizer.safetensors")
        about = {
            "config": asdict(self.model.config),
            "widths": self.model.widths,
            "rms": {k: s.rms for k, s in self.scaling.items()},
            "without": list(self.without),
        }
        files.write_json(folder / "tokenizer.json", about)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` wrote. Raises DamagedError if it is missing or damaged."""
        fix = "train it again: cemg-train --run RUN"
        if not (folder / "tokenizer.json").exists():
            raise DamagedError(f"{folder} has no tokenizer", fix=fix)
        try:
            about = read_json(folder / "tokenizer.json", _About, fix=fix)
            tensors = read_tensors(folder / "tokenizer.safetensors", fix=fix)
            return cls._restored(about, tensors)
        except DamagedError as error:
            cause = f"{error.message}: {error.cause}" if error.cause else error.message
            raise DamagedError(f"{folder} has no readable tokenizer", cause=cause, fix=fix) from error
        except (KeyError, RuntimeError, UserError) as error:  # the tensors do not fit the model
            cause = str(error).splitlines()[0]
            raise DamagedError(f"{folder} has no readable tokenizer", cause=cause, fix=fix) from error

    @classmethod
    def _restored(cls, about: _About, tensors: dict[str, Tensor]) -> Tokenizer:
        if {*about.widths} != {*MODALITIES} or {*about.rms} != {*MODALITIES}:
            raise UserError(f"the modalities are {', '.join(about.widths)}, not {', '.join(MODALITIES)}")
        model = RQVAE(about.widths, config=about.config)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict(weights)
        scaling = {k: Scaling(tensors[f"mean.{k}"], rms) for k, rms in about.rms.items()}
        for name, width in about.widths.items():
            if scaling[name].mean.shape != (width,):
                raise UserError(f"mean.{name} has the shape {list(scaling[name].mean.shape)}, not [{width}]")
        return cls(model.eval(), scaling, about.without)


@dataclass(frozen=True, slots=True)
class _About:
    """``tokenizer.json``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    config: TokenizerConfig
    widths: dict[str, PositiveInt]
    rms: dict[str, PositiveFloat]
    without: tuple[Modality, ...]


ITEMS: dict[str, tuple[torch.dtype, Shape]] = {
    "codes": (torch.int64, ("N", "M")), "z": (torch.float32, ("N", "Z")),
    "attention": (torch.float32, ("N", 2)), "present": (torch.bool, ("N", len(MODALITIES))),
}  # fmt: skip


def read_items(path: Path) -> dict[str, Tensor]:
    """Codes, latents, fusion weights and presence of every item, from ``items.safetensors``."""
    return read_tensors(path, ITEMS)
