"""Training of SASRec, with early stopping and checkpoints.

B users, L positions, D embedding, N items, P valid positions. A resumed training gives the same weights as an
uninterrupted one. No state of a random generator is stored: the order of an epoch is drawn from
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

from cemg.baselines.cross_entropy import linear_cross_entropy
from cemg.baselines.sasrec import PRODUCTS, Sasrec, SasrecConfig, SasrecRanker
from cemg.baselines.sequences import Batch, num_batches, training_batches
from cemg.data.dataset import Dataset, Split
from cemg.errors import DamagedError, UserError
from cemg.evaluation import evaluate, seeded_sample
from cemg.progress import console
from cemg.storage import files
from cemg.storage.read import parse_json, read_tensor_file, tensors_digest

BETAS = (0.9, 0.98)  # of Adam, as in the code of the SASRec paper
REDRAWS = 8  # of a negative that is in the user's own sequence, before it is kept
MAY_CHANGE = ("epochs", "patience")  # settings that may differ when a training is resumed


def train_sasrec(
    data: Dataset, config: SasrecConfig, *, folder: Path, device: str = "cpu", progress: bool = True
) -> SasrecRanker:
    """Train on the training part of the leave-one-out split.

    Writes ``checkpoint.safetensors`` after every epoch, and ``sasrec.safetensors`` and ``log.json`` at the
    end. The same call resumes at the checkpoint.

    Returns:
        The ranker with the weights of the best epoch.

    Raises:
        UserError: The folder has a checkpoint of other settings or of another split, no user has two
            training items, or the loss is not finite.
    """
    split = data.split()
    if num_batches(split.train, config.batch_size) == 0:
        raise UserError(f"{data.name}: no user has two training items", fix="use data with longer histories")
    training = _Training.start(data.num_items, config, split, torch.device(device))
    training.resume(folder)
    while training.epoch < config.epochs and training.stale < config.patience:
        training.train_epoch(split)
        training.validate(split)
        training.checkpoint(folder)
        if progress:
            _print_epoch(training.log[-1])
    files.write_json(folder / "log.json", training.log)
    ranker = training.best_ranker()
    ranker.save(folder)
    return ranker


def loss_of(model: Sasrec, batch: Batch, *, config: SasrecConfig, generator: torch.Generator) -> Tensor:
    """Compute the loss, averaged over the P valid positions. ``generator`` (CPU) draws the negatives."""
    states = model(batch.inputs)[batch.valid]  # [P, D]
    targets = batch.targets[batch.valid]  # [P]
    table = model.items.weight
    if config.loss == "ce":
        return linear_cross_entropy(states, table, targets=targets, dtype=PRODUCTS[config.products])
    negatives = draw_negatives(batch, len(table), generator=generator)  # [P]
    positive, negative = (states * table[targets]).sum(1), (states * table[negatives]).sum(1)  # [P] logits
    return (F.softplus(-positive) + F.softplus(negative)).mean()


def draw_negatives(batch: Batch, num_items: int, *, generator: torch.Generator) -> Tensor:
    """Draw an item that is not in the user's sequence for each valid position, uniformly; [P] int64.

    An item that is still in the sequence after REDRAWS draws is kept: a user may have almost all items.
    """
    rows = batch.valid.nonzero()[:, 0]  # [P] the user of each position
    oldest = batch.inputs[:, :1]
    sequences = torch.cat([oldest, torch.where(batch.valid, batch.targets, oldest)], dim=1)  # [B, L + 1]
    negatives = torch.randint(num_items, (len(rows),), generator=generator).to(rows.device)
    for _ in range(REDRAWS):
        in_sequence = (negatives[:, None] == sequences[rows]).any(1)
        redrawn = torch.randint(num_items, (len(rows),), generator=generator).to(rows.device)
        negatives = torch.where(in_sequence, redrawn, negatives)
    return negatives


@dataclass(slots=True)
class _Training:
    """The state of a training, which a checkpoint stores."""

    model: Sasrec
    optimizer: torch.optim.Optimizer
    config: SasrecConfig
    identity: dict[str, object]  # settings and split, which a checkpoint must have in common
    epoch: int = 0
    stale: int = 0  # epochs since the best one
    best_score: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, num_items: int, config: SasrecConfig, split: Split, device: torch.device) -> _Training:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = Sasrec(num_items, config).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=BETAS,
            fused=True,
        )
        settings = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
        return cls(model, optimizer, config, {"config": settings, "split": split.fingerprint})

    def train_epoch(self, split: Split) -> None:
        """Train on every user once. Appends the mean loss over positions and the seconds to the log."""
        started, total, positions = time.perf_counter(), 0.0, 0
        config, device = self.config, self.model.items.weight.device
        step = self.epoch * num_batches(split.train, config.batch_size)
        rng = np.random.default_rng((config.seed, self.epoch))
        self.model.train()
        batches = training_batches(split.train, config.batch_size, max_length=config.max_length, rng=rng)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for number, batch in enumerate(batches, start=step):
                loss = self._step(batch.to(device), number)
                count = int(batch.valid.sum())
                total, positions = total + loss * count, positions + count
        self.epoch += 1
        record = {"loss": total / positions, "train_seconds": time.perf_counter() - started}
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
        """Evaluate the sampled validation users, and keep the weights if NDCG@10 is the best so far."""
        self.model.eval()
        users = seeded_sample(split, self.config.valid_users, self.config.seed)
        ranker = SasrecRanker(self.model, self.config)
        metrics = evaluate(
            ranker, split, part="valid", cutoffs=(10,), users=users, max_list=10, progress=False
        ).metrics
        self.log[-1] |= {f"valid_{k}": v for k, v in metrics.items()}
        self.stale += 1
        if metrics["NDCG@10"] > self.best_score:
            self.best_score, self.stale = metrics["NDCG@10"], 0
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def best_ranker(self) -> SasrecRanker:
        self.model.load_state_dict(self.best)
        return SasrecRanker(self.model.eval(), self.config)

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
