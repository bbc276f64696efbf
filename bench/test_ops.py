"""The cases of the benchmarks under pytest-benchmark: ``pytest bench/test_ops.py`` (extra ``bench``)."""

from __future__ import annotations

import pytest
import torch
from cells import random_catalog

from cemg_kernels import (
    BipartiteGraph,
    Trie,
    dispatch,
    lightgcn_propagate,
    residual_quantize,
    trie_beam_step,
)

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backends(op: str) -> list[str]:
    """What can run here, the interpreter left out: its time says nothing."""
    names = [b for b in dispatch.OPS[op] if b != "triton" or DEVICE.type == "cuda"]
    return [b for b in names if not dispatch._problem(op, b, DEVICE.type)]


@pytest.mark.parametrize("backend", backends("residual_quantize"))
def test_residual_quantize(benchmark, backend):
    x, codebooks = torch.randn(10_000, 64, device=DEVICE), torch.randn(4, 256, 64, device=DEVICE)
    codes, _ = benchmark(residual_quantize, x, codebooks, backend=backend)
    assert torch.equal(codes[:500], residual_quantize(x[:500], codebooks, backend="reference")[0])


@pytest.mark.parametrize("backend", backends("lightgcn_propagate"))
def test_lightgcn_propagate(benchmark, backend):
    users, items = torch.randint(2_000, (20_000,)), torch.randint(1_000, (20_000,))
    graph = BipartiteGraph.from_edges(users, items, 2_000, 1_000).to(DEVICE)
    x = torch.randn(3_000, 64, device=DEVICE)
    out = benchmark(lightgcn_propagate, graph, x, 3, backend=backend)
    torch.testing.assert_close(out, lightgcn_propagate(graph, x, 3, backend="reference"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", backends("trie_beam_step"))
@pytest.mark.parametrize("items", [10**4, 10**6])
def test_trie_beam_step(benchmark, backend, items):
    trie = random_catalog(items, 4, 256).trie.to(DEVICE)
    nodes = torch.randint(1, 257, (1, 50), dtype=torch.int32, device=DEVICE)
    logits, scores = torch.randn(1, 50, 256, device=DEVICE), -torch.rand(1, 50, device=DEVICE)
    step = benchmark(trie_beam_step, logits, scores, nodes, trie, 50, "valid", backend=backend)
    wanted = trie_beam_step(logits, scores, nodes, trie, 50, "valid", backend="reference")
    torch.testing.assert_close(step.scores, wanted.scores, rtol=0, atol=1e-5)


def test_trie_build(benchmark):
    codes = random_catalog(10**5, 4, 256).codes
    assert benchmark(Trie.from_codes, codes, 256).num_items == 10**5
