"""LightGCN, trained with BPR on the training interactions only (CEMG paper §3.2.2; arXiv:2002.02126).

U users, N items, d embedding width. Every epoch draws from a generator seeded by (seed, epoch), so a run
is reproducible. Rows are gathered by ``index_select``: its gradient is summed in a fixed order, that of plain
indexing is not.

Several processes divide the columns of the embeddings. Propagation treats each column alone and Adam each
number, so only the scores, which are sums over columns, are exchanged. Each process has the whole graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.distributed import ALONE, World
from cemg.errors import UserError
from cemg.graph.config import GraphConfig
from cemg.progress import Log, track
from cemg_kernels import BipartiteGraph, lightgcn_propagate

BLOCK = 65_536  # rows of the initial table that are drawn at once


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
    world: World = ALONE,
) -> Collaborative:
    """Train item embeddings e_c with BPR. The log has ``graph/bpr`` and ``graph/l2`` per epoch.

    Args:
        train: The training items (catalog rows) of each of U users.
        num_items: N.
        config: Settings of the embeddings.
        device: "cpu" or a CUDA device.
        log: Receives the losses of every epoch.
        world: The processes that divide the columns. All of them return all columns.

    Raises:
        UserError: There is no training interaction, or there are fewer columns than processes.
    """
    users, items = edges_of(train)
    if len(users) == 0:
        raise UserError(
            "there is no training interaction for the graph", fix="check the data: cemg-data stats"
        )
    check_columns(config, world)
    graph = BipartiteGraph.from_edges(users.to(device), items.to(device), len(train), num_items)
    table = torch.nn.Parameter(_initial(len(train) + num_items, config, world).to(device))
    optimizer = torch.optim.Adam([table], lr=config.learning_rate)
    for epoch in track(range(config.epochs), "LightGCN"):
        losses = [
            _step(table, graph, triple, len(train), config, optimizer, world)
            for triple in _batches(users, items, num_items, epoch, config)
        ]
        bpr, l2 = torch.stack(losses).mean(0).tolist()
        (l2,) = world.totals([l2])
        if log is not None:
            log(epoch, {"graph/bpr": bpr, "graph/l2": l2})
    with torch.no_grad():
        own = lightgcn_propagate(graph, table, config.layers)[len(train) :].cpu()  # [N, columns]
    values = _all_columns(own, config.dim, world)  # [N, d]
    present = torch.zeros(num_items, dtype=torch.bool)
    present[items] = True
    return Collaborative(values * present[:, None], present)


def check_columns(config: GraphConfig, world: World) -> None:
    """Raise UserError if there are more processes than columns of the embeddings."""
    if config.dim < world.size:
        raise UserError(
            f"graph.dim={config.dim} columns cannot be divided over {world.size} processes",
            fix=f"start at most {config.dim} processes, or increase graph.dim",
        )


def _initial(rows: int, config: GraphConfig, world: World) -> Tensor:
    """This process's columns of the initial embeddings, [rows, columns]. All processes draw all columns."""
    generator = torch.Generator().manual_seed(config.seed)
    own = _columns(config.dim, world)[world.rank]
    table = torch.empty(rows, len(own))
    starts = [*range(0, max(rows - BLOCK, 1), BLOCK), rows]  # the last block is not shorter than the others
    for start, end in pairwise(starts):
        block = torch.empty(end - start, config.dim).normal_(0, 0.1, generator=generator)
        table[start:end] = block[:, own[0] : own[-1] + 1]
    return table


def _columns(dim: int, world: World) -> list[range]:
    """The columns of each process."""
    ends = [dim * rank // world.size for rank in range(world.size + 1)]
    return [range(*ends_of) for ends_of in pairwise(ends)]


def _all_columns(own: Tensor, dim: int, world: World) -> Tensor:
    """The columns of all processes, [N, d]."""
    parts = []
    for rank, columns in enumerate(_columns(dim, world)):
        part = own if rank == world.rank else own.new_empty(len(own), len(columns))
        parts.append(world.broadcast(part.contiguous(), rank))
    return torch.cat(parts, 1)


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
    config: GraphConfig, optimizer: torch.optim.Optimizer, world: World,
) -> Tensor:  # fmt: skip
    """One BPR step on (user, positive item, negative item). Returns [bpr, own part of l2], detached."""
    user, positive, negative = (rows.to(table.device) for rows in triple)
    nodes = torch.cat((user, num_users + positive, num_users + negative))  # [3B]
    u, p, n = lightgcn_propagate(graph, table, config.layers).index_select(0, nodes).chunk(3)  # [B, d] each
    bpr = F.softplus(world.summed(((n - p) * u).sum(1))).mean()
    l2 = table.index_select(0, nodes).square().sum() / len(user)
    optimizer.zero_grad()
    (bpr + config.l2 * l2).backward()
    optimizer.step()
    return torch.stack((bpr, l2)).detach()
