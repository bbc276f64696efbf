"""Training of the generator: next-token cross-entropy (paper equation 5), early stopping, exact resumption.

Dropout and batch order follow (seed, step) and (seed, epoch), so the step number is the whole random state:
a run that was killed continues with the losses it would have had.

A batch is computed in parts: one per process, or several with gradient accumulation. Each part has dropout of
its own, so two processes have the losses of one process that computes the same parts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from cemg.distributed import ALONE, World
from cemg.errors import DamagedError, UserError
from cemg.generator.branches import ItemInputs
from cemg.generator.config import GeneratorConfig
from cemg.generator.forward import forward_of
from cemg.generator.item_tokens import ItemVectors
from cemg.generator.losses import CodeLoss, ItemLoss
from cemg.generator.parallel import Copied, Divided, Trained
from cemg.generator.prompts import Prompter
from cemg.generator.samples import Batch, Buckets, Samples
from cemg.generator.vocabulary import Vocabulary
from cemg.generator.weights import assign, weights_of
from cemg.progress import Log, bar, console
from cemg.storage.checkpoint import Checkpoint, Slots, broadcast_slots, load_slots, slot_tensors, slots_of
from cemg.storage.read import STRICT
from cemg_kernels import Trie

PART_SEED = 2_654_435_769  # 2 ** 32 / golden ratio: seeds of parts differ in the 32 bits that torch reads


@dataclass(slots=True)
class Progress:
    """Progress of a training; saved in every checkpoint."""

    step: int = 0
    epoch: int = 0
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    best: float = -1.0
    best_epoch: int = -1
    stale: int = 0
    seconds: float = 0.0
    best_sha256: str = ""  # of the weights with the best validation
    train_seconds: float = 0.0  # of the steps, which the budget limits
    stopped: bool = False  # the budget was spent before the last step
    parts: int = 1  # of a batch

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


def train_generator(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    prompter: Prompter,
    train: Sequence[np.ndarray],
    trie: Trie,
    *,
    validate: Callable[[PreTrainedModel], float],
    config: GeneratorConfig,
    folder: Path,
    device: str = "cpu",
    dtype: str = "float32",
    log: Log | None = None,
    identity: str = "",
    world: World = ALONE,
) -> Progress:
    """Train a model in place. It ends with the weights of the best validation.

    Several processes call this with equal models and arguments, and only the main one reads and writes
    ``folder``, validates, and ends with the best weights.

    A later call with the same arguments resumes from the last checkpoint. If that is damaged or has another
    ``identity``, training starts from the beginning and prints the reason.

    Args:
        model: The backbone.
        vocabulary: The tokens of its codes.
        prompter: Builds the prompts.
        train: Training items (catalog rows) of each user.
        trie: Trie of the catalog.
        validate: Returns NDCG@10 of the model.
        config: Settings of the training.
        folder: Checkpoints are written here.
        device: "cpu" or a CUDA device.
        dtype: "float32" or "bfloat16" (mixed precision).
        log: Receives loss and validation metric.
        identity: Key of the stage; checkpoints of another key are not resumed.
        world: The processes that divide each batch.

    Raises:
        UserError: There is no training sample, the parts do not divide the batch, the loss is not finite, or
            the device is out of memory.
    """
    check_parts(config, world)
    samples = Samples(prompter, train, crop=config.crop, first_item=config.first_item, seed=config.seed)
    if len(samples) == 0:
        raise UserError(
            "there is no training sample: the training part of every user is empty",
            fix="check: cemg-data stats",
        )
    try:
        return _Training(
            model, vocabulary, samples, trie, validate, config, folder, device, dtype, log, identity, world
        ).run()  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} ran out of memory with batches of {config.batch_size}",
            cause=str(error).split(". ")[0],
            fix=f"--set generator.batch_size={max(config.batch_size // 2, 1)}, or --dtype bfloat16",
        ) from error


def check_parts(config: GeneratorConfig, world: World) -> None:
    """Raise UserError if the parts of all processes do not divide a batch evenly."""
    parts = world.size * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"generator.batch_size={config.batch_size} cannot be divided into {parts} equal parts",
            cause=f"{world.size} processes, generator.accumulation_steps={config.accumulation_steps}",
            fix=f"--set generator.batch_size={-(-config.batch_size // parts) * parts}, or another number of "
            "processes",
        )


class TrainingLoss(nn.Module):
    """The loss of a batch, as a module that contains the model."""

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, prompter: Prompter, trie: Trie,
        config: GeneratorConfig, device: str, dtype: str, *, plain: bool = False,
    ) -> None:  # fmt: skip
        """``plain`` trains through the model's own forward pass, which gathers divided weights."""
        super().__init__()
        self.model, self.config = model, config
        self.code_loss = CodeLoss(prompter.item_tokens, trie.to(device), vocabulary, config)
        self.item_loss: ItemLoss | None = None
        inputs = None
        if config.item_tokens:
            vectors = ItemVectors(model, prompter.item_tokens, device)
            inputs = ItemInputs(vectors, self.code_loss.depths, prompter.opening)
            self.item_loss = ItemLoss(vectors) if config.item_loss else None
        checkpointed = config.gradient_checkpointing
        self.predict = forward_of(model, vocabulary, dtype, inputs, plain=plain, checkpointed=checkpointed)

    def forward(self, batch: Batch) -> Tensor:
        predictions = self.predict(batch)
        loss = self.code_loss(predictions, batch.targets)
        if self.item_loss is not None:
            loss = loss + self.config.item_loss * self.item_loss(predictions, batch.targets)
        return loss


class _Training:
    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, samples: Samples, trie: Trie,
        validate: Callable[[PreTrainedModel], float], config: GeneratorConfig, folder: Path, device: str,
        dtype: str, log: Log | None, identity: str, world: World,
    ) -> None:  # fmt: skip
        self.config, self.log, self.validate = config, log, validate
        self.device, self.dtype, self.world = device, dtype, world
        self.checkpoint = Checkpoint(
            folder, stage="generator", identity=identity, seconds=config.checkpoint_seconds
        )
        self.best = folder / "best.safetensors"
        self.samples, self.vocabulary, self.trie = samples, vocabulary, trie
        self.buckets = Buckets(samples.lengths(), batch_size=config.batch_size, seed=config.seed)
        self.model = model
        nn.Module.to(model, "cpu" if world.sharded else device)
        self.total = len(self.buckets) * config.epochs
        self.parts = world.size * config.accumulation_steps
        self.state = Progress(parts=self.parts)

    def run(self) -> Progress:
        self.trained = self._start()
        started = time.monotonic() - self.state.seconds
        with bar("generator", total=self.total, done=self.state.step, shown=self.world.main) as advance:
            while self.state.epoch < self.config.epochs and not self._stale() and not self._spent():
                self._epoch(started, advance)
                self.state.seconds = time.monotonic() - started
                self._close_epoch()
        if self.world.main and self.state.best_sha256:
            self._load_best()
        return self.state

    def _start(self) -> Trained:
        """Resume in the main process, then give all processes the same weights and state."""
        optimizer = self._optimizer(self.model)
        if self.world.main:
            self._resume(optimizer)
        slots: Slots = {}
        if self.world.size > 1:
            self.state = self.world.agree(self.state)
            for parameter in self.model.parameters():
                self.world.broadcast(parameter)
            slots = broadcast_slots(optimizer, self.world)
        if not self.world.sharded:
            if slots:
                load_slots(optimizer, slots)
            of_hub = bool(self.model.name_or_path)
            return Copied(self._loss(self.model), optimizer, self.world, unused=of_hub)
        del optimizer
        divided = Divided(self.model, self._loss, self._optimizer, self.world, device=self.device)
        if slots:
            divided.load(slots)
        return divided

    def _optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        groups = _groups(model, self.config.weight_decay)
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.98), fused=True)

    def _loss(self, model: PreTrainedModel) -> TrainingLoss:
        return TrainingLoss(
            model, self.vocabulary, self.samples.prompter, self.trie, self.config, self.device, self.dtype,
            plain=self.world.sharded,
        )  # fmt: skip

    def _load_best(self) -> None:
        tensors, about = self.checkpoint.read(self.best)
        if about["sha256"] != self.state.best_sha256:
            raise DamagedError(
                f"{self.best} has the weights of another validation", fix=self.checkpoint.restart
            )
        assign(self.model, tensors, self.best)

    def _epoch(self, started: float, advance: Callable[[int], None]) -> None:
        self.samples.epoch = self.state.epoch
        done = self.state.step - self.state.epoch * len(self.buckets)
        for indices in self.buckets.of_epoch(self.state.epoch, done):
            began = time.monotonic()
            self.state.epoch_loss += self._step(indices)
            self.state.epoch_steps += 1
            self.state.step += 1
            self.state.train_seconds += time.monotonic() - began
            advance(1)
            spent, due = self._times()
            if spent:  # before a checkpoint: one that is resumed within an epoch has budget left
                self.state.stopped = self.state.step < self.total
                return
            if due:
                self.state.seconds = time.monotonic() - started
                self._checkpoint()

    def _times(self) -> tuple[bool, bool]:
        """Whether the budget is spent, and whether a checkpoint is due, by the main process's clock."""
        own = [self._spent(), self.checkpoint.due()] if self.world.main else [0, 0]
        both = self.world.totals(own)
        return bool(both[0]), bool(both[1])

    def _step(self, indices: list[int]) -> float:
        self.trained.loss.train()
        optimizer = self.trained.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_share(
                self.state.step, self.total, self.config
            )
        optimizer.zero_grad()
        (value,) = self.world.totals([self._backward(indices)])
        nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.clip)
        optimizer.step()
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.state.step}", fix="reduce generator.learning_rate"
            )
        if self.log is not None:
            self.log(self.state.step, {"generator/loss": value})
        return value

    def _backward(self, indices: list[int]) -> float:
        """Compute the gradient of a batch in this process's parts of it. Returns their shares of the loss."""
        steps, value = self.config.accumulation_steps, 0.0
        targets = self.samples.targets(indices)
        for step in range(steps):
            number = self.world.rank * steps + step
            part = indices[number :: self.parts]  # batches are sorted by length, so parts are about as long
            share = self.samples.targets(part) / targets
            batch = self.samples.batch(part or indices[:1]).to(self.device)  # an empty part has the share 0
            torch.manual_seed(self.config.seed * 1_000_003 + self.state.step + number * PART_SEED)
            value += self.trained.backward(batch, share, last=step == steps - 1)
        return value

    def _close_epoch(self) -> None:
        """Validate and write a checkpoint, in the main process."""
        slots = self.trained.collect()
        if self.world.main:
            self._judge()
            self._save(slots)
        self.state = self.world.agree(self.state)

    def _judge(self) -> None:
        state = self.state
        loss, state.epoch_loss, state.epoch_steps = state.epoch_loss / max(state.epoch_steps, 1), 0.0, 0
        state.epoch += 1
        line = f"generator epoch {state.epoch}/{self.config.epochs}: loss {loss:.4f}"
        due = state.epoch % self.config.validate_every == 0 or state.epoch == self.config.epochs
        if due or self._spent():
            line += f", validation NDCG@10 {self._validate():.4f} (best {state.best:.4f})"
        console.print(f"{line}, {state.seconds:.0f} s", highlight=False)
        if state.stopped:
            console.print(f"generator: the budget of {self.config.budget_hours:g} h is spent at step "
                          f"{state.step} of {self.total}", highlight=False)  # fmt: skip

    def _validate(self) -> float:
        self.model.eval()
        nn.Module.to(self.model, self.device)
        score = self.validate(self.model)
        if self.world.sharded:
            nn.Module.to(self.model, "cpu")
        state = self.state
        if score > state.best:
            state.best, state.best_epoch, state.stale = score, state.epoch, 0
            state.best_sha256 = self.checkpoint.write(self.best, weights_of(self.model))
        else:
            state.stale += 1
        if self.log is not None:
            self.log(state.step, {"generator/ndcg@10": score})
        return score

    def _stale(self) -> bool:
        return 0 < self.config.patience <= self.state.stale

    def _spent(self) -> bool:
        """Whether the budget of training time is used up, time before an interruption included."""
        return 0 < 3600 * self.config.budget_hours <= self.state.train_seconds

    def _checkpoint(self) -> None:
        slots = self.trained.collect()
        if self.world.main:
            self._save(slots)

    def _save(self, slots: Slots) -> None:
        """Write weights, optimizer state and progress."""
        tensors = {f"model.{k}": v for k, v in weights_of(self.model).items()} | slot_tensors(slots)
        self.checkpoint.save(tensors, json.dumps(asdict(self.state)))

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue from the checkpoint; start from the beginning if there is none or it is damaged."""

        def restore(tensors: dict[str, Tensor], state: Progress) -> None:
            if state.best_sha256:
                self.checkpoint.read(self.best)  # checks it; a later one is written again
            weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            assign(self.model, weights, self.checkpoint.path)
            load_slots(optimizer, slots_of(tensors))
            self.state = state

        if not self.checkpoint.resume(Progress, restore):
            return
        state = self.state
        console.print(f"generator: resumed at step {state.step} of {self.total}", highlight=False)
        if state.parts != self.parts:
            console.print(f"generator: a batch has {self.parts} parts now and had {state.parts}, so dropout "
                          "differs from that of an uninterrupted training", highlight=False)  # fmt: skip
            state.parts = self.parts


def learning_rate_share(step: int, total: int, config: GeneratorConfig) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to 0 or inverse square root."""
    warm = max(int(total * config.warmup_share), 1)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "inverse-sqrt":
        return math.sqrt(warm / (step + 1))
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def _groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: matrices decay; biases, norms, embeddings and a head that began as a copy do not."""
    embeddings = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Embedding) or getattr(m, "is_embedding", False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    rest = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
