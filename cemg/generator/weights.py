"""The trained weights of a generator, as its stage keeps them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.errors import DamagedError
from cemg.storage.read import read_tensors


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Trained weights by name. Shared weights occur once; a LoRA model has only its trainable weights."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Load the weights that `weights_of` returned into a model of the same shape.

    Raises:
        DamagedError: The file is damaged or has the weights of another model; the error says what differs.
    """
    assign(model, read_tensors(path), path)


@torch.no_grad()
def assign(model: PreTrainedModel, tensors: dict[str, Tensor], path: Path) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable.keys() != tensors.keys():
        odd = sorted(trainable.keys() ^ tensors.keys())
        raise DamagedError(
            f"{path} has the weights of another model", cause=f"{len(odd)} names differ, such as {odd[0]}"
        )
    for name, parameter in trainable.items():
        saved = tensors[name]
        if parameter.shape != saved.shape:
            cause = f"{name} is {list(saved.shape)} in the file and {list(parameter.shape)} in the model"
            raise DamagedError(f"{path} has weights of another shape", cause=cause)
        if parameter.dtype != saved.dtype:
            cause = f"{name} is {saved.dtype} in the file and {parameter.dtype} in the model"
            raise DamagedError(f"{path} has weights of another dtype", cause=cause)
    for name, parameter in trainable.items():
        parameter.copy_(tensors[name])
