"""Training on several processes, which torchrun or ``accelerate launch`` starts.

All processes run the same command. The main one (rank 0) executes it, and is the only one that reads and
writes the run. The others wait in `World.serve` until the main process calls a function on all of them.
Stages that are not distributed run in the main process alone.

Tensors on the CPU are exchanged by gloo, tensors on GPUs by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from cemg.errors import UserError
from cemg.progress import console

T = TypeVar("T")
# Other processes wait in an exchange while the main one builds a stage, so exchanges have no shorter limit.
# The end of a process closes its connections and ends the wait of all others.
TIMEOUT = timedelta(days=365)
LIMIT = timedelta(seconds=10)  # for the launcher's store to answer
SHARDED = "ACCELERATE_USE_FSDP"
# Options of `accelerate launch` without an effect: the accepted value, and what to type in their place.
OTHERS = {
    "ACCELERATE_MIXED_PRECISION": ("no", "leave out --mixed_precision; --dtype bfloat16 is its equivalent"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--set generator.accumulation_steps=N"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "use FSDP: --use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "use FSDP: --use_fsdp --fsdp_version 2"),
}
FSDP_OPTIONS = {
    "FSDP_VERSION": ("2", "--fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "leave out --fsdp_offload_params"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "--set generator.gradient_checkpointing=true"),
}


class World(AbstractContextManager["World"]):
    """The processes of one command: this one alone, or all that a launcher started.

    As a context, it releases the others at the end of the block. If the block raises, they are left waiting:
    the launcher ends them when the main process exits.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        sharded: Whether `accelerate launch --use_fsdp` asked to divide the weights over the processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, sharded: bool = False) -> None:
        self.rank, self.size, self.sharded = rank, size, sharded and size > 1

    @classmethod
    def join(cls, device: str) -> World:
        """Connect to the processes that the launcher started, if it started several.

        Args:
            device: "cpu" or "cuda". With several processes, "cuda" is a GPU per process.

        Raises:
            UserError: The launcher's options or the devices do not fit.
        """
        _check_launcher()
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        kind = torch.device(device)
        if kind.type == "cuda":
            _take_gpu(kind)
        backend = "gloo" if kind.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        except ValueError as error:  # a variable is missing
            fix = "start the processes with accelerate launch or torchrun, or unset WORLD_SIZE"
            message = f"WORLD_SIZE={size}, but no launcher started this process"
            raise UserError(message, cause=str(error), fix=fix) from error
        attempt = PrefixStore(_attempt(), store)  # the launcher's store has addresses of processes that died
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size, sharded=_is_set(SHARDED))

    @property
    def main(self) -> bool:
        """Whether this process executes the command."""
        return self.rank == 0

    # ---- calls

    def call(self, function: Callable[..., T], /, *arguments: Any, own: dict[str, Any], **options: Any) -> T:
        """Call a function in all processes and return the main process's result.

        It gets the arguments, which must be picklable, and this `World` as ``world``. ``own`` are options
        that only the main process passes.
        """
        if self.size > 1:
            self.agree((function, arguments, options))
        return function(*arguments, **options, **own, world=self)

    def serve(self) -> None:
        """Execute the calls of the main process until it releases this one. Only the main one prints."""
        console.quiet = True
        with _Connected():
            while (call := self.agree(None)) is not None:
                function, arguments, options = call
                function(*arguments, **options, world=self)
        dist.destroy_process_group()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        with _Connected():
            if value is not None:
                raise value
            self.agree(None)
        dist.destroy_process_group()

    # ---- exchanges, which every process must make in the same order

    def agree(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite a tensor with that of the process ``source``. Returns it."""
        if self.size > 1:
            dist.broadcast(tensor.detach(), source)
        return tensor

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over the processes."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes, without a gradient."""
        if self.size == 1:
            return x.detach()
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    def summed(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes, for a loss that every process computes from it.

        The gradient passes unchanged to this process's part.
        """
        return x if self.size == 1 else _Summed.apply(x)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradients of parameters by their sums over the processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        sums = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, sums.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = World()


class Rows:
    """The rows of a batch that this process computes: every ``size``-th one, from ``rank`` on.

    Args:
        world: The processes.
        count: B, the rows of the batch.
    """

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count

    def own(self, batch: Tensor) -> Tensor:
        """The rows [b, *] of this process, of a tensor [B, *]."""
        return batch if self.world.size == 1 else batch[self.world.rank :: self.world.size]

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes [B, *], from those of each [b, *].

        The gradient of a row passes to the process that it comes from, so every process must compute the
        same loss from the result.
        """
        if self.world.size == 1:
            return own
        return _Gathered.apply(own, self)  # type: ignore[no-any-return]

    def mean(self, own: Tensor) -> Tensor:
        """The mean over the batch of a number per row, [b] in each process. Its gradient is that of [b]."""
        return own.mean() if self.world.size == 1 else self.world.summed(own.sum() / self.count)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        whole = own.new_zeros(rows.count, *own.shape[1:])
        rows.own(whole).copy_(own)
        dist.all_reduce(whole)  # a sum of one row and zeros is exact, and the last batch may be uneven
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.rows.own(grad).contiguous(), None


class _Connected(AbstractContextManager[None]):
    """Raises UserError in place of the error of a connection that another process closed by its end."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = isinstance(value, dist.DistError) or (
            isinstance(value, RuntimeError) and ("gloo" in str(value) or "NCCL" in str(value))
        )
        if lost:
            raise UserError(
                "another process of this training has ended",
                cause=str(value).split(". ")[0],
                fix="see its message, if it printed one; the same command continues from the last checkpoint",
            ) from value


def first_to_fail() -> bool:
    """Whether no other process has called this before: it is the one that prints an error.

    Without several processes, and without the launcher's store, True.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_PORT" not in os.environ:
        return True
    address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=LIMIT)
        return store.add(f"cemg/failed/{_attempt()}", 1) == 1
    except (RuntimeError, ValueError):
        return True


def _check_launcher() -> None:
    """Raise UserError for options of a launcher that would have no effect."""
    if "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ and "RANK" not in os.environ:
        raise UserError(
            "accelerate launch has started a single process",
            cause="with --cpu it starts no others, whatever --num_processes is",
            fix="accelerate launch --multi_gpu --num_processes N; without --device, that is N CPU processes",
        )
    options = OTHERS | (FSDP_OPTIONS if _is_set(SHARDED) else {})
    for name, (accepted, fix) in options.items():
        value = os.environ.get(name, "1" if name == "FSDP_VERSION" else accepted)
        if value.lower() != accepted:
            raise UserError(f"{name}={value} is not supported", cause="set by accelerate launch", fix=fix)


def _attempt() -> str:
    """How often the launcher has restarted the processes."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _take_gpu(device: torch.device) -> None:
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None:
        raise UserError(
            f"--device {device} names one GPU for several processes", fix="--device cuda: one per process"
        )
    if local >= gpus:
        raise UserError(
            f"process {local + 1} of this machine has no GPU: torch sees {gpus}",
            fix=f"start at most {gpus} processes per machine",
        )
    torch.cuda.set_device(local)
