"""Checkpoints of a training: its tensors and its progress in one file, which is replaced atomically.

The main process of a training reads and writes them. A stage that is resumed continues at its last
checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cemg.distributed import World
from cemg.errors import DamagedError
from cemg.progress import console
from cemg.storage import files
from cemg.storage.read import parse_json, read_tensor_file, tensors_digest

Slots = dict[int, dict[str, Tensor]]  # state of the optimizer, by number of the parameter and by name
T = TypeVar("T")

CHECKPOINTS, FILE = "checkpoints", "checkpoint.safetensors"  # in the folder of an unfinished stage
COST = 20  # the time between two checkpoints is at least so many times that of writing one


class Checkpoint:
    """The checkpoint of a training, in a folder of its own.

    Args:
        folder: The folder.
        stage: Name of the training, for messages.
        identity: Key of the training; files of another key are not resumed.
        seconds: Seconds between two checkpoints, or 20 times those of writing one, if that is longer.
            0: one after each step.
    """

    def __init__(self, folder: Path, *, stage: str, identity: str, seconds: float) -> None:
        self.folder, self.path = folder, folder / FILE
        self.stage, self.identity, self.seconds = stage, identity, seconds
        self.saved_at, self.cost = time.monotonic(), 0.0

    def exists(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        return self.path.exists() or self.path.is_symlink()

    def due(self) -> bool:
        """Whether the time has come to write another one."""
        between = max(self.seconds, COST * self.cost) if self.seconds else 0.0
        return time.monotonic() - self.saved_at > between

    def save(self, tensors: Mapping[str, Tensor], state: str) -> None:
        """Replace the checkpoint. ``state`` is JSON."""
        began = time.monotonic()
        self.write(self.path, tensors, state)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - began

    def write(self, path: Path, tensors: Mapping[str, Tensor], state: str = "") -> str:
        """Write tensors to a file of the folder, with the identity. Returns the digest of all of it."""
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        sha = tensors_digest(kept, state + self.identity)
        about = {"state": state, "identity": self.identity, "sha256": sha}
        files.save_tensors(kept, path, metadata=about)
        return sha

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and metadata of a file that `write` wrote in this training.

        Raises:
            DamagedError: The file is missing or damaged, or belongs to another training.
        """
        tensors, about = read_tensor_file(path, finite=False, fix=self.restart)
        if about.get("identity") != self.identity:
            raise DamagedError(f"{path} belongs to another training", fix=self.restart)
        if tensors_digest(tensors, about.get("state", "") + self.identity) != about.get("sha256"):
            cause = "its tensors do not have the sha256 that they were written with"
            raise DamagedError(f"{path} is damaged", cause=cause, fix=self.restart)
        return tensors, about

    def resume(self, shape: type[T], restore: Callable[[dict[str, Tensor], T], None]) -> bool:
        """Continue at the checkpoint, if there is one. Returns whether the training continues.

        If it is damaged, its folder is deleted, and the reason is printed.

        Args:
            shape: The dataclass of the state.
            restore: Is called with the tensors and the state; it may raise DamagedError.
        """
        if not self.exists():
            return False
        try:
            tensors, about = self.read(self.path)
            restore(tensors, parse_json(about.get("state", ""), shape, name=f"the state in {self.path}"))
        except DamagedError as error:
            reason = f"{error.message} ({error.cause})" if error.cause else error.message
            message = f"{self.stage}: {reason}; the training starts from the beginning"
            console.print(message, highlight=False, soft_wrap=True, markup=False)
            shutil.rmtree(self.folder)
            return False
        return True

    @property
    def restart(self) -> str:
        """How to continue without the files."""
        return f"delete {self.folder} and run the same command again: the training starts from the beginning"


def slot_tensors(slots: Slots) -> dict[str, Tensor]:
    """The state of an optimizer as tensors of a checkpoint."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, slot in slots.items()
        for name, value in slot.items()
    }


def slots_of(tensors: Mapping[str, Tensor]) -> Slots:
    """The state of an optimizer among the tensors of a checkpoint."""
    slots: Slots = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            slots.setdefault(int(index), {})[name] = value
    return slots


def load_slots(optimizer: Optimizer, slots: Slots) -> None:
    """Replace the state of an optimizer; its settings stay."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})


def broadcast_slots(optimizer: Optimizer, world: World) -> Slots:
    """The state of the main process's optimizer, in every process."""
    own: Slots = optimizer.state_dict()["state"]
    shapes = {i: {k: (v.shape, v.dtype, v.device.type) for k, v in s.items()} for i, s in own.items()}
    slots: Slots = {}
    for index, shapes_of in world.agree(shapes).items():
        slots[index] = {}
        for name, (shape, dtype, kind) in shapes_of.items():
            value = own[index][name] if world.main else torch.empty(shape, dtype=dtype, device=kind)
            slots[index][name] = world.broadcast(value)
    return slots
