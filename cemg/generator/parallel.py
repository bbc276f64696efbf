"""Where the weights of a training are: in one process, copied to several (DDP), or divided over them (FSDP2).

The model is whole in every process before the training. The main process reads it for checkpoints and
validations.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cemg.distributed import World
from cemg.generator.samples import Batch
from cemg.storage.checkpoint import Slots, load_slots


class Trained(ABC):
    """The weights in training and their optimizer.

    Attributes:
        loss: The loss of a batch, as a module that contains the weights in training.
        optimizer: The optimizer of these weights.
    """

    loss: nn.Module
    optimizer: Optimizer
    world: World

    def backward(self, batch: Batch, share: float, *, last: bool) -> float:
        """Add the gradient of ``share`` times the loss of a batch. Returns that loss.

        Args:
            batch: A part of the batch of a step.
            share: Its share of the targets of the batch.
            last: Whether it is the last part of this process: then gradients are summed over the processes.
        """
        with self._summing(last):
            loss = self.loss(batch)
            if self.world.size > 1 or share != 1:
                loss = loss * share
            (loss if self.world.size == 1 else loss * self.world.size).backward()  # the others take the mean
        return float(loss.detach())

    def parameters(self) -> list[Tensor]:
        """The parameters of the optimizer, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @abstractmethod
    def _summing(self, last: bool) -> AbstractContextManager[object]:
        """The context of a backward pass."""

    @abstractmethod
    def collect(self) -> Slots:
        """Update the whole model of the main process. Returns the whole state of the optimizer there."""


class Copied(Trained):
    """The model itself is trained, by this process alone or by several with a copy each."""

    def __init__(self, loss: nn.Module, optimizer: Optimizer, world: World, *, unused: bool) -> None:
        """``unused``: whether the model may have weights that the loss does not read."""
        self.loss, self.optimizer, self.world = loss, optimizer, world
        if world.size > 1:
            self.loss = DistributedDataParallel(
                loss, find_unused_parameters=unused, gradient_as_bucket_view=True
            )

    def _summing(self, last: bool) -> AbstractContextManager[object]:
        if last or not isinstance(self.loss, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[object], self.loss.no_sync())

    def collect(self) -> Slots:
        return cast(Slots, self.optimizer.state_dict()["state"])


class Divided(Trained):
    """Each process trains a part of every weight of a copy of the model, layer by layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss_of: Callable[[PreTrainedModel], nn.Module],
        optimizer_of: Callable[[PreTrainedModel], Optimizer],
        world: World,
        *,
        device: str,
    ) -> None:
        """``model`` stays whole, on the CPU. ``loss_of`` and ``optimizer_of`` are called with its copy."""
        self.model, self.world = model, world
        self.copy = copy.deepcopy(model)
        mesh = init_device_mesh(torch.device(device).type, (world.size,))
        for layer in _layers(self.copy):
            fully_shard(layer, mesh=mesh)
        self.loss = loss_of(self.copy)
        fully_shard(self.loss, mesh=mesh)  # in place
        self.optimizer = optimizer_of(self.copy)

    def load(self, slots: Slots) -> None:
        """Divide a state of the optimizer that every process has as a whole."""
        parameters = self.parameters()
        divided = {
            index: {name: _like(value, parameters[index]) for name, value in slot.items()}
            for index, slot in slots.items()
        }
        load_slots(self.optimizer, divided)

    def _summing(self, last: bool) -> AbstractContextManager[object]:
        cast(Any, self.loss).set_requires_gradient_sync(last)
        return nullcontext()

    @torch.no_grad()
    def collect(self) -> Slots:
        whole = dict(self.model.named_parameters())
        for name, parameter in self.copy.named_parameters():
            if parameter.requires_grad:
                value = _whole(parameter)
                if self.world.main:
                    whole[name].copy_(value)
        slots: Slots = {}
        for index, slot in self.optimizer.state_dict()["state"].items():
            values = {name: _whole(value) for name, value in slot.items()}
            if self.world.main:
                slots[index] = {name: value.cpu() for name, value in values.items()}
        return slots


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a Transformer, which are gathered one at a time."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def _like(value: Tensor, parameter: Any) -> Tensor:
    """Divide a value as a parameter is divided. The number of steps is whole in every process."""
    if value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
