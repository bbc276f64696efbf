"""Three layers of LightGCN propagation, forward and backward, against PyG and sparse products.

    python bench/propagate.py [--data data/beauty] [--device cuda] [--json PATH] [--plot PATH]

The edges are random, in the sizes of two public data sets; ``--data`` adds the training edges of another data
set. On a GPU, all backends are timed, and also bfloat16 tables, checked against their rounding bound.

The floor is the time of the bytes that must be moved, at the measured copy bandwidth: the first layer reads
the edges and the table and writes the table; each later layer does so for the part that does not fit into the
last-level cache; and if the table is larger than that cache, each layer gathers rows from memory again, even
if the cache keeps the rows that are gathered most often.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import (
    Report,
    Work,
    apply_options,
    check_peers,
    copy_bandwidth,
    last_level_cache,
    make_parser,
    missing_packages,
)
from torch import Tensor

from cemg_kernels import BipartiteGraph, lightgcn_propagate
from cemg_kernels.runtime import dispatch

Operator = Callable[[Tensor], Tensor]
LAYERS, DIM = 3, 64
BFLOAT16 = "triton, bfloat16 tables"
SHAPES = {"Gowalla-shaped": (29_858, 40_981, 1_027_370), "Beauty-shaped": (22_363, 12_101, 153_776)}


def draw(users: int, items: int, edges: int) -> tuple[Tensor, Tensor]:
    """Random edges whose item popularity follows a power law, like that of real data sets."""
    generator = torch.Generator().manual_seed(0)
    popularity = 1 / torch.arange(1, items + 1).double().pow(0.7)
    chosen = torch.multinomial(popularity, edges, replacement=True, generator=generator)
    return torch.randint(users, (edges,), generator=generator), chosen


def sparse_matrix(graph: BipartiteGraph) -> Tensor:
    """The normalized adjacency matrix in torch's CSR format."""
    degree = graph.row_ptr.diff()
    row = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree)
    values = graph.inv_sqrt_degree[row] * graph.inv_sqrt_degree[graph.neighbours]
    size = (len(degree), len(degree))
    return torch.sparse_csr_tensor(graph.row_ptr.int(), graph.neighbours.int(), values, size)


def mean_of_layers(multiply: Operator, x: Tensor) -> Tensor:
    """The mean of x and its products, layer by layer."""
    total = layer = x
    for _ in range(LAYERS):
        layer = multiply(layer)
        total = total + layer
    return total / (LAYERS + 1)


def pyg(graph: BipartiteGraph) -> Operator | str:
    """``LGConv`` of PyG with its default, a scatter over an edge index."""
    missing = missing_packages(["torch-geometric"])
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
    """The CSR product of scipy."""
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
    """A call that runs forward and backward and returns the gradient of x."""

    def gradient_of_x() -> Tensor:
        leaf = x.detach().requires_grad_()
        run(leaf).backward(gradient)  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad

    return gradient_of_x


def main() -> None:
    parser = make_parser(__doc__, rounds=9, seconds=15.0)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of users, items and edges, for trials"
    )
    parser.add_argument("--data", type=Path, help="another data set, as for cemg-train --data")
    options = parser.parse_args()
    device = apply_options(options)
    report = Report("lightgcn_propagate", options, device)
    bandwidth = copy_bandwidth(device)
    for name, shape in SHAPES.items():
        users, items, edges = (max(8, int(count * options.scale)) for count in shape)
        graph = BipartiteGraph.from_edges(*draw(users, items, edges), users, items)
        one_graph(report, name, graph.to(device), bandwidth)
    if options.data:
        from cemg.data import read_dataset  # imports polars, which nothing else here needs
        from cemg.graph.lightgcn import edges_of

        data = read_dataset(options.data)
        train = data.split().train
        graph = BipartiteGraph.from_edges(*edges_of(train), len(train), data.num_items)
        one_graph(report, data.name, graph.to(device), bandwidth)
    report.finish()


def floor_bytes(graph: BipartiteGraph, row_bytes: int, cache: float) -> int:
    """Bytes moved between memory and a last-level cache of ``cache`` bytes; see the top of this file."""
    degree = graph.row_ptr.diff()
    first_layer = graph.neighbours.nbytes + graph.row_ptr.nbytes + 2 * len(degree) * row_bytes
    not_cached = int(max(0.0, first_layer - cache))
    cached_rows = int(min(cache / row_bytes, len(degree)))
    gathered_again = (degree.sort(descending=True).values[cached_rows:] - 1).clamp_min(0).sum()
    return first_layer + (LAYERS - 1) * not_cached + LAYERS * int(gathered_again) * row_bytes


def one_graph(report: Report, name: str, graph: BipartiteGraph, bandwidth: float) -> None:
    """Times one graph after comparing the outputs and gradients with the float64 reference."""
    device, generator = report.device, torch.Generator().manual_seed(1)
    vertices = graph.num_users + graph.num_items
    x, gradient = (torch.randn(vertices, DIM, generator=generator).to(device) for _ in range(2))
    csr = sparse_matrix(graph)
    coo = csr.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
    peers: dict[str, Operator | str] = {
        "PyG LGConv": pyg(graph),
        "torch COO": lambda y: mean_of_layers(lambda z: coo @ z, y),
        "torch CSR": lambda y: mean_of_layers(lambda z: csr @ z, y),
        "embedding_bag, weighted": bag(graph),
    }
    chosen = dispatch.choose("lightgcn_propagate", device).backend
    backends = {chosen, "torch"} | ({"sparse"} if x.is_cuda else set())
    ours: dict[str, Operator] = {
        backend: partial(lightgcn_propagate, graph, layers=LAYERS, backend=backend)
        for backend in sorted(backends)
    }
    if chosen == "triton":
        ours[BFLOAT16] = partial(
            lightgcn_propagate, graph, layers=LAYERS, backend=chosen, table_dtype=torch.bfloat16
        )
    forward_peers = {**peers, "scipy CSR": scipy_csr(graph, csr)}
    reference = partial(lightgcn_propagate, graph, layers=LAYERS, backend="reference")
    expected = reference(x.double()).float()
    expected_gradient = backward(reference, x.double(), gradient.double())().float()
    for backend, run in ours.items():
        for result, operand, right in (
            (run(x), x, expected),
            (backward(run, x, gradient)(), gradient, expected_gradient),
        ):
            rounding = 1.01 * LAYERS * 2**-9 * reference(operand.abs()) if backend == BFLOAT16 else 0.0
            if not torch.le((result - right).abs(), 1e-5 + rounding).all():
                raise SystemExit(f"{backend} differs from the reference: run pytest tests/kernels")
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    forward_peers = check_peers(forward_peers, lambda run: close(run(x), expected))
    peers = check_peers(peers, lambda run: close(backward(run, x, gradient)(), expected_gradient))
    moved = floor_bytes(graph, DIM * x.element_size(), last_level_cache(device))
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
