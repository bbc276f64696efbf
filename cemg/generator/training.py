"""Training of the generator: next-token cross-entropy (paper equation 5), early stopping, exact resumption.

Dropout and batch order follow (seed, step) and (seed, epoch), so the step number is the whole random state:
a run that was killed continues with the losses it would have had.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from cemg.errors import DamagedError, UserError
from cemg.generator.branches import ItemInputs
from cemg.generator.config import GeneratorConfig
from cemg.generator.forward import forward_of
from cemg.generator.item_tokens import ItemVectors
from cemg.generator.losses import CodeLoss, ItemLoss
from cemg.generator.prompts import Prompter
from cemg.generator.samples import Batch, Buckets, Samples
from cemg.generator.vocabulary import Vocabulary
from cemg.generator.weights import assign, weights_of
from cemg.progress import Log, bar, console
from cemg.storage import files
from cemg.storage.read import STRICT, parse_json, read_tensor_file, tensors_digest
from cemg_kernels import Trie


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
) -> Progress:
    """Train a model in place. It ends with the weights of the best validation.

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

    Raises:
        UserError: There is no training sample, the loss is not finite, or the device is out of memory.
    """
    samples = Samples(prompter, train, crop=config.crop, first_item=config.first_item, seed=config.seed)
    if len(samples) == 0:
        raise UserError(
            "there is no training sample: the training part of every user is empty",
            fix="check: cemg-data stats",
        )
    try:
        return _Training(
            model, vocabulary, samples, trie, validate, config, folder, device, dtype, log, identity
        ).run()  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} ran out of memory with batches of {config.batch_size}",
            cause=str(error).split(". ")[0],
            fix=f"--set generator.batch_size={max(config.batch_size // 2, 1)}, or --dtype bfloat16",
        ) from error


class _Training:
    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, samples: Samples, trie: Trie,
        validate: Callable[[PreTrainedModel], float], config: GeneratorConfig, folder: Path, device: str,
        dtype: str, log: Log | None, identity: str,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.log, self.validate = config, folder, log, validate
        self.identity, self.device = identity, device
        self.samples, self.vocabulary = samples, vocabulary
        self.buckets = Buckets(samples.lengths(), batch_size=config.batch_size, seed=config.seed)
        self.model = model
        torch.nn.Module.to(model, device)
        prompter = samples.prompter
        self.code_loss = CodeLoss(prompter.item_tokens, trie.to(device), vocabulary, config)
        self.item_loss: ItemLoss | None = None
        inputs = None
        if config.item_tokens:
            vectors = ItemVectors(model, prompter.item_tokens)
            inputs = ItemInputs(vectors, self.code_loss.depths, prompter.opening)
            self.item_loss = ItemLoss(vectors) if config.item_loss else None
        self.predict = forward_of(model, vocabulary, dtype, inputs)
        self.optimizer = torch.optim.AdamW(
            _groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.total = len(self.buckets) * config.epochs
        self.state = Progress()
        self.saved_at = time.monotonic()

    def run(self) -> Progress:
        self._resume()
        started = time.monotonic() - self.state.seconds
        with bar("generator", total=self.total, done=self.state.step) as advance:
            while self.state.epoch < self.config.epochs and not self._stale() and not self._spent():
                self._epoch(started, advance)
                self.state.seconds = time.monotonic() - started
                self._close_epoch()
        if self.state.best_sha256:
            self._load_best()
        return self.state

    def _load_best(self) -> None:
        path = self.folder / "best.safetensors"
        tensors, about = self._read(path)
        if about["sha256"] != self.state.best_sha256:
            raise DamagedError(f"{path} has the weights of another validation", fix=_restart(self.folder))
        assign(self.model, tensors, path)

    def _epoch(self, started: float, advance: Callable[[int], None]) -> None:
        self.samples.epoch = self.state.epoch
        done = self.state.step - self.state.epoch * len(self.buckets)
        for indices in self.buckets.of_epoch(self.state.epoch)[done:]:
            began = time.monotonic()
            batch = self.samples.batch(indices).to(self.device)
            self.state.epoch_loss += self._step(batch)
            self.state.epoch_steps += 1
            self.state.step += 1
            self.state.train_seconds += time.monotonic() - began
            advance(1)
            if self._spent():  # before a checkpoint: one that is resumed within an epoch has budget left
                self.state.stopped = self.state.step < self.total
                return
            if time.monotonic() - self.saved_at > self.config.checkpoint_seconds:
                self.state.seconds = time.monotonic() - started
                self._checkpoint()

    def _step(self, batch: Batch) -> float:
        self.model.train()
        torch.manual_seed(self.config.seed * 1_000_003 + self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_share(
                self.state.step, self.total, self.config
            )
        loss = self._loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip)
        self.optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.state.step}", fix="reduce generator.learning_rate"
            )
        if self.log is not None:
            self.log(self.state.step, {"generator/loss": value})
        return value

    def _loss(self, batch: Batch) -> Tensor:
        predictions = self.predict(batch)
        loss = self.code_loss(predictions, batch.targets)
        if self.item_loss is not None:
            loss = loss + self.config.item_loss * self.item_loss(predictions, batch.targets)
        return loss

    def _close_epoch(self) -> None:
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
        self._checkpoint()

    def _validate(self) -> float:
        self.model.eval()
        score = self.validate(self.model)
        state = self.state
        if score > state.best:
            state.best, state.best_epoch, state.stale = score, state.epoch, 0
            state.best_sha256 = self._write(weights_of(self.model), self.folder / "best.safetensors")
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
        """Write weights, optimizer state and progress to one file, atomically."""
        tensors = {f"model.{k}": v for k, v in weights_of(self.model).items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone() for k, v in slot.items()}
        self._write(tensors, self.folder / "checkpoint.safetensors", state=json.dumps(asdict(self.state)))
        self.saved_at = time.monotonic()

    def _write(self, tensors: dict[str, Tensor], path: Path, *, state: str = "") -> str:
        """Write tensors with the identity of the training and the digest of both. Returns the digest."""
        kept = {k: v.cpu().contiguous() for k, v in tensors.items()}
        sha = tensors_digest(kept, state + self.identity)
        about = {"state": state, "identity": self.identity, "sha256": sha}
        files.save_tensors(kept, path, metadata=about)
        return sha

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and metadata that `_write` wrote in this training."""
        tensors, about = read_tensor_file(path, finite=False, fix=_restart(path.parent))
        if about.get("identity") != self.identity:
            raise DamagedError(f"{path} belongs to another training", fix=_restart(path.parent))
        if tensors_digest(tensors, about.get("state", "") + self.identity) != about.get("sha256"):
            cause = "its tensors do not have the sha256 that they were written with"
            raise DamagedError(f"{path} is damaged", cause=cause, fix=_restart(path.parent))
        return tensors, about

    def _resume(self) -> None:
        """Continue from the checkpoint; start from the beginning if there is none or it is damaged."""
        path = self.folder / "checkpoint.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not path.is_symlink():
            return
        try:
            tensors, about = self._read(path)
            state = parse_json(about.get("state", ""), Progress, name=f"the state in {path}")
            if state.best_sha256:
                self._read(self.folder / "best.safetensors")  # checks it; a later one is written again
            self._restore(tensors, state)
        except DamagedError as error:
            reason = f"{error.message} ({error.cause})" if error.cause else error.message
            message = f"generator: {reason}; the training starts from the beginning"
            console.print(message, highlight=False, soft_wrap=True, markup=False)
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            return
        console.print(f"generator: resumed at step {self.state.step} of {self.total}", highlight=False)

    def _restore(self, tensors: dict[str, Tensor], state: Progress) -> None:
        path = self.folder / "checkpoint.safetensors"
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                slots.setdefault(int(index), {})[name] = value
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        assign(self.model, weights, path)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        self.state = state


def learning_rate_share(step: int, total: int, config: GeneratorConfig) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to 0 or inverse square root."""
    warm = max(int(total * config.warmup_share), 1)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "inverse-sqrt":
        return math.sqrt(warm / (step + 1))
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def _restart(folder: Path) -> str:
    return f"delete {folder} and run the same command again: the training starts from the beginning"


def _groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: matrices decay; biases, norms, embeddings and a head that began as a copy do not."""
    embeddings = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, torch.nn.Embedding) or getattr(m, "is_embedding", False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    rest = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
