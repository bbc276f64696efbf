"""Three layers of LightGCN propagation, forward and backward, against PyG and sparse products.

    python bench/propagate.py [--data data/beauty] [--device cuda] [--json PATH] [--plot PATH]

Drawn edges of the size of two public sets; ``--data`` adds the training edges of a set of one's own. On a GPU
the other backends are timed too, and bfloat16 tables, within the bound of what these round.

"floor": the bytes that cannot be saved, at the machine's copy bandwidth. Edges and table are read
and the table written once; a layer after the first does so with what of them is beyond the last cache; each
layer gathers again the rows of a table larger than that cache, were the most gathered kept there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Report, Work, arguments, checked, copy_bandwidth, last_cache, optional, start
from torch import Tensor

from cemg_kernels import BipartiteGraph, lightgcn_propagate
from cemg_kernels.runtime import dispatch

Operator = Callable[[Tensor], Tensor]
LAYERS, DIM = 3, 64
BFLOAT16 = "triton, bfloat16 tables"
SHAPES = {"Gowalla-shaped": (29_858, 40_981, 1_027_370), "Beauty-shaped": (22_363, 12_101, 153_776)}


def draw(users: int, items: int, edges: int) -> tuple[Tensor, Tensor]:
    """Edges whose items follow a power law, as those of real sets do."""
    generator = torch.Generator().manual_seed(0)
    popularity = 1 / torch.arange(1, items + 1).double().pow(0.7)
    chosen = torch.multinomial(popularity, edges, replacement=True, generator=generator)
    return torch.randint(users, (edges,), generator=generator), chosen


def sparse_matrix(graph: BipartiteGraph) -> Tensor:
    """The normalised adjacency as torch CSR."""
    degree = graph.row_ptr.diff()
    row = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree)
    values = graph.inv_sqrt_degree[row] * graph.inv_sqrt_degree[graph.neighbours]
    size = (len(degree), len(degree))
    return torch.sparse_csr_tensor(graph.row_ptr.int(), graph.neighbours.int(), values, size)


def mean_of_layers(multiply: Operator, x: Tensor) -> Tensor:
    total = layer = x
    for _ in range(LAYERS):
        layer = multiply(layer)
        total = total + layer
    return total / (LAYERS + 1)


def pyg(graph: BipartiteGraph) -> Operator | str:
    """``LGConv`` of PyG, its default scatter over an edge index."""
    missing = optional(["torch-geometric"])
    if missing:
        return missing
    from torch_geometric.nn import LGConv

    degree = graph.row_ptr.diff()
    row = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree)
    edges, layer = torch.stack((graph.neighbours, row)), LGConv().to(degree.device)
    return lambda x: mean_of_layers(lambda y: layer(y, edges), x)


def bag(graph: BipartiteGraph) -> Operator:
    """``embedding_bag`` with the edge values as weights."""
    degree = graph.row_ptr.diff()
    row = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree)
    weights = graph.inv_sqrt_degree[row] * graph.inv_sqrt_degree[graph.neighbours]

    def multiply(y: Tensor) -> Tensor:
        return F.embedding_bag(graph.neighbours, y, graph.row_ptr, mode="sum", per_sample_weights=weights,
                               include_last_offset=True)  # fmt: skip

    return lambda x: mean_of_layers(multiply, x)


def scipy_csr(graph: BipartiteGraph, matrix: Tensor) -> Operator | str:
    if graph.device.type != "cpu":
        return "scipy runs on the CPU only"
    from scipy.sparse import csr_matrix

    sparse = csr_matrix(
        (matrix.values().numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy())
    )
    return lambda x: mean_of_layers(lambda y: torch.from_numpy(sparse @ y.numpy()), x)


def forward(run: Operator, x: Tensor) -> Work:
    return lambda: run(x)


def backward(run: Operator, x: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    def once() -> Tensor:
        own = x.detach().requires_grad_()
        run(own).backward(gradient)
        assert own.grad is not None
        return own.grad

    return once


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=9, seconds=15.0)
    parser.add_argument("--scale", type=float, default=1.0, help="of users, items and edges, for trials")
    parser.add_argument("--data", type=Path, help="also the edges of this set, as cemg-train --data takes it")
    options = parser.parse_args()
    device = start(options)
    report = Report("lightgcn_propagate", options, device)
    bandwidth = copy_bandwidth(device)
    for name, shape in SHAPES.items():
        users, items, edges = (max(8, int(count * options.scale)) for count in shape)
        graph = BipartiteGraph.from_edges(*draw(users, items, edges), users, items)
        one_graph(report, name, graph.to(device), bandwidth)
    if options.data:
        from cemg.data import read_dataset  # polars, which the rest can do without
        from cemg.graph.lightgcn import edges_of

        data = read_dataset(options.data)
        train = data.split().train
        graph = BipartiteGraph.from_edges(*edges_of(train), len(train), data.num_items)
        one_graph(report, data.name, graph.to(device), bandwidth)
    report.finish()


def unavoidable(graph: BipartiteGraph, row_bytes: int, cache: float) -> int:
    """Bytes that the layers move between memory and a last cache of ``cache`` bytes: see the module."""
    degree = graph.row_ptr.diff()
    once = graph.neighbours.nbytes + graph.row_ptr.nbytes + 2 * len(degree) * row_bytes
    beyond = int(max(0.0, once - cache))
    kept = int(min(cache / row_bytes, len(degree)))
    again = (degree.sort(descending=True).values[kept:] - 1).clamp_min(0).sum()
    return once + (LAYERS - 1) * beyond + LAYERS * int(again) * row_bytes


def one_graph(report: Report, name: str, graph: BipartiteGraph, bandwidth: float) -> None:
    device, generator = report.device, torch.Generator().manual_seed(1)
    vertices = graph.num_users + graph.num_items
    x, gradient = (torch.randn(vertices, DIM, generator=generator).to(device) for _ in range(2))
    csr = sparse_matrix(graph)
    coo = csr.to_sparse_coo().coalesce()
    peers: dict[str, Operator | str] = {
        "PyG LGConv": pyg(graph),
        "torch COO": lambda y: mean_of_layers(lambda z: coo @ z, y),
        "torch CSR": lambda y: mean_of_layers(lambda z: csr @ z, y),
        "embedding_bag, weighted": bag(graph),
    }
    chosen = dispatch.choose("lightgcn_propagate", device).backend
    backends = {chosen, "torch"} | ({"sparse"} if x.is_cuda else set())
    ours: dict[str, Operator] = {
        own: partial(lightgcn_propagate, graph, layers=LAYERS, backend=own) for own in sorted(backends)
    }
    if chosen == "triton":
        ours[BFLOAT16] = partial(ours[chosen], table_dtype=torch.bfloat16)
    forward_peers = {**peers, "scipy CSR": scipy_csr(graph, csr)}
    reference = partial(lightgcn_propagate, graph, layers=LAYERS, backend="reference")
    wanted = reference(x.double()).float()
    wanted_gradient = backward(reference, x.double(), gradient.double())().float()
    for own, found in ours.items():
        for made, given, right in (
            (found(x), x, wanted),
            (backward(found, x, gradient)(), gradient, wanted_gradient),
        ):
            rounded = 1.01 * LAYERS * 2**-9 * reference(given.abs()) if own == BFLOAT16 else 0.0
            if not bool(((made - right).abs() <= 1e-5 + rounded).all()):
                raise SystemExit(f"{own} differs from the reference: run pytest tests/kernels")
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    forward_peers = checked(forward_peers, lambda run: close(run(x), wanted))
    peers = checked(peers, lambda run: close(backward(run, x, gradient)(), wanted_gradient))
    moved = unavoidable(graph, DIM * x.element_size(), last_cache(device))
    floor, gathered = moved / bandwidth * 1e3, LAYERS * len(graph.neighbours) * DIM * x.element_size()
    with torch.no_grad():
        report.case(f"{name}, forward", {b: forward(run, x) for b, run in ours.items()},
                    {p: run if isinstance(run, str) else forward(run, x) for p, run in forward_peers.items()},
                    "float64 reference, 1e-5", floor, nbytes=moved, gathered_bytes=gathered)  # fmt: skip
    report.case(f"{name}, forward and backward", {b: backward(run, x, gradient) for b, run in ours.items()},
                {p: run if isinstance(run, str) else backward(run, x, gradient) for p, run in peers.items()},
                "float64 reference and its gradient, 1e-5", 2 * floor, nbytes=2 * moved,
                gathered_bytes=2 * gathered)  # fmt: skip


if __name__ == "__main__":
    main()
