"""The vectors of items after the graph of users and items, and their semantic IDs: the first part of MMGRec.

B interactions of a batch, U users, N items, D width of a vector, M codes of an ID, K codes per level.

Source: Liu et al., https://arxiv.org/abs/2404.16555
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.baselines.features import item_features
from cemg.baselines.loop import LoopConfig
from cemg.baselines.registry import Job
from cemg.errors import UserError
from cemg.features import Features
from cemg.graph.lightgcn import edges_of
from cemg.progress import track
from cemg.storage import files
from cemg.storage.read import parse_json, read_tensor_file
from cemg.tokenizer import Scaling, TokenizerConfig, make_unique
from cemg.tokenizer.training import train_tokenizer
from cemg_kernels import BipartiteGraph, lightgcn_propagate

IDS = "ids.safetensors"


@dataclass(frozen=True, slots=True)
class GraphIdsConfig(LoopConfig):
    """Settings of item vectors and IDs.

    Attributes:
        dim: Width of an item vector.
        modal_dim: Width of the projection of a text, and of that of an image, in it.
        graph_layers: Propagations over the graph.
        graph_epochs: Epochs of BPR, which stop when half of the budget is spent.
        graph_negatives: Random items per training interaction.
        graph_batch: Interactions per step of BPR.
        graph_rate: Learning rate of BPR.
        graph_decay: Weight decay of BPR.
        levels: Codes of an item before the last one.
        codes: Codes per level.
        latent: Width of the vector that is quantized.
        tokenizer_epochs: Epochs of the RQ-VAE.
    """

    dim: int = 64
    modal_dim: int = 16
    graph_layers: int = 2
    graph_epochs: int = 60
    graph_negatives: int = 5
    graph_batch: int = 4096
    graph_rate: float = 3e-3
    graph_decay: float = 1e-6
    levels: int = 3
    codes: int = 128
    latent: int = 16
    tokenizer_epochs: int = 200

    def __post_init__(self) -> None:
        if self.dim <= 2 * self.modal_dim:
            raise UserError(f"dim {self.dim} must be more than 2 * modal_dim, {2 * self.modal_dim}")


@dataclass(frozen=True, slots=True)
class GraphIds:
    """The vectors [N, D] and the codes [N, M] of items, and what their training took."""

    vectors: Tensor
    codes: Tensor
    seconds: float
    graph_epochs: float


def item_ids(job: Job, config: GraphIdsConfig) -> GraphIds:
    """Train the graph and the RQ-VAE, or read what an earlier training in the folder of the job has kept."""
    split, path = job.data.split(), job.folder / IDS
    names = {f.name for f in fields(GraphIdsConfig)} - {f.name for f in fields(LoopConfig)}
    about = {name: value for name, value in asdict(config).items() if name in names | {"seed"}}
    identity = json.dumps([about, split.fingerprint])
    fix = f"train into another folder, or delete {path}"
    if path.exists():
        tensors, known = read_tensor_file(path, fix=fix)
        if known.get("identity") != identity:
            raise UserError(f"{path} belongs to another run", fix=fix)
        spent = parse_json(known["spent"], dict[str, float], name=str(path), fix=fix)
    else:
        features, started = item_features(job), time.perf_counter()
        vectors, epochs = train_graph(features, split.train, config, device=job.device, budget=job.budget)
        codes = quantize(vectors, split.train_counts(job.data.num_items), config, device=job.device)
        spent = {"seconds": time.perf_counter() - started, "graph_epochs": epochs}
        tensors = {"vectors": vectors, "codes": codes}
        files.save_tensors(tensors, path, metadata={"identity": identity, "spent": json.dumps(spent)})
    return GraphIds(tensors["vectors"], tensors["codes"], spent["seconds"], spent["graph_epochs"])


class GraphItems(nn.Module):
    """The vectors of users and items before the graph: those of items are [text | image | learned]."""

    def __init__(self, features: dict[str, Features], num_users: int, config: GraphIdsConfig) -> None:
        super().__init__()
        scaled = {
            name: Scaling.of(one.values, one.present)(one.values) * one.width**0.5 * one.present[:, None]
            for name, one in features.items()
        }  # an item without a text or an image has zeros
        self.inputs = nn.ParameterDict({k: nn.Parameter(v, requires_grad=False) for k, v in scaled.items()})
        self.project = nn.ModuleDict()
        for name, value in scaled.items():
            project = nn.Linear(value.shape[1], config.modal_dim, bias=False)
            nn.init.normal_(project.weight, std=0.1 * value.shape[1] ** -0.5)
            self.project[name] = project
        num_items = len(next(iter(scaled.values())))
        learned = config.dim - config.modal_dim * len(scaled)
        self.items = nn.Parameter(torch.randn(num_items, learned) * 0.1)
        self.users = nn.Parameter(torch.randn(num_users, config.dim) * 0.1)

    def forward(self) -> Tensor:
        """[U + N, D]."""
        modal = [project(self.inputs[name]) for name, project in self.project.items()]
        return torch.cat([self.users, torch.cat([*modal, self.items], dim=1)])


def train_graph(
    features: dict[str, Features], train: Sequence[np.ndarray], config: GraphIdsConfig, *, device: str,
    budget: float | None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Train with BPR on the training interactions. Returns the item vectors [N, D] and the epochs."""
    users, items = edges_of(train)
    num_items = len(next(iter(features.values())).present)
    graph = BipartiteGraph.from_edges(users.to(device), items.to(device), len(train), num_items)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GraphItems(features, len(train), config).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.graph_rate, weight_decay=config.graph_decay,
    )  # fmt: skip
    until = time.perf_counter() + (float("inf") if budget is None else budget / 2)
    batches = (
        rows
        for _ in track(range(config.graph_epochs), "graph")
        for rows in torch.randperm(len(users), generator=generator).split(config.graph_batch)
    )
    done = 0
    for rows in batches:
        drawn = torch.randint(num_items, (len(rows), config.graph_negatives), generator=generator)
        chosen = torch.cat([items[rows, None], drawn], dim=1).to(device)  # [B, 1 + negatives]
        vectors = lightgcn_propagate(graph, model(), config.graph_layers)
        user = vectors.index_select(0, users[rows].to(device))  # [B, D]
        item = vectors.index_select(0, chosen.flatten() + len(train)).view(*chosen.shape, -1)
        scores = (item @ user[:, :, None])[..., 0]  # [B, 1 + negatives]
        loss = F.softplus(scores[:, 1:] - scores[:, :1]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done += len(rows)
        if time.perf_counter() > until:
            break
    with torch.no_grad():
        vectors = lightgcn_propagate(graph, model(), config.graph_layers)[len(train) :].cpu()
    return vectors, done / len(users)


def quantize(vectors: Tensor, counts: np.ndarray, config: GraphIdsConfig, *, device: str) -> Tensor:
    """Return different codes [N, M] for all items, from their vectors [N, D] and their popularity [N]."""
    none, everyone = torch.zeros(len(vectors), dtype=torch.bool), torch.ones(len(vectors), dtype=torch.bool)
    blank = torch.zeros(len(vectors), 1)
    tokenizer = train_tokenizer(
        {"image": blank, "text": blank, "collab": vectors},
        {"image": none, "text": none, "collab": everyone},
        config=TokenizerConfig(
            levels=config.levels, codebook_size=config.codes, fusion="concat", dim=1, latent=config.latent,
            hidden=(config.dim,), epochs=config.tokenizer_epochs, seed=config.seed,
        ),
        device=device,
    )  # fmt: skip
    data = {"image": blank, "text": blank, "collab": vectors}
    items = tokenizer.features(data, {"image": none, "text": none, "collab": everyone})
    codes, z = (part.cpu() for part in tokenizer.tokenize(items.to(device)))
    order = torch.from_numpy(np.argsort(-counts, kind="stable"))
    codebooks = tokenizer.model.codebooks.detach().cpu()
    unique = torch.empty(len(codes), config.levels + 1, dtype=torch.int64)
    unique[order] = make_unique(codes[order], z[order], codebooks, method="suffix").codes
    return unique
