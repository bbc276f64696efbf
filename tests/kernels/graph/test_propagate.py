"""Propagation against dense matrix powers, and its gradient against autograd and finite differences."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import BipartiteGraph, lightgcn_propagate
from cemg_kernels.graph import propagate_triton as lightgcn_propagate_triton

pytestmark = pytest.mark.medium

BACKENDS = ["reference", "torch", "sparse", "native", "triton"]


def draw_edges(num_users: int, num_items: int, edges: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(num_users, (edges,), generator=generator),
        torch.randint(num_items, (edges,), generator=generator),
    )


def dense_mean(users: Tensor, items: Tensor, num_users: int, x: Tensor, layers: int) -> Tensor:
    """Computes the formula with a dense float64 matrix."""
    adjacency = torch.zeros(len(x), len(x), dtype=torch.float64)
    adjacency[users, items + num_users] = 1
    adjacency[items + num_users, users] = 1
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.rsqrt(), 0)
    normal = scale[:, None] * adjacency * scale
    powers = [torch.linalg.matrix_power(normal, k) @ x.double() for k in range(layers + 1)]
    return torch.stack(powers).mean(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize(
    ("num_users", "num_items", "edges", "dim"), [(1, 1, 1, 1), (5, 7, 20, 3), (40, 23, 300, 64), (3, 4, 0, 2)]
)
def test_the_mean_of_layers_equals_dense_powers(backend, layers, num_users, num_items, edges, dim):
    users, items = draw_edges(num_users, num_items, edges)
    graph = BipartiteGraph.from_edges(users, items, num_users, num_items)
    x = torch.randn(num_users + num_items, dim, generator=torch.Generator().manual_seed(1))
    out = lightgcn_propagate(graph, x, layers, backend=backend)
    expected = dense_mean(users, items, num_users, x, layers)
    assert out.dtype == torch.float32
    # weights, and sums of at most 40 terms below 5, over three layers: 3 * 45 roundings of 2^-24 * 5
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3 * 45 * 2**-24 * 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_edges_count_once(backend):
    users, items = draw_edges(6, 5, 15)
    once = BipartiteGraph.from_edges(users, items, 6, 5)
    thrice = BipartiteGraph.from_edges(users.repeat(3), items.repeat(3), 6, 5)
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    assert once.num_edges == thrice.num_edges == len(set(zip(users.tolist(), items.tolist(), strict=True)))
    assert torch.equal(
        lightgcn_propagate(once, x, 2, backend=backend), lightgcn_propagate(thrice, x, 2, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vertex_without_edges_keeps_its_share_and_adds_nothing(backend):
    graph = BipartiteGraph.from_edges(torch.tensor([0]), torch.tensor([0]), 2, 2)
    x = torch.tensor([[1.0], [8.0], [3.0], [16.0]])
    out = lightgcn_propagate(graph, x, 3, backend=backend)
    assert out[:, 0].tolist() == [(1 + 3 + 1 + 3) / 4, 2.0, (3 + 1 + 3 + 1) / 4, 4.0]


@pytest.mark.parametrize(
    "backend", ["reference", "torch", "sparse"]
)  # in float64, which the Triton backend does not support
def test_first_and_second_gradients_equal_finite_differences(backend):
    users, items = draw_edges(4, 3, 8)
    graph = BipartiteGraph.from_edges(users, items, 4, 3)
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))

    def propagate(value: Tensor) -> Tensor:
        return lightgcn_propagate(graph, value, 2, backend=backend)

    assert torch.autograd.gradcheck(propagate, (x,))
    assert torch.autograd.gradgradcheck(propagate, (x,))


@settings(max_examples=60, deadline=None)
@given(
    num_users=st.integers(1, 12),
    num_items=st.integers(1, 12),
    edges=st.integers(0, 60),
    layers=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_the_torch_backend_equals_the_reference_forward_and_backward(
    num_users, num_items, edges, layers, seed
):
    users, items = draw_edges(num_users, num_items, edges, seed=seed)
    graph = BipartiteGraph.from_edges(users, items, num_users, num_items)
    start = torch.randn(
        num_users + num_items, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    expected = out_and_gradient(graph, start, layers, "reference")
    # both sides use float32 scales in float64, so only the order of the sums differs
    for backend in ("torch", "sparse"):
        for actual_part, reference_part in zip(
            out_and_gradient(graph, start, layers, backend), expected, strict=True
        ):
            torch.testing.assert_close(actual_part, reference_part, rtol=0, atol=1e-12)
    for backend in ("native", "triton", "sparse"):
        result = out_and_gradient(graph, start.float(), layers, backend)
        for actual_part, reference_part in zip(result, expected, strict=True):
            torch.testing.assert_close(actual_part.double(), reference_part, rtol=0, atol=3e-6)


def test_more_dimensions_than_triton_supports_run_on_torch(monkeypatch):
    module = sys.modules["cemg_kernels.graph.propagate"]
    monkeypatch.setattr(module, "pick", lambda op, device, backend: backend or "triton")  # as on a GPU
    graph = BipartiteGraph.from_edges(torch.tensor([0]), torch.tensor([0]), 1, 1)
    x = torch.randn(2, 1025)
    expected = lightgcn_propagate(graph, x, 2, backend="reference")
    torch.testing.assert_close(lightgcn_propagate(graph, x, 2), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="up to 1024 dimensions"):
        lightgcn_propagate(graph, x, 2, backend="triton")


def out_and_gradient(
    graph: BipartiteGraph, start: Tensor, layers: int, backend: str, table_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    x = start.clone().requires_grad_()
    out = lightgcn_propagate(graph, x, layers, backend=backend, table_dtype=table_dtype)
    (out * start.cos()).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("backend", ["triton", "native", None])
def test_a_bfloat16_table_stays_within_its_error_bound_forward_and_backward(backend, layers):
    users, items = draw_edges(40, 30, 400)
    graph = BipartiteGraph.from_edges(users, items, 40, 30)
    start = torch.randn(70, 9, generator=torch.Generator().manual_seed(1))
    result = out_and_gradient(graph, start, layers, backend, torch.bfloat16)
    expected = out_and_gradient(graph, start.double(), layers, "reference")
    # Triton's interpreter truncates where a GPU rounds to nearest, so the error is 2^-8 instead of 2^-9
    rounding = 2**-8 if backend == "triton" else 2**-9
    for actual_part, reference_part, source in zip(result, expected, (start, start.cos()), strict=True):
        size = lightgcn_propagate(graph, source.abs(), layers, backend="reference")
        off = (actual_part.double() - reference_part).abs()
        assert (off <= 1.01 * layers * rounding * size + 1e-6).all()
        # otherwise the table was not rounded
        assert off.max() < 1e-6 if backend != "triton" else off.max() > 2**-12


def test_another_table_dtype_is_rejected():
    graph = BipartiteGraph.from_edges(torch.tensor([0]), torch.tensor([0]), 1, 1)
    with pytest.raises(ValueError, match="table_dtype must be"):
        lightgcn_propagate(graph, torch.zeros(2, 3), 1, table_dtype=torch.float16)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_triton_sums_vertices_of_any_number_of_neighbours(monkeypatch, table_dtype):
    """Covers light, medium and heavy vertices, with small sizes for the interpreter."""
    from cemg_kernels.graph import propagate_triton as triton_backend

    monkeypatch.setattr(triton_backend, "LIGHT_DEGREE", 3)
    monkeypatch.setattr(triton_backend, "CHUNK", 8)
    users, items = draw_edges(20, 40, 90)
    users, items = torch.cat((users, torch.zeros(40).long())), torch.cat((items, torch.arange(40)))
    graph = BipartiteGraph.from_edges(users, items, 21, 40)  # user 0 sees all items, user 20 none
    assert int(graph.row_ptr.diff().max()) == 40
    x = torch.randn(61, 5, generator=torch.Generator().manual_seed(1))
    out = triton_backend.propagate(graph, x, 3, table_dtype)
    tolerance = 1e-6 if table_dtype == torch.float32 else 3 * 2**-7
    expected = lightgcn_propagate(graph, x, 3, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


def test_inputs_that_triton_does_not_support_are_rejected():
    users, items = draw_edges(3, 3, 5)
    graph = BipartiteGraph.from_edges(users, items, 3, 3)
    with pytest.raises(ValueError, match="float64 of 2; use backend='torch'"):
        lightgcn_propagate(graph, torch.zeros(6, 2).double(), 1, backend="triton")
    with pytest.raises(ValueError, match="up to 1024 dimensions"):
        lightgcn_propagate(graph, torch.zeros(6, 1025), 1, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32(backend):
    users, items = draw_edges(40, 30, 400)
    graph = BipartiteGraph.from_edges(users, items, 40, 30)
    x = torch.randn(70, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = lightgcn_propagate(graph, x, 3, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = lightgcn_propagate(graph, x.float(), 3, backend="reference")
    # one rounding of the result; Triton's interpreter truncates where a GPU rounds to nearest
    rounding = 2**-7 if backend == "triton" else 2**-8
    torch.testing.assert_close(out.float(), expected, rtol=rounding, atol=2**-20)


def test_edges_and_inputs_that_do_not_fit_are_rejected():
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="users must be 0 to 1"):
        BipartiteGraph.from_edges(torch.tensor([2]), one, 2, 2)
    with pytest.raises(ValueError, match="items must be 0 to"):
        BipartiteGraph.from_edges(one, torch.tensor([-1]), 2, 2)
    with pytest.raises(ValueError, match="integers"):
        BipartiteGraph.from_edges(one.float(), one, 2, 2)
    graph = BipartiteGraph.from_edges(one, one, 2, 2)
    with pytest.raises(ValueError, match=r"\[4, D\]"):
        lightgcn_propagate(graph, torch.zeros(3, 2), 1)
    with pytest.raises(ValueError, match="layers"):
        lightgcn_propagate(graph, torch.zeros(4, 2), -1)


@pytest.mark.parametrize("backend", ["native", "torch", "sparse", "triton", "reference"])
def test_the_custom_op_passes_opcheck_and_compiles_without_a_graph_break(backend):
    graph = BipartiteGraph.from_edges(*draw_edges(4, 5, 9), 4, 5)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    arrays = graph.row_ptr, graph.neighbours, graph.inv_sqrt_degree
    by_columns = x.detach().t().contiguous().t().requires_grad_()
    for layers, laid_out in ((0, x), (2, x), (0, by_columns), (2, by_columns)):
        operands = *arrays, laid_out, layers, torch.bfloat16 if layers else None, backend
        torch.library.opcheck(torch.ops.cemg.lightgcn_propagate.default, operands)

    def squared(rows: Tensor) -> Tensor:
        return lightgcn_propagate(graph, rows * 2, 3, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(squared, fullgraph=True, backend="aot_eager")
    (actual_part,), (expected,) = (torch.autograd.grad(run(x), x) for run in (compiled, squared))
    torch.testing.assert_close(actual_part, expected)


@pytest.mark.parametrize(
    ("backend", "module", "maker"),
    [("sparse", torch, "sparse_csr_tensor"), ("triton", lightgcn_propagate_triton, "Schedule")],
)
def test_cached_graph_data_is_computed_once_for_eager_and_compiled_calls(monkeypatch, backend, module, maker):
    graph = BipartiteGraph.from_edges(*draw_edges(4, 5, 9), 4, 5)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def squared(rows: Tensor) -> Tensor:
        return lightgcn_propagate(graph, rows, 2, backend=backend).square().sum()

    def fail(*_: object) -> None:
        raise AssertionError(f"{maker} was called again")

    (expected,) = torch.autograd.grad(squared(x), x)
    monkeypatch.setattr(module, maker, fail)
    torch._dynamo.reset()
    compiled = torch.compile(squared, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (actual_part,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(actual_part, expected)
