"""GRU4Rec: a recurrent network over the history, trained with cross-entropy.

B samples, L positions, D item embedding, H state, N items, P targets. The state after an item predicts the
next one. The output table is that of the inputs.

Source: Hidasi et al., https://arxiv.org/abs/1511.06939, with the full softmax of later work (Petrov and
Macdonald, https://arxiv.org/abs/2208.00796) in place of their pairwise losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cemg.baselines.loop import LoopConfig, train
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Batch, Samples
from cemg.dense import linear_cross_entropy, pad_histories
from cemg.errors import UserError
from cemg.precision import product_dtype


@dataclass(frozen=True, slots=True)
class GRU4RecConfig(LoopConfig):
    """Settings of GRU4Rec; those that it shares with SASRec are explained at `DenseConfig`.

    Attributes:
        dim: Width of an item embedding.
        state: Width of the state.
        layers: Number of recurrent layers.
        dropout: Of the item embeddings.
        samples: "prefixes" has one sample per training item, predicted from the items before it. "positions"
            predicts all items of a user from one pass: faster epochs, but few steps where users are few.
    """

    dim: int = 64
    state: int = 128
    layers: int = 1
    dropout: float = 0.3
    samples: str = "prefixes"
    negatives: int = 2048
    max_length: int = 50
    products: str = "bfloat16"


class GRU4Rec(nn.Module):
    """The network. Scores are products of the projected state with the item embeddings."""

    def __init__(self, num_items: int, config: GRU4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(num_items, config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(config.dim, config.state, config.layers, batch_first=True)
        self.project = nn.Linear(config.state, config.dim)

    def states(self, items: Tensor) -> Tensor:
        """Return the projected state after each item, [B, L, D], of item rows [B, L] padded on the right."""
        states, _ = self.gru(self.dropout(self.items(items)))
        projected: Tensor = self.project(states)
        return projected

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean cross-entropy of the targets, over ``negatives`` random items and each target."""
        table, config = self.items.weight, self.config
        drawn = None
        if 0 < config.negatives < len(table):
            drawn = torch.randperm(len(table), generator=generator)[: config.negatives].to(table.device)
        states = self.states(batch.inputs)  # [B, L, D]
        if batch.every_position:
            states = states[batch.present]  # [P, D]
        else:
            states = states[torch.arange(len(states), device=states.device), batch.lengths - 1]
        dtype = product_dtype(config.products, table.device)
        return linear_cross_entropy(states, table, targets=batch.targets, negatives=drawn, dtype=dtype)

    @torch.inference_mode()
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return the score of each item, [B, N], after histories of item rows, oldest first, none empty."""
        device = self.items.weight.device
        items, lengths = pad_histories(histories, self.config.max_length)
        states = self.states(items.to(device))
        newest = states[torch.arange(len(states)), lengths.to(device) - 1]
        return newest @ self.items.weight.T

    def __call__(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Return the ``top`` best items of each history, [B, top], as `cemg.evaluation.evaluate` asks for."""
        scores = self.logits(histories)
        return scores.topk(min(top, scores.shape[1]), dim=1).indices


def fit(job: Job) -> Fitted:
    """Train on the training sequences."""
    config = job.config(GRU4RecConfig)
    split = job.data.split()
    make = Samples.positions if config.samples == "positions" else Samples.prefixes
    samples = make(list(split.train), config.max_length)
    if len(samples.starts) == 0:
        raise UserError(
            f"{job.data.name}: no user has two training items", fix="use data with longer histories"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GRU4Rec(job.data.num_items, config).to(job.device)
    log = train(
        model, samples, split, config=config, loss=model.loss, scorer=model, settings=asdict(config),
        folder=job.folder, budget=job.budget,
    )  # fmt: skip
    return Fitted.of_log(model, asdict(config), log, select=config.select)
