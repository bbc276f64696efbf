"""The trained weights of a generator, as its stage keeps them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.errors import DamagedError
from cemg.storage.read import read_tensors


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Trained weights by name, shared ones once; of a LoRA model only what it trains."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Put what ``weights_of`` gave into a model of the same shape; UserError for a file that is damaged or of
    another model, and what differs."""
    assign(model, read_tensors(path), path)


@torch.no_grad()
def assign(model: PreTrainedModel, tensors: dict[str, Tensor], path: Path) -> None:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise DamagedError(
            f"{path} holds other weights than this model", cause=f"{len(odd)} differ, first {odd[0]}"
        )
    for name, parameter in own.items():
        there = tensors[name]
        if parameter.shape != there.shape:
            cause = f"{name} is {list(there.shape)} there and {list(parameter.shape)} here"
            raise DamagedError(f"{path} holds weights of another shape", cause=cause)
        if parameter.dtype != there.dtype:
            cause = f"{name} is {there.dtype} there and {parameter.dtype} here"
            raise DamagedError(f"{path} holds weights of another dtype", cause=cause)
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
