"""The training loop of the baselines: early stopping, checkpoints, a budget of time.

B samples per batch, P targets, N items. A resumed training gives the same weights as an uninterrupted one.
No state of a random generator is stored: the order of an epoch is drawn from (seed, epoch), dropout and
negatives from (seed, step).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cemg.baselines.samples import Batch, Samples
from cemg.baselines.validation import Scorer, validate
from cemg.data.dataset import Split
from cemg.dense import DenseConfig
from cemg.errors import DamagedError, UserError
from cemg.progress import console
from cemg.storage import files
from cemg.storage.read import parse_json, read_tensor_file, tensors_digest

Loss = Callable[[Batch, torch.Generator], Tensor]  # the mean loss over the P targets of a batch
LOG = "log.json"
Log = list[dict[str, float]]  # an entry per epoch


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """The settings that the loop reads, explained at `DenseConfig`. The settings of a model extend them."""

    learning_rate: float = 1e-3
    schedule: str = "linear"
    beta2: float = 0.999
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 30
    patience: int = 10
    select: str = "NDCG@10"
    seed: int = 0


def train(
    model: nn.Module, samples: Samples, split: Split, *, config: LoopConfig | DenseConfig, loss: Loss,
    scorer: Scorer, settings: Mapping[str, Any], folder: Path, budget: float | None = None,
    progress: bool = True, valid_users: np.ndarray | None = None,
) -> Log:  # fmt: skip
    """Train a model, and leave it with the weights of its best epoch, in evaluation mode.

    Writes ``checkpoint.safetensors`` after every epoch and ``log.json`` at the end. The same call resumes at
    the checkpoint.

    Args:
        model: The model, on its device.
        samples: Training samples.
        split: The split, whose validation users select the epoch.
        config: Settings of the loop.
        loss: The loss of a batch on the device of the model. The generator (CPU) draws what is random.
        scorer: Scores the catalog with the model, for validation.
        settings: All settings that a checkpoint must have in common with this training.
        folder: For the checkpoint and the log.
        budget: Seconds of training, those before an interruption included, after which it stops, also within
            an epoch; None for no limit. Validation is not counted.
        progress: Whether to print a line per epoch.
        valid_users: Positions in ``split.valid_users`` that validation is limited to, for a slow ``scorer``.

    Returns:
        The log.

    Raises:
        UserError: The folder has a checkpoint of other settings or of another split, or the loss is not
            finite.
    """
    device = next(model.parameters()).device
    identity: dict[str, object] = {"config": dict(settings), "split": split.fingerprint}
    training = _Training.start(model, config, loss, identity, budget)
    training.resume(folder, device)
    while training.unfinished():
        training.train_epoch(samples, device)
        training.validate(scorer, split, valid_users)
        if training.log[-1]["share"] == 1:  # a larger budget continues with whole epochs
            training.checkpoint(folder)
        if progress:
            _print_epoch(training.log[-1])
    if training.spent() and (training.log[-1]["share"] < 1 or not training.ended()):
        training.log[-1]["stopped"] = 1.0  # after the checkpoint, with which a larger budget continues
    model.load_state_dict(training.best)
    model.eval()
    files.write_json(folder / LOG, training.log)
    return training.log


@dataclass(slots=True)
class _Training:
    """The state of a training, which a checkpoint stores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: LoopConfig | DenseConfig
    loss: Loss
    identity: dict[str, object]  # settings and split, which a checkpoint must have in common
    budget: float | None
    epoch: int = 0
    stale: int = 0  # epochs since the best one
    best_score: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(
        cls, model: nn.Module, config: LoopConfig | DenseConfig, loss: Loss, identity: dict[str, object],
        budget: float | None,
    ) -> _Training:  # fmt: skip
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, config.beta2),
            fused=True,
        )
        return cls(model, optimizer, config, loss, identity, budget)

    def unfinished(self) -> bool:
        """Whether there is another epoch to train."""
        return not self.ended() and not self.spent()

    def ended(self) -> bool:
        """Whether all epochs are trained, or the last ones were no better."""
        return self.epoch >= self.config.epochs or self.stale >= self.config.patience

    def spent(self, seconds: float = 0.0) -> bool:
        """Whether the budget is used up, ``seconds`` of the current epoch included."""
        used = sum(row["train_seconds"] for row in self.log) + seconds
        return self.budget is not None and used >= self.budget

    def train_epoch(self, samples: Samples, device: torch.device) -> None:
        """Train on every sample once, or until the budget is spent, and extend the log."""
        started, total, targets = time.perf_counter(), 0.0, 0
        config, per_epoch = self.config, samples.num_batches(self.config.batch_size)
        batches = samples.batches(config.batch_size, np.random.default_rng((config.seed, self.epoch)))
        done = 0
        self.model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in batches:
                step = self.epoch * per_epoch + done
                if config.schedule == "linear":
                    rate = config.learning_rate * (1 - step / (config.epochs * per_epoch))
                    self.optimizer.param_groups[0]["lr"] = rate
                total += self._step(batch.to(device), step) * len(batch.targets)
                targets += len(batch.targets)
                done += 1
                if self.spent(time.perf_counter() - started):
                    break
        self.epoch += 1
        record = {"loss": total / targets, "train_seconds": time.perf_counter() - started}
        self.log.append({"epoch": self.epoch, "share": done / per_epoch, **record})

    def _step(self, batch: Batch, number: int) -> float:
        seed = int(np.random.SeedSequence((self.config.seed, number)).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loss = self.loss(batch, generator)
        if not bool(loss.isfinite()):
            raise UserError(f"the loss is {float(loss)} at step {number}", fix="lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def validate(self, scorer: Scorer, split: Split, users: np.ndarray | None) -> None:
        """Evaluate the validation users, and keep the weights if the selected metric is the best so far."""
        started = time.perf_counter()
        self.model.eval()
        metrics = validate(scorer, split, users)
        self.log[-1] |= {f"valid_{k}": v for k, v in metrics.items()}
        self.log[-1]["valid_seconds"] = time.perf_counter() - started
        self.stale += 1
        if metrics[self.config.select] > self.best_score:
            self.best_score, self.stale = metrics[self.config.select], 0
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def checkpoint(self, folder: Path) -> None:
        """Write the state to one safetensors file, atomically. Its header has the counters as JSON."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
        counters = {k: getattr(self, k) for k in ("epoch", "stale", "best_score", "log", "identity")}
        state, kept = json.dumps(counters), {k: v.cpu().contiguous() for k, v in tensors.items()}
        about = {"run": state, "sha256": tensors_digest(kept, state)}
        files.save_tensors(kept, _checkpoint_file(folder), metadata=about)

    def resume(self, folder: Path, device: torch.device) -> None:
        """Load the checkpoint of the folder, if it has one.

        Raises UserError where it is damaged, or belongs to other settings or another split.
        """
        path = _checkpoint_file(folder)
        if not path.exists() and not path.is_symlink():
            return
        fix = f"delete {path} and run the same command again: the training starts from the beginning"
        tensors, about = read_tensor_file(path, finite=False, fix=fix)
        state = about.get("run", "")
        if tensors_digest(tensors, state) != about.get("sha256"):
            cause = "its tensors do not have the sha256 that they were written with"
            raise DamagedError(f"{path} is damaged", cause=cause, fix=fix)
        counters = parse_json(state, dict[str, Any], name=f"the state in {path}", fix=fix)
        check_identity(path, counters.pop("identity", {}), self.identity)
        for name, value in counters.items():
            setattr(self, name, value)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.model.load_state_dict(with_prefix(tensors, "model."))
        self.best = with_prefix(tensors, "best.")
        self.optimizer.load_state_dict(optimizer_state(self.optimizer, with_prefix(tensors, "optimizer.")))


def _checkpoint_file(folder: Path) -> Path:
    return folder / "checkpoint.safetensors"


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, object]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def check_identity(path: Path, stored: dict[str, object], current: dict[str, object]) -> None:
    """Raise UserError where a checkpoint belongs to other settings or another split."""
    for part, now in current.items():
        then = stored.get(part)
        if not isinstance(now, dict) or not isinstance(then, dict):
            raise UserError(f"{path} does not name its {part}", fix="train into another folder")
        for key in {**now, **then}:
            if now.get(key) != then.get(key):
                raise UserError(
                    f"{path} belongs to another run",
                    cause=f"its {part} has {key} {then.get(key)}, this run {now.get(key)}",
                    fix="train into another folder, or remove that one",
                )


def _print_epoch(row: dict[str, float]) -> None:
    console.print(
        f"epoch {row['epoch']:>3}  loss {row['loss']:.4f}  valid HR@10 {row['valid_HR@10']:.4f}  "
        f"NDCG@10 {row['valid_NDCG@10']:.4f}  {row['train_seconds']:.1f} s",
        highlight=False,
    )
