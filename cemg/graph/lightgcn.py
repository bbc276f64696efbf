"""LightGCN, trained with BPR on the training interactions only (CEMG paper §3.2.2; arXiv:2002.02126).

U users, N items, d embedding width. Every epoch draws from a generator seeded by (seed, epoch), so a run
is reproducible. Rows are gathered by ``index_select``: its gradient is summed in a fixed order, that of plain
indexing is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.errors import UserError
from cemg.graph.config import GraphConfig
from cemg.progress import Log, track
from cemg_kernels import BipartiteGraph, lightgcn_propagate


@dataclass(frozen=True, slots=True)
class Collaborative:
    """Collaborative embeddings of N items.

    Attributes:
        values: [N, d] float32.
        present: [N] bool; False for an item without training interactions.
    """

    values: Tensor
    present: Tensor


def train_lightgcn(
    train: Sequence[np.ndarray],
    num_items: int,
    *,
    config: GraphConfig,
    device: str = "cpu",
    log: Log | None = None,
) -> Collaborative:
    """Train item embeddings e_c with BPR. The log has ``graph/bpr`` and ``graph/l2`` per epoch.

    Args:
        train: The training items (catalog rows) of each of U users.
        num_items: N.
        config: Settings of the embeddings.
        device: "cpu" or a CUDA device.
        log: Receives the losses of every epoch.

    Raises:
        UserError: There is no training interaction.
    """
    users, items = edges_of(train)
    if len(users) == 0:
        raise UserError(
            "there is no training interaction for the graph", fix="check the data: cemg-data stats"
        )
    graph = BipartiteGraph.from_edges(users.to(device), items.to(device), len(train), num_items)
    generator = torch.Generator().manual_seed(config.seed)
    table = torch.empty(len(train) + num_items, config.dim)  # [U + N, d]
    table = torch.nn.Parameter(table.normal_(0, 0.1, generator=generator).to(device))
    optimizer = torch.optim.Adam([table], lr=config.learning_rate)
    for epoch in track(range(config.epochs), "LightGCN"):
        losses = [
            _step(table, graph, triple, len(train), config, optimizer)
            for triple in _batches(users, items, num_items, epoch, config)
        ]
        if log is not None:
            bpr, l2 = torch.stack(losses).mean(0).tolist()
            log(epoch, {"graph/bpr": bpr, "graph/l2": l2})
    with torch.no_grad():
        values = lightgcn_propagate(graph, table, config.layers)[len(train) :].cpu()  # [N, d]
    present = torch.zeros(num_items, dtype=torch.bool)
    present[items] = True
    return Collaborative(values * present[:, None], present)


def edges_of(train: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Users and items of all interactions, int64 [E] each, from the item sequence of each user."""
    lengths = torch.tensor([len(s) for s in train], dtype=torch.int64)
    users = torch.repeat_interleave(torch.arange(len(train)), lengths)
    items = torch.from_numpy(np.concatenate(train).astype(np.int64)) if len(train) else users
    return users, items


def _batches(
    users: Tensor, items: Tensor, num_items: int, epoch: int, config: GraphConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(len(users), generator=generator)
    negatives = torch.randint(num_items, (len(users),), generator=generator)
    for rows, negative in zip(
        order.split(config.batch_size), negatives.split(config.batch_size), strict=True
    ):
        yield users[rows], items[rows], negative


def _step(
    table: Tensor, graph: BipartiteGraph, triple: tuple[Tensor, Tensor, Tensor], num_users: int,
    config: GraphConfig, optimizer: torch.optim.Optimizer,
) -> Tensor:  # fmt: skip
    """One BPR step on (user, positive item, negative item). Returns [bpr, l2], detached."""
    user, positive, negative = (rows.to(table.device) for rows in triple)
    nodes = torch.cat((user, num_users + positive, num_users + negative))  # [3B]
    u, p, n = lightgcn_propagate(graph, table, config.layers).index_select(0, nodes).chunk(3)  # [B, d] each
    bpr = F.softplus(((n - p) * u).sum(1)).mean()
    l2 = table.index_select(0, nodes).square().sum() / len(user)
    optimizer.zero_grad()
    (bpr + config.l2 * l2).backward()
    optimizer.step()
    return torch.stack((bpr, l2)).detach()
