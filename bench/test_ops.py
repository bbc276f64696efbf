"""The cases of the scripts as pytest-benchmark tests: ``pytest bench/test_ops.py`` (extra ``bench``).

Each case runs on the default backend and is compared with the reference in the same way as in its script.
"""

from __future__ import annotations

from functools import cache

import propagate
import pytest
import quantize
import torch
import trie_build
import trie_step
from cells import random_codes

from cemg_kernels import BipartiteGraph, Trie, lightgcn_propagate, residual_quantize, trie_softmax

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = [(size, items, users) for size in trie_step.SIZES for items in trie_step.ITEMS
         for users in trie_step.USERS]  # fmt: skip
BUILDS = [(size, items) for size in trie_build.SIZES for items in trie_build.ITEMS]


@cache
def codes_of(items, size):
    return random_codes(items, trie_step.LEVELS, size)


@pytest.mark.parametrize("size", quantize.SIZES)
def test_residual_quantize(benchmark, size):
    x, codebooks = quantize.draw(quantize.ITEMS, size, DEVICE)
    codes, _ = benchmark(residual_quantize, x, codebooks)
    assert quantize.count_wrong(x, codebooks, codes) == 0


@pytest.mark.parametrize("name", propagate.SHAPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_lightgcn_propagate(benchmark, name, direction):
    users, items, edges = propagate.SHAPES[name]
    graph = BipartiteGraph.from_edges(*propagate.draw(users, items, edges), users, items).to(DEVICE)
    x, gradient = (torch.randn(users + items, propagate.DIM, device=DEVICE) for _ in range(2))

    def work(x, gradient, backend=None):
        def run(y):
            return lightgcn_propagate(graph, y, propagate.LAYERS, backend=backend)

        return run(x) if direction == "forward" else propagate.backward(run, x, gradient)()

    out = benchmark(work, x, gradient)
    expected = work(x.double(), gradient.double(), "reference").float()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size, items, users", STEPS)
def test_trie_beam_step(benchmark, size, items, users):
    step = trie_step.StepCase(codes_of(items, size), size, DEVICE, users)
    trie_step.check(benchmark(step.run, None), step.run("reference"))


@pytest.mark.parametrize("size, items, users", STEPS)
@pytest.mark.parametrize("normalize, filtered", [("level", False), ("valid", True)])
def test_trie_beam_step_over_the_level_or_under_a_filter(benchmark, size, items, users, normalize, filtered):
    step = trie_step.StepCase(codes_of(items, size), size, DEVICE, users)
    filter = step.filter if filtered else None
    trie_step.check(benchmark(step.run, None, normalize, filter), step.run("reference", normalize, filter))


@pytest.mark.parametrize("size, items, users", STEPS)
def test_trie_softmax(benchmark, size, items, users):
    step = trie_step.StepCase(codes_of(items, size), size, DEVICE, users)
    operands = step.flat, step.nodes.flatten(), step.trie, "valid"
    result = benchmark(trie_softmax, *operands)
    expected = trie_softmax(*operands, backend="reference")
    torch.testing.assert_close(result, expected, rtol=0, atol=trie_step.TOLERANCE)


@pytest.mark.parametrize("size, items", BUILDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_trie_build(benchmark, size, items, ordered):
    codes = codes_of(items, size).to(DEVICE)
    if ordered:
        codes = codes[Trie.from_codes(codes, size, device=DEVICE).rows.long()]
    trie = benchmark(Trie.from_codes, codes, size, device=DEVICE)
    rows = torch.arange(0, items, max(1, items // trie_build.SAMPLE), device=DEVICE)
    assert torch.equal(trie.items(trie.lookup(codes[rows])), rows)


@pytest.mark.parametrize("query", trie_build.QUERIES)
@pytest.mark.parametrize("size, items", BUILDS)
def test_trie_query(benchmark, size, items, query):
    codes = codes_of(items, size)
    queries = trie_build.TrieQueries(codes, Trie.from_codes(codes, size).to(DEVICE))
    result = benchmark(queries.ours()[query])
    assert torch.equal(result, queries.reference(query))
