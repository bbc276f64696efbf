"""MMGRec: semantic IDs from the graph of users and items, generated from the set of a user's items.

1. The frozen text and image vectors of an item are projected and concatenated with a learned vector. Graph
   convolution over the training interactions, trained with BPR, gives the vector of each item.
2. An RQ-VAE quantizes it to three codes. A last code tells items with the same codes apart, the most popular
   item first.
3. A transformer reads the items of a history without their order, and generates the codes of the next item.
   In its encoder, the user scales a second attention between the items (relation-aware attention).

B samples, L items of a history, D width, H heads, N items, M codes of an ID, K codes per level, W beams,
T codes of one.

Source: Liu et al., https://arxiv.org/abs/2404.16555. They evaluate a set-to-item model on a random split;
here it is leave-one-out, and an item is predicted from those before it. More in docs/training.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.baselines.graph_ids import GraphIdsConfig, item_ids
from cemg.baselines.loop import train
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Batch, Samples
from cemg.dense import pad_histories
from cemg.errors import UserError
from cemg.evaluation import Sample
from cemg.storage.read import tensors_digest

ROWS = 64  # histories of one search
NOT_FOUND = -1e6  # the score of an item that no beam found, less its row
Keys = tuple[Tensor, Tensor]  # keys and values of an attention


@dataclass(frozen=True, slots=True)
class MMGRecConfig(GraphIdsConfig):
    """Settings of MMGRec; those of the loop are explained at `DenseConfig`, the others at `GraphIdsConfig`.

    Attributes:
        layers: Layers of the encoder, and of the decoder.
        heads: Attention heads.
        inner: Width of the hidden layer of a feed-forward network.
        dropout: Of inputs and sublayers.
        frozen: Whether the encoder reads the vectors of the graph as they are, or trains them further.
        max_length: Number of the newest items of a history that the encoder reads.
        beams: Beams of the search, and so the length of a list. The original has 10.
        trie: Whether the search is restricted to the IDs of items, which the original's is not.
        valid_users: Validation users that select the epoch, a seeded sample; 0 means all.
    """

    learning_rate: float = 3e-3
    layers: int = 2
    heads: int = 4
    inner: int = 256
    dropout: float = 0.2
    frozen: bool = True
    max_length: int = 50
    beams: int = 50
    trie: bool = True
    valid_users: int = 2000

    def __post_init__(self) -> None:
        GraphIdsConfig.__post_init__(self)
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.beams < 20:
            raise UserError(
                f"beams must be 20 or more, got {self.beams}", cause="a list has an item per beam"
            )


class Attention(nn.Module):
    """Multi-head attention. With ``gate`` [B] of the user, a second attention is added, scaled by it."""

    def __init__(self, config: MMGRecConfig, *, relation: bool = False) -> None:
        super().__init__()
        self.heads, self.parts = config.heads, 2 if relation else 1
        self.query, self.key, self.value = (nn.Linear(config.dim, self.parts * config.dim) for _ in range(3))
        self.out = nn.Linear(config.dim, config.dim)

    def split(self, x: Tensor, linear: nn.Module, gate: Tensor | None) -> Tensor:
        """[parts, B, H, L, D / H]; the second part is multiplied by the gate."""
        parts: Tensor = linear(x).unflatten(2, (self.parts, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return parts if gate is None else torch.stack([parts[0], parts[1] * gate[:, None, None, None]])

    def keys(self, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys [B, H, L, ·] and values [B, H, L, D / H] of vectors [B, L, D]."""
        return torch.cat([*self.split(x, self.key, gate)], dim=3), self.split(x, self.value, gate).sum(0)

    def forward(
        self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None, gate: Tensor | None = None
    ) -> Tensor:
        """[B, L, D]. ``mask`` is True where a query may read a key."""
        query = torch.cat([*self.split(x, self.query, gate)], dim=3)
        scale = (x.shape[2] // self.heads) ** -0.5  # the products of both attentions are added
        read = F.scaled_dot_product_attention(query, *keys, attn_mask=mask, scale=scale)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """A layer of the encoder, or of the decoder, which reads the encoder too."""

    def __init__(self, config: MMGRecConfig, *, decoder: bool) -> None:
        super().__init__()
        self.own = Attention(config, relation=not decoder)
        self.cross = Attention(config) if decoder else None
        wide = nn.Linear(config.dim, config.inner), nn.ReLU(), nn.Linear(config.inner, config.dim)
        self.feed_forward = nn.Sequential(*wide)
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(3 if decoder else 2))
        self.dropout = nn.Dropout(config.dropout)

    def memory(self, x: Tensor) -> Keys:
        """Keys and values of the encoder's output [B, L, D], for the decoder."""
        assert self.cross is not None
        return self.cross.keys(x)

    def encode(self, x: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D]; ``mask`` [B, 1, 1, L]."""
        x = self.norms[0](x + self.dropout(self.own(x, self.own.keys(x, gate), mask, gate)))
        return self._wide(x)

    def decode(self, x: Tensor, past: Keys | None, memory: Keys, mask: Tensor) -> tuple[Tensor, Keys]:
        """[B, W, T, D] of new codes, which read those before them in their beam, and the encoder.

        ``past`` has the keys of earlier codes, [B W, H, ·, D / H]; the result has those of the new ones, too.
        """
        assert self.cross is not None
        flat = x.flatten(0, 1)  # [B W, T, D]
        keys, causal = self.own.keys(flat), None
        if past is None:
            causal = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril()
        else:
            keys = torch.cat([past[0], keys[0]], dim=2), torch.cat([past[1], keys[1]], dim=2)
        own = self.own(flat, keys, causal).view(x.shape)
        read = self.norms[0](x + self.dropout(own)).flatten(1, 2)  # [B, W T, D]
        read = self.norms[2](read + self.dropout(self.cross(read, memory, mask)))
        return self._wide(read).view(x.shape), keys

    def _wide(self, x: Tensor) -> Tensor:
        out: Tensor = self.norms[1](x + self.dropout(self.feed_forward(x)))
        return out


def layers_of(stack: nn.ModuleList) -> list[Layer]:
    """The layers, typed."""
    return cast("list[Layer]", list(stack))


class MMGRec(nn.Module):
    """The transformer, and the search. Each level has its own codes and its own softmax."""

    ids: Tensor

    def __init__(self, vectors: Tensor, codes: Tensor, config: MMGRecConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = [int(level.max()) + 1 for level in codes.T]
        self.first = np.cumsum(
            [0, *self.sizes]
        ).tolist()  # the token of code 0 of each level; then that of BOS
        self.register_buffer("ids", codes + torch.tensor(self.first[:-1]), persistent=False)  # [N, M]
        self.items = nn.Embedding.from_pretrained(vectors / vectors.std(), freeze=config.frozen)
        self.gate = nn.Linear(config.dim, 1, bias=False)
        self.tokens = nn.Embedding(self.first[-1] + 1, config.dim)
        nn.init.normal_(self.tokens.weight, std=config.dim**-0.5)
        self.positions = nn.Parameter(torch.zeros(codes.shape[1], config.dim))
        self.encoder = nn.ModuleList(Layer(config, decoder=False) for _ in range(config.layers))
        self.decoder = nn.ModuleList(Layer(config, decoder=True) for _ in range(config.layers))
        self.head = nn.Linear(config.dim, self.first[-1])
        self.dropout = nn.Dropout(config.dropout)
        for level, table in enumerate(children_of(codes)):
            self.register_buffer(f"children_{level}", table, persistent=False)

    def encode(self, items: Tensor, lengths: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of each layer of the decoder for items [B, L], and which items are there."""
        present = torch.arange(items.shape[1], device=items.device) < lengths[:, None]  # [B, L]
        x = self.items(items)
        user = (x * present[..., None]).sum(1) / lengths[:, None]  # [B, D]
        gate, mask = self.gate(user)[:, 0], present[:, None, None, :]
        x = self.dropout(x)
        for layer in layers_of(self.encoder):
            x = layer.encode(x, gate, mask)
        return [layer.memory(x) for layer in layers_of(self.decoder)], mask

    def states(
        self, tokens: Tensor, memory: list[Keys], mask: Tensor, past: list[Keys] | None = None
    ) -> tuple[Tensor, list[Keys]]:
        """The states [B, W, T, D] after tokens [B, W, T], which continue ``past``, and the keys per layer."""
        begin = 0 if past is None else past[0][0].shape[2]
        x = self.dropout(self.tokens(tokens) + self.positions[begin : begin + tokens.shape[2]])
        found = []
        for number, layer in enumerate(layers_of(self.decoder)):
            x, keys = layer.decode(x, None if past is None else past[number], memory[number], mask)
            found.append(keys)
        return x, found

    def log_probs(self, states: Tensor, level: int) -> Tensor:
        """[..., K] of the codes of a level."""
        part = slice(self.first[level], self.first[level + 1])
        return F.linear(states, self.head.weight[part], self.head.bias[part]).log_softmax(-1)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean over the samples of the cross-entropy of all codes."""
        ids = self.ids[batch.targets]  # [B, M]
        inputs = F.pad(ids[:, :-1], (1, 0), value=self.first[-1])
        states, _ = self.states(inputs[:, None], *self.encode(batch.inputs, batch.lengths))
        states = states[:, 0]  # [B, M, D]
        found = [
            self.log_probs(states[:, level], level).gather(1, ids[:, level, None] - self.first[level])
            for level in range(ids.shape[1])
        ]
        return -torch.cat(found, dim=1).sum(1).mean()

    @torch.inference_mode()
    def search(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Beam search: the items [B, W], best first and -1 for an ID of no item, and their scores."""
        items, lengths = pad_histories(histories, self.config.max_length)
        memory, mask = self.encode(items.to(self.ids.device), lengths.to(self.ids.device))
        scores = torch.zeros(len(histories), 1, device=self.ids.device)  # [B, W]
        nodes = torch.zeros_like(scores, dtype=torch.int64)  # [B, W] of the trie, -1 outside
        tokens, past = torch.full_like(nodes, self.first[-1]), None
        for level, size in enumerate(self.sizes):
            states, past = self.states(tokens[:, :, None], memory, mask, past)
            log_probs = self.log_probs(states[:, :, 0], level)  # [B, W, K]
            children = self.get_buffer(f"children_{level}")[nodes]  # [B, W, K]
            if self.config.trie:
                log_probs = log_probs.masked_fill(children < 0, float("-inf"))
            total = (scores[:, :, None] + log_probs).flatten(1)
            scores, best = total.topk(min(self.config.beams, total.shape[1]), dim=1)
            nodes, tokens = children.flatten(1).gather(1, best), best % size + self.first[level]
            parents = best // size + torch.arange(len(best), device=best.device)[:, None] * states.shape[1]
            past = [(keys[parents.flatten()], values[parents.flatten()]) for keys, values in past]
        return nodes.masked_fill(scores.isneginf(), -1), scores

    @torch.inference_mode()
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Scores [B, N] for validation: an item that no beam found comes after all others."""
        items, scores = self.search(histories)
        rest = NOT_FOUND - torch.arange(len(self.ids), device=items.device)
        logits = torch.cat([rest, rest[:1]]).repeat(len(histories), 1)  # [B, N + 1]
        return logits.scatter_(1, torch.where(items < 0, len(self.ids), items), scores)[:, :-1]

    def __call__(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Return the best items of each history, [B, min(top, W)], filled with -1."""
        parts = [self.search(histories[i : i + ROWS])[0] for i in range(0, len(histories), ROWS)]
        return torch.cat(parts)[:, :top]


def children_of(codes: Tensor) -> list[Tensor]:
    """The trie of the IDs [N, M]: per level, the next node [nodes + 1, K] of each code, -1 for none.

    The nodes of the last level are item rows. The last row of a table is that of node -1.
    """
    tables, nodes = [], torch.zeros(len(codes), dtype=torch.int64)
    for level in range(codes.shape[1]):
        following = codes[:, : level + 1].unique(dim=0, return_inverse=True)[1]
        if level == codes.shape[1] - 1:
            following = torch.arange(len(codes))
        table = torch.full((int(nodes.max()) + 2, int(codes[:, level].max()) + 1), -1)
        table[nodes, codes[:, level]] = following
        tables.append(table)
        nodes = following
    return tables


def fit(job: Job) -> Fitted:
    """Train on the training sequences."""
    config = job.config(MMGRecConfig)
    split = job.data.split()
    samples = Samples.prefixes(list(split.train), config.max_length)
    if len(samples.starts) == 0:
        raise UserError(
            f"{job.data.name}: no user has two training items", fix="use data with longer histories"
        )
    ids = item_ids(job, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MMGRec(ids.vectors, ids.codes, config).to(job.device)
    digest = tensors_digest({"vectors": ids.vectors, "codes": ids.codes})
    log = train(
        model, samples, split, config=config, loss=model.loss, scorer=model,
        settings=asdict(config) | {"ids": digest}, folder=job.folder,
        budget=None if job.budget is None else max(job.budget - ids.seconds, 1e-9),
        valid_users=Sample(config.valid_users).rows(len(split.valid_users)) if config.valid_users else None,
    )  # fmt: skip
    about = {"ids_seconds": round(ids.seconds, 1), "graph_epochs_run": round(ids.graph_epochs, 2)}
    about |= asdict(config) | {"model": "mmgrec", "last_codes": model.sizes[-1]}
    return Fitted.of_log(model, about, log, select=config.select)
