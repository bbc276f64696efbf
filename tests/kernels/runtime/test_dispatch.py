"""The dispatcher chooses backends and follows its switches; profiler ranges name the operations."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cemg_kernels import (
    BipartiteGraph,
    ItemFilter,
    RequestFilter,
    Trie,
    backends,
    fast_kernels_enabled,
    lightgcn_propagate,
    residual_quantize,
    trie_beam_step,
    trie_softmax,
    use_fast_kernels,
)
from cemg_kernels.runtime import dispatch, ranges
from cemg_kernels.runtime.registry import OPERATIONS

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_override() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CEMG_FAST_KERNELS", raising=False)
        use_fast_kernels(None)
        yield
    use_fast_kernels(None)


def test_the_native_trie_runs_on_the_cpu_and_every_op_reports_a_reason():
    chosen = backends("cpu")
    assert chosen["trie"].backend == "native"
    assert set(chosen) == set(OPERATIONS) and all(choice.why for choice in chosen.values())


def test_the_environment_and_the_function_turn_fast_kernels_off(monkeypatch):
    assert fast_kernels_enabled()
    monkeypatch.setenv("CEMG_FAST_KERNELS", "0")
    use_fast_kernels(None)
    assert {choice.backend for choice in backends().values()} == {"reference"}
    use_fast_kernels(True)
    assert backends()["trie"].backend == "native"


def test_an_unknown_value_in_the_environment_is_rejected(monkeypatch):
    monkeypatch.setenv("CEMG_FAST_KERNELS", "yes")
    use_fast_kernels(None)
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        fast_kernels_enabled()


def test_a_backend_that_cannot_run_on_a_device_is_rejected():
    with pytest.raises(ValueError, match="cannot run on cuda"):
        dispatch.pick("trie", torch.device("cuda"), "native")
    assert dispatch.choose("trie", torch.device("cuda")).backend == "reference"


def test_propagation_without_triton_uses_sparse_on_a_gpu_and_torch_on_a_cpu(monkeypatch):
    assert dispatch.choose("lightgcn_propagate", torch.device("cpu")).backend == "native"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    monkeypatch.setattr(dispatch, "_native", None)
    use_fast_kernels(None)
    assert dispatch.choose("lightgcn_propagate", torch.device("cuda")).backend == "sparse"
    choice = dispatch.choose("lightgcn_propagate", torch.device("cpu"))
    assert choice.backend == "torch" and "sparse: slower" in choice.why


def test_without_the_native_module_the_reference_runs_and_the_reason_is_reported(monkeypatch):
    monkeypatch.setattr(dispatch, "_native", None)
    monkeypatch.setattr(dispatch, "NATIVE_ERROR", "no such file")
    use_fast_kernels(None)
    choice = backends()["trie"]
    assert choice.backend == "reference" and "no such file" in choice.why
    with pytest.raises(RuntimeError, match="pip install -e"):
        dispatch.native()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_ranges_name_each_call_and_close_when_it_raises(monkeypatch, on_gpu):
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: events.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: events.append("pop"))
    monkeypatch.setattr(ranges, "_enabled", ranges.ranges_enabled())
    x, codebooks = torch.zeros(2, 3), torch.zeros(1, 4, 3)
    residual_quantize(x, codebooks)
    assert events == []  # off by default
    ranges.use_ranges(True)
    with torch.profiler.profile() as profile:
        residual_quantize(x, codebooks)
    assert events == ["push residual_quantize", "pop"] * on_gpu
    assert "residual_quantize" in {event.name for event in profile.events()}
    with pytest.raises(ValueError, match="empty"):
        residual_quantize(x, codebooks[:0])
    assert events == ["push residual_quantize", "pop"] * 2 * on_gpu
    ranges.use_ranges(False)
    residual_quantize(x, codebooks)
    assert len(events) == 4 * on_gpu


def test_operations_filters_and_gradients_have_named_ranges(monkeypatch):
    monkeypatch.setattr(ranges, "_enabled", True)
    graph = BipartiteGraph.from_edges(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 1)
    with torch.profiler.profile() as profile:
        trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0]]), 4)
        allowed = ItemFilter.everything(trie) & RequestFilter.excluding(trie, [[1]])
        leaves = trie.lookup(torch.tensor([[0, 2]]), filter=allowed)
        trie.items(leaves)
        trie.mask(leaves), trie.children(leaves), trie.interval(leaves), trie.advance(leaves, leaves)
        lightgcn_propagate(graph, torch.ones(3, 2, requires_grad=True), 2).sum().backward()
    names = {event.name for event in profile.events()}
    assert names >= {
        "trie_build", "trie_lookup", "trie_mask", "trie_children", "trie_interval", "trie_advance",
        "Trie.items", "fill_inner", "closed_nodes", "lightgcn_propagate", "lightgcn_propagate, backward",
    }  # fmt: skip


def test_the_environment_turns_ranges_on(monkeypatch):
    for value, enabled in (("1", True), ("0", False)):
        monkeypatch.setenv("CEMG_NVTX", value)
        assert importlib.reload(ranges).ranges_enabled() == enabled


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.medium
def test_inductor_compiles_a_function_of_every_operation_without_a_graph_break():
    """The operands are column-major, because inductor relies on the strides of the fake tensors."""
    graph = BipartiteGraph.from_edges(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, 2)
    trie = Trie.from_codes(torch.tensor([[0, 1], [0, 2], [3, 0], [1, 1]]), 4)
    generator = torch.Generator().manual_seed(0)
    columns, codebooks = torch.randn(8, 4, generator=generator), torch.randn(1, 4, 8, generator=generator)

    def everything(columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = lightgcn_propagate(graph, columns.t(), 2)  # [4, 8]
        codes, quantized = residual_quantize((table + 1).t().contiguous().t(), codebooks)
        nodes = trie.lookup(codes)
        logits = quantized.t()[:4] * 2
        log_prob = trie_softmax(logits, nodes, trie, "level")
        step = trie_beam_step(logits[None], log_prob[None, :, 0].exp(), nodes[None], trie, 3, "valid")
        return table * 2, quantized - 1, trie.items(step.nodes) + 1, step.scores * 2, log_prob.exp()

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True)
    for actual, expected in zip(compiled(columns), everything(columns), strict=True):
        torch.testing.assert_close(actual, expected)
