"""Training of a language model that ranks lettered candidates: one epoch, cross-entropy over the letters.

The candidates are the next item of a training sequence and random items. A step depends on the seed and its
number alone, so that an interrupted training continues with the same weights.

B prompts, C candidates.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.baselines.letters import LetterConfig, Ranker, parts_of
from cemg.baselines.loop import check_identity, optimizer_state, with_prefix
from cemg.baselines.samples import Samples
from cemg.errors import DamagedError, UserError
from cemg.progress import console
from cemg.storage import files
from cemg.storage.read import parse_json, read_tensor_file, tensors_digest

CHECKPOINT, EVERY = "ranker.safetensors", 300.0  # seconds of training between two checkpoints
STATE = ("step", "losses", "seconds", "tokens", "identity")


@dataclass(slots=True)
class Training:
    """One epoch over the training samples, in steps that depend on nothing but the seed and their number."""

    ranker: Ranker
    samples: Samples
    config: LetterConfig
    identity: dict[str, object]  # settings and split, which a checkpoint must have in common
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    share: float = 0.0  # of the epoch

    def run(self, folder: Path, budget: float | None) -> None:
        """Train to the end of the epoch or of the budget, with a checkpoint every few minutes."""
        optimizer = torch.optim.AdamW(
            self.ranker.trained().values(), lr=self.config.learning_rate, weight_decay=0.0
        )
        self.resume(folder, optimizer)
        total, saved = self.samples.num_batches(self.config.batch_size), self.seconds
        order = np.random.default_rng(self.config.seed).permutation(len(self.samples.starts))
        while self.step < total and (budget is None or self.seconds < budget):
            started, before = time.perf_counter(), self.ranker.tokens
            rows = order[self.step * self.config.batch_size :][: self.config.batch_size]
            self.losses.append(self.train_step(rows, optimizer))
            self.step += 1
            self.seconds += time.perf_counter() - started
            self.tokens += self.ranker.tokens - before
            if self.seconds - saved >= EVERY:
                saved = self.seconds
                self.save(folder, optimizer)
                report(self, total)
        self.save(folder, optimizer)
        self.share = self.step / total

    def train_step(self, rows: np.ndarray, optimizer: torch.optim.Optimizer) -> float:
        """One step on some samples; returns the mean loss."""
        rng = np.random.default_rng((self.config.seed, self.step))
        prompts, targets = self.draw(rows, rng)
        self.ranker.model.train()
        loss = 0.0
        with torch.random.fork_rng(devices=[self.ranker.device] if "cuda" in self.ranker.device else []):
            torch.manual_seed(int(rng.integers(2**62)))
            for part in parts_of(prompts):
                logits = self.ranker.logits([prompts[row] for row in part])
                labels = targets[part].to(logits.device)
                entropy = F.cross_entropy(logits, labels, reduction="sum") / len(rows)
                entropy.backward()
                loss += float(entropy.detach())
        if not np.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step}", fix="lower the learning rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[list[list[int]], Tensor]:
        """Prompts of samples, and the place of the target among random items that are not in its history."""
        prompts, num_items = [], len(self.ranker.prompts.titles)
        places = rng.integers(self.config.candidates, size=len(rows))
        for at, row in enumerate(rows):
            first, length = self.samples.starts[row], self.samples.lengths[row]
            history, target = self.samples.items[first : first + length], self.samples.items[first + length]
            others = rng.permutation(num_items)[: self.config.candidates + length]
            others = others[~np.isin(others, [*history, target])][: self.config.candidates - 1]
            places[at] = min(places[at], len(others))  # in a small catalog
            candidates = np.insert(others, places[at], target).tolist()
            prompts.append(self.ranker.prompts.prompt(history, candidates))
        return prompts, torch.from_numpy(places)

    def save(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Write the trained weights and the state of the optimizer, atomically."""
        tensors = {f"model.{k}": v.detach().cpu() for k, v in self.ranker.trained().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v.cpu() for k, v in state.items()}
        about = {name: getattr(self, name) for name in STATE}
        text = json.dumps(about)
        metadata = {"run": text, "sha256": tensors_digest(tensors, text)}
        files.save_tensors(tensors, folder / CHECKPOINT, metadata=metadata)

    def resume(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Load the checkpoint of the folder, if it has one. Raises UserError where it is of another run."""
        path = folder / CHECKPOINT
        if not path.exists():
            return
        fix = f"delete {path} and run the same command again: the training starts from the beginning"
        tensors, about = read_tensor_file(path, finite=False, fix=fix)
        if tensors_digest(tensors, about.get("run", "")) != about.get("sha256"):
            raise DamagedError(f"{path} is damaged", fix=fix)
        state = parse_json(about["run"], dict[str, Any], name=f"the state in {path}", fix=fix)
        check_identity(path, state.pop("identity"), self.identity)
        for name, value in state.items():
            setattr(self, name, value)
        with torch.no_grad():
            for name, value in with_prefix(tensors, "model.").items():
                self.ranker.trained()[name].copy_(value)
        optimizer.load_state_dict(optimizer_state(optimizer, with_prefix(tensors, "optimizer.")))


def report(training: Training, total: int) -> None:
    """Print how far a training is."""
    recent = training.losses[-20:]
    console.print(
        f"step {training.step:,} of {total:,}  loss {sum(recent) / len(recent):.4f}  "
        f"{training.tokens / training.seconds:,.0f} tokens/s",
        highlight=False,
    )
