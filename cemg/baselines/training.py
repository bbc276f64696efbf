"""Training of SASRec and BSARec, with early stopping and checkpoints.

B samples per batch, L positions, D embedding, N items, P targets. A resumed training gives the same weights
as an uninterrupted one. No state of a random generator is stored: the order of an epoch is drawn from
(seed, epoch), dropout and negatives from (seed, step).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.baselines.samples import Batch, Samples
from cemg.baselines.validation import validate
from cemg.data.dataset import Dataset, Split
from cemg.dense import PRODUCTS, DenseConfig, DenseRanker, SequenceEncoder, linear_cross_entropy
from cemg.errors import DamagedError, UserError
from cemg.progress import console
from cemg.storage import files
from cemg.storage.read import parse_json, read_tensor_file, tensors_digest

REDRAWS = 8  # of a negative that is in the user's own sequence, before it is kept
MAY_CHANGE = ("epochs", "patience")  # settings that may differ when a training at a constant rate is resumed


def train_dense(
    data: Dataset, config: DenseConfig, *, folder: Path, device: str = "cpu", progress: bool = True
) -> DenseRanker:
    """Train on the training part of the leave-one-out split.

    Writes ``checkpoint.safetensors`` after every epoch, and ``dense.safetensors``, ``dense.json`` and
    ``log.json`` at the end. The same call resumes at the checkpoint. With ``folds`` > 1 the training leaves
    out the users of ``held_out_users``; validation is over all users.

    Returns:
        The ranker with the weights of the best epoch.

    Raises:
        UserError: The folder has a checkpoint of other settings or of another split, no user has two
            training items, or the loss is not finite.
    """
    split = data.split()
    samples = training_samples(split, config)
    if len(samples.starts) == 0:
        raise UserError(f"{data.name}: no user has two training items", fix="use data with longer histories")
    training = _Training.start(data.num_items, config, split, torch.device(device))
    training.resume(folder)
    while training.epoch < config.epochs and training.stale < config.patience:
        training.train_epoch(samples)
        training.validate(split)
        training.checkpoint(folder)
        if progress:
            _print_epoch(training.log[-1])
    files.write_json(folder / "log.json", training.log)
    ranker = training.best_ranker()
    ranker.save(folder)
    return ranker


def held_out_users(split: Split, config: DenseConfig) -> np.ndarray:
    """Return the users that a training leaves out, as positions in ``split.users``.

    The folds are drawn by the seed 0, so the models of all folds, whatever their seed, cover each user once.
    """
    if config.folds == 1:
        return np.empty(0, dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(split.users))
    return np.sort(order[config.fold :: config.folds])


def training_samples(split: Split, config: DenseConfig) -> Samples:
    """Collect the training samples of the users that are not left out."""
    sequences = list(split.train)
    for position in held_out_users(split, config):
        sequences[split.users[position]] = np.empty(0, dtype=np.int32)
    make = Samples.positions if config.samples == "positions" else Samples.prefixes
    return make(sequences, config.max_length)


def loss_of(
    model: SequenceEncoder, batch: Batch, *, config: DenseConfig, generator: torch.Generator
) -> Tensor:
    """Compute the mean loss over the P targets. ``generator`` (CPU) draws the negatives."""
    if batch.every_position:
        states = model(batch.inputs, batch.lengths)[batch.present]  # [P, D]
    else:
        states = model(batch.inputs, batch.lengths, newest=True)  # [P, D]
    targets, table = batch.targets, model.items.weight
    if config.loss == "ce":
        drawn = None
        if 0 < config.negatives < len(table):
            drawn = torch.randperm(len(table), generator=generator)[: config.negatives].to(targets.device)
        dtype = PRODUCTS[config.products]
        return linear_cross_entropy(states, table, targets=targets, negatives=drawn, dtype=dtype)
    negatives = draw_negatives(batch, len(table), generator=generator)  # [P]
    positive, negative = (states * table[targets]).sum(1), (states * table[negatives]).sum(1)  # [P] logits
    return (F.softplus(-positive) + F.softplus(negative)).mean()


def draw_negatives(batch: Batch, num_items: int, *, generator: torch.Generator) -> Tensor:
    """Draw an item that is not in the sample for each target, uniformly; [P] int64.

    An item that is still in the sample after REDRAWS draws is kept: a user may have almost all items.
    """
    rows = torch.arange(len(batch.inputs), device=batch.inputs.device)  # [P] the sample of each target
    newest = batch.targets
    if batch.every_position:
        rows, newest = batch.present.nonzero()[:, 0], batch.targets[batch.lengths.cumsum(0) - 1]
    inputs = torch.where(batch.present, batch.inputs, batch.inputs[:, :1])
    sequences = torch.cat([inputs, newest[:, None]], dim=1)  # [B, L + 1]
    negatives = torch.randint(num_items, (len(rows),), generator=generator).to(rows.device)
    for _ in range(REDRAWS):
        in_sequence = (negatives[:, None] == sequences[rows]).any(1)
        redrawn = torch.randint(num_items, (len(rows),), generator=generator).to(rows.device)
        negatives = torch.where(in_sequence, redrawn, negatives)
    return negatives


@dataclass(slots=True)
class _Training:
    """The state of a training, which a checkpoint stores."""

    model: SequenceEncoder
    optimizer: torch.optim.Optimizer
    config: DenseConfig
    identity: dict[str, object]  # settings and split, which a checkpoint must have in common
    epoch: int = 0
    stale: int = 0  # epochs since the best one
    best_score: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, num_items: int, config: DenseConfig, split: Split, device: torch.device) -> _Training:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = SequenceEncoder(num_items, config).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, config.beta2),
            fused=True,
        )
        may_change = MAY_CHANGE if config.schedule == "constant" else ()
        settings = {k: v for k, v in asdict(config).items() if k not in may_change}
        return cls(model, optimizer, config, {"config": settings, "split": split.fingerprint})

    def train_epoch(self, samples: Samples) -> None:
        """Train on every sample once. Appends the mean loss over targets and the seconds to the log."""
        started, total, targets = time.perf_counter(), 0.0, 0
        config, device = self.config, self.model.items.weight.device
        step = self.epoch * samples.num_batches(config.batch_size)
        batches = samples.batches(config.batch_size, np.random.default_rng((config.seed, self.epoch)))
        self.model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for number, batch in enumerate(batches, start=step):
                if config.schedule == "linear":
                    done = number / (config.epochs * samples.num_batches(config.batch_size))
                    self.optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - done)
                total += self._step(batch.to(device), number) * len(batch.targets)
                targets += len(batch.targets)
        self.epoch += 1
        record = {"loss": total / targets, "train_seconds": time.perf_counter() - started}
        self.log.append({"epoch": self.epoch, **record})

    def _step(self, batch: Batch, number: int) -> float:
        seed = int(np.random.SeedSequence((self.config.seed, number)).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loss = loss_of(self.model, batch, config=self.config, generator=generator)
        if not bool(loss.isfinite()):
            raise UserError(f"the loss is {float(loss)} at step {number}", fix="lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def validate(self, split: Split) -> None:
        """Evaluate all validation users, and keep the weights if the selected metric is the best so far."""
        started = time.perf_counter()
        self.model.eval()
        metrics = validate(DenseRanker(self.model, self.config), split)
        self.log[-1] |= {f"valid_{k}": v for k, v in metrics.items()}
        self.log[-1]["valid_seconds"] = time.perf_counter() - started
        self.stale += 1
        if metrics[self.config.select] > self.best_score:
            self.best_score, self.stale = metrics[self.config.select], 0
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def best_ranker(self) -> DenseRanker:
        self.model.load_state_dict(self.best)
        return DenseRanker(self.model.eval(), self.config)

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

    def resume(self, folder: Path) -> None:
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
        _check_identity(path, counters.pop("identity", {}), self.identity)
        for name, value in counters.items():
            setattr(self, name, value)
        device = self.model.items.weight.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.model.load_state_dict(_with_prefix(tensors, "model."))
        self.best = _with_prefix(tensors, "best.")
        self.optimizer.load_state_dict(_optimizer_state(self.optimizer, _with_prefix(tensors, "optimizer.")))


def _checkpoint_file(folder: Path) -> Path:
    return folder / "checkpoint.safetensors"


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, object]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _check_identity(path: Path, stored: dict[str, object], current: dict[str, object]) -> None:
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
