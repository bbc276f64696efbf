"""LightGCN, trained with BPR on the training interactions only (CEMG paper §3.2.2; arXiv:2002.02126).

U users, N items, d embedding width. Every epoch draws from a generator seeded by (seed, epoch), so a run
is reproducible. Rows are gathered by ``index_select``: its gradient is summed in a fixed order, that of plain
indexing is not.

Several processes divide the columns of the embeddings. Propagation treats each column alone and Adam each
number, so only the scores, which are sums over columns, are exchanged. Each process has the whole graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.data.sequences import Sequences
from cemg.distributed import ALONE, World
from cemg.errors import UserError
from cemg.graph.config import GraphConfig
from cemg.progress import Log, console, track
from cemg.storage.checkpoint import Checkpoint, load_slots, slot_tensors, slots_of
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
    checkpoint: Checkpoint | None = None,
    world: World = ALONE,
) -> Collaborative:
    """Train item embeddings e_c with BPR. The log has ``graph/bpr`` and ``graph/l2`` per epoch.

    Args:
        train: The training items (catalog rows) of each of U users.
        num_items: N.
        config: Settings of the embeddings.
        device: "cpu" or a CUDA device.
        log: Receives the losses of every epoch.
        checkpoint: Of the main process: an interrupted training continues there, with the same result.
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
    training = _Training(len(train) + num_items, config, device, world, checkpoint)
    first = training.epoch
    for epoch in track(range(first, config.epochs), "LightGCN", done=first):
        batches = _batches(users, items, num_items, epoch, config)
        for triple in islice(batches, len(training.losses), None):
            losses = _step(training.table, graph, triple, len(train), config, training.optimizer, world)
            training.losses.append(losses)
            training.save_if_due()
        bpr, l2 = training.close_epoch()
        if log is not None:
            log(epoch, {"graph/bpr": bpr, "graph/l2": l2})
    table = training.table
    with torch.no_grad():
        own = lightgcn_propagate(graph, table, config.layers)[len(train) :].cpu()  # [N, columns]
    values = _all_columns(own, config.dim, world)  # [N, d]
    present = torch.zeros(num_items, dtype=torch.bool)
    present[items] = True
    return Collaborative(values * present[:, None], present)


class _Training:
    """The table in training, and its position. A checkpoint does not depend on the number of processes.

    Attributes:
        table: This process's columns of the embeddings, [U + N, columns].
        epoch: The current epoch, from 0.
        losses: bpr and this process's part of l2, [2] per step of the epoch.
    """

    def __init__(
        self, rows: int, config: GraphConfig, device: str, world: World, checkpoint: Checkpoint | None
    ) -> None:
        self.shape, self.world, self.checkpoint = (rows, config.dim), world, checkpoint
        self.epoch, self.losses = 0, list[Tensor]()
        own = self._resumed(device)
        table = own["table"] if own else _initial(rows, config, world)
        self.table = torch.nn.Parameter(table.to(device))
        self.optimizer = torch.optim.Adam([self.table], lr=config.learning_rate)
        if own:
            load_slots(self.optimizer, slots_of(own))

    def _resumed(self, device: str) -> dict[str, Tensor]:
        """This process's columns of the tensors in the checkpoint; empty if there is none."""
        whole: dict[str, Tensor] = {}

        def restore(tensors: dict[str, Tensor], state: dict[str, int]) -> None:
            self.epoch, self.losses = state["epoch"], list(tensors.pop("losses").to(device))
            whole.update(tensors)

        if self.checkpoint is not None and self.checkpoint.resume(dict[str, int], restore):
            place = f"epoch {self.epoch + 1}, after {len(self.losses)} steps"
            console.print(f"graph: resumed in {place}", highlight=False)
        self.epoch, steps = self.world.agree((self.epoch, len(self.losses)))
        if not self.world.main:  # the main process has the sums of all
            self.losses = list(torch.zeros(steps, 2, device=device))
        shapes = self.world.agree({name: tensor.shape for name, tensor in whole.items()})
        return {name: self._own(whole.get(name), shape) for name, shape in shapes.items()}

    def _own(self, whole: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """This process's columns of a table of the main process; other tensors as a whole."""
        if self.world.size == 1 and whole is not None:
            return whole
        if shape != self.shape:
            return self.world.broadcast(torch.empty(shape) if whole is None else whole)
        rows, dim = shape
        for rank, columns in enumerate(_columns(dim, self.world)):
            part = torch.empty(rows, len(columns))
            if whole is not None:
                part.copy_(whole[:, columns.start : columns.stop])
            self.world.broadcast(part)
            if rank == self.world.rank:
                own = part
        return own

    def save_if_due(self) -> None:
        """Write a checkpoint, if the main process's clock says so."""
        due = self.checkpoint is not None and self.checkpoint.due()
        if not self.world.totals([due])[0]:
            return
        whole = {"losses": self._all_losses()}
        state = self.optimizer.state_dict()["state"]
        for name, own in ({"table": self.table.detach()} | slot_tensors(state)).items():
            divided = own.shape == self.table.shape
            whole[name] = _all_columns(own.cpu(), self.shape[1], self.world, main=True) if divided else own
        if self.checkpoint is not None:
            self.checkpoint.save(whole, json.dumps({"epoch": self.epoch}))

    def close_epoch(self) -> list[float]:
        """Go on to the next epoch. Returns the means of bpr and l2 in this one."""
        means: list[float] = self._all_losses().mean(0).tolist()
        self.epoch, self.losses = self.epoch + 1, []
        return means

    def _all_losses(self) -> Tensor:
        """bpr and the whole l2 of the steps of the epoch, [steps, 2]."""
        losses = torch.stack(self.losses)
        losses[:, 1] = self.world.total(losses[:, 1].contiguous())
        return losses


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


def _all_columns(own: Tensor, dim: int, world: World, *, main: bool = False) -> Tensor:
    """The columns of all processes, [N, d]; with ``main``, only the main process keeps them."""
    if world.size == 1:
        return own
    parts = []
    for rank, columns in enumerate(_columns(dim, world)):
        part = own if rank == world.rank else own.new_empty(len(own), len(columns))
        world.broadcast(part.contiguous(), rank)
        if world.main or not main:
            parts.append(part)
    return torch.cat(parts, 1) if parts else own


def edges_of(train: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Users and items of all interactions, int64 [E] each, from the item sequence of each user."""
    sequences = Sequences.of(train)
    users = torch.repeat_interleave(torch.arange(len(train)), torch.from_numpy(sequences.lengths))
    return users, torch.from_numpy(sequences.flat().astype(np.int64))


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
