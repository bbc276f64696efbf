"""The trie's custom ops: their schemas and fakes, and compiled graphs of the methods of Trie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cemg_kernels
from cemg_kernels import ItemFilter, RequestFilter, Trie
from cemg_kernels.trie.ops import OPERATIONS

pytestmark = pytest.mark.medium

ROWS = 6


@pytest.fixture
def trie() -> Trie:
    codes = torch.cartesian_prod(*[torch.arange(5)] * 3)
    order = torch.randperm(125, generator=torch.Generator().manual_seed(0))
    return Trie.from_codes(codes[order[:70]], 5, torch.arange(70) * 2)


def filters_of(trie: Trie) -> list[ItemFilter | RequestFilter | None]:
    one = ItemFilter.from_items(trie, range(0, 60, 2))
    stacked = ItemFilter.stack([one, None, ItemFilter.from_items(trie, [8])])
    return [None, one, stacked, stacked & RequestFilter.excluding(trie, [[0, 2], [4], [6]])]


def operands_of(name: str) -> tuple[Tensor, ...]:
    nodes = torch.tensor([0, 1, 3, -1, 12, 20], dtype=torch.int32)
    if name == "lookup":
        return (torch.tensor([[0, 1], [4, 4], [2, 0], [1, 3], [9, 0], [-1, 2]]),)
    return (nodes, torch.arange(ROWS) % 5) if name == "advance" else (nodes,)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_custom_op_passes_opcheck_and_equals_the_operation(backend, trie, name):
    arrays = trie.arrays
    for filter in filters_of(trie):
        tensors = trie.filter_tensors(filter, ROWS)
        flat = (arrays.code, arrays.first_child, arrays.rows, 3, 5, list(tensors or ()), *operands_of(name))
        op = getattr(torch.ops.cemg, f"trie_{name}")
        torch.library.opcheck(op, flat)
        expected = OPERATIONS[name](arrays, tensors, *operands_of(name))
        torch.testing.assert_close(op(*flat), expected, rtol=0, atol=0)


@pytest.mark.parametrize("which", range(4))
def test_the_methods_compile_without_a_graph_break(backend, trie, which):
    filter = filters_of(trie)[which]

    def everything(prefixes: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        nodes = trie.lookup(prefixes, filter=filter)
        deeper = trie.advance(nodes, codes, filter=filter)
        mask = trie.mask(nodes, filter=filter)
        below = trie.children(nodes, filter=filter)
        return nodes, deeper, mask, *below, trie.items(deeper, filter=filter), trie.interval(nodes)

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for operands in ((operands_of("lookup")[0], torch.arange(ROWS) % 5),
                     (torch.tensor([[0, 0]] * 3), torch.tensor([0, 1, 2]))):  # fmt: skip
        for actual, expected in zip(compiled(*operands), everything(*operands), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("levels", "size", "num_items"), [(3, 5, 70), (4, 256, 50_000), (3, 4096, 20_000)])
@pytest.mark.parametrize("fast", [True, False], ids=["native", "reference"])
def test_a_gpu_gives_the_results_of_the_cpu(fast, levels, size, num_items):
    """The arrays are equal, and so are the results of every operation under every filter."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.unique(torch.randint(size, (2 * num_items, levels), generator=generator), dim=0)
    codes = codes[torch.randperm(len(codes), generator=generator)[:num_items]]
    here = Trie.from_codes(codes, size)
    cemg_kernels.use_fast_kernels(fast)
    there = Trie.from_codes(codes.cuda(), size, device="cuda")
    assert there.device.type == "cuda" and there.fingerprint == here.fingerprint
    rows = 600
    nodes = torch.randint(-1, here.num_nodes + 3, (rows,), generator=generator, dtype=torch.int32)
    code = torch.randint(-1, size + 1, (rows,), generator=generator)
    known = codes[: num_items // 3 * 3][:300, :2]  # a number of rows that three requests divide
    prefixes = torch.cat((known, torch.randint(size, (300, 2), generator=generator)))
    one = ItemFilter.from_mask(here, torch.rand(here.num_items, generator=generator) < 0.1)
    stacked = ItemFilter.stack([one, None, ~one])
    had = torch.randint(-1, here.num_items, (3, 20), generator=generator)
    for filter in (None, one, stacked, stacked & RequestFilter.excluding(here, had)):
        moved = None if filter is None else filter.to("cuda")
        for name, operands in (("lookup", (prefixes,)), ("advance", (nodes, code)), ("children", (nodes,)),
                               ("mask", (nodes,)), ("items", (nodes,))):  # fmt: skip
            actual = getattr(there, name)(*(x.cuda() for x in operands), filter=moved)
            expected = getattr(here, name)(*operands, filter=filter)
            pairs = zip(actual, expected, strict=True) if name == "children" else [(actual, expected)]
            for a, b in pairs:
                assert torch.equal(a.cpu(), b), (name, filter)
    assert torch.equal(there.interval(nodes.cuda()).cpu(), here.interval(nodes))
    assert there.mask(nodes[:0].cuda()).shape == (0, size)
    cemg_kernels.use_fast_kernels(None)
