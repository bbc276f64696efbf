"""SASRec and BSARec: samples, losses and training.

B samples per batch, L positions, D embedding, N items, P targets.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.baselines.loop import LOG, train
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Batch, Samples
from cemg.data.dataset import Dataset, Split
from cemg.dense import DenseConfig, DenseRanker, SequenceEncoder, linear_cross_entropy
from cemg.errors import UserError
from cemg.precision import product_dtype

REDRAWS = 8  # of a negative that is in the user's own sequence, before it is kept
MAY_CHANGE = ("epochs", "patience")  # settings that may differ when a training at a constant rate is resumed


def train_dense(
    data: Dataset, config: DenseConfig, *, folder: Path, device: str = "cpu", progress: bool = True,
    budget: float | None = None,
) -> DenseRanker:  # fmt: skip
    """Train on the training part of the split: see `train` for files, resuming and errors.

    With ``folds`` > 1 the training leaves out the users of ``held_out_users``; validation is over all users.

    Returns:
        The ranker with the weights of the best epoch, which is saved in the folder, too.

    Raises:
        UserError: As `train`, or no user has two training items.
    """
    split = data.split()
    samples = training_samples(split, config)
    if len(samples.starts) == 0:
        raise UserError(f"{data.name}: no user has two training items", fix="use data with longer histories")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = SequenceEncoder(data.num_items, config).to(device)
    ranker = DenseRanker(model, config, str(split.fingerprint["targets_sha256"]))

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        return loss_of(model, batch, config=config, generator=generator)

    may_change = MAY_CHANGE if config.schedule == "constant" else ()
    settings = {name: value for name, value in asdict(config).items() if name not in may_change}
    train(
        model, samples, split, config=config, loss=loss, scorer=ranker, settings=settings, folder=folder,
        budget=budget, progress=progress,
    )  # fmt: skip
    ranker.save(folder)
    return ranker


def fit_sasrec(job: Job) -> Fitted:
    """Train SASRec by softmax cross-entropy, unless the job sets ``loss``."""
    return _fit(job, job.config(DenseConfig, model="sasrec"))


def fit_sasrec_bce(job: Job) -> Fitted:
    """Train SASRec by the binary cross-entropy of its paper."""
    return _fit(job, job.config(DenseConfig, model="sasrec", loss="bce"))


def fit_bsarec(job: Job) -> Fitted:
    """Train BSARec."""
    return _fit(job, job.config(DenseConfig, model="bsarec"))


def _fit(job: Job, config: DenseConfig) -> Fitted:
    ranker = train_dense(job.data, config, folder=job.folder, device=job.device, budget=job.budget)
    log = json.loads((job.folder / LOG).read_text(encoding="utf-8"))
    return Fitted.of_log(ranker, asdict(config), log, select=config.select)


def held_out_users(split: Split, config: DenseConfig) -> np.ndarray:
    """Return the users that a training leaves out, as positions in ``split.valid_users``.

    The folds are drawn by the seed 0, so the models of all folds, whatever their seed, cover each user once.
    """
    if config.folds == 1:
        return np.empty(0, dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(split.valid_users))
    return np.sort(order[config.fold :: config.folds])


def training_samples(split: Split, config: DenseConfig) -> Samples:
    """Collect the training samples of the users that are not left out."""
    sequences = list(split.train)
    for position in held_out_users(split, config):
        sequences[split.valid_users[position]] = np.empty(0, dtype=np.int32)
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
        dtype = product_dtype(config.products, table.device)
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
