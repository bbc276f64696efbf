"""What only a GPU can show: every kernel there against the CPU's reference. ``pytest -m gpu``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from cemg.decoding import Decoder
from cemg.tokenizer import Catalog
from cemg_kernels import (
    BipartiteGraph,
    ItemFilter,
    RequestFilter,
    Trie,
    lightgcn_propagate,
    residual_quantize,
    trie_beam_step,
    trie_softmax,
    use_fast_kernels,
)
from cemg_kernels.attention.beam_tree import beam_tree_attention
from cemg_kernels.attention.logsumexp import row_logsumexp
from cemg_kernels.attention.shared_prefix import shared_prefix_attention
from cemg_kernels.runtime import dispatch
from cemg_kernels.trie import cuda_launch as trie_cuda
from cemg_kernels.trie.arrays import DuplicateCodes
from cemg_kernels.trie.build import build
from cemg_kernels.trie.filter_tensors import NO_NODE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
GPU = torch.device("cuda")


def codes_of(items: int, levels: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.unique(torch.randint(size, (2 * items, levels), generator=generator), dim=0)
    return drawn[torch.randperm(len(drawn), generator=generator)[:items]]


def test_the_native_trie_runs_here():
    assert trie_cuda.problem() == ""
    assert dispatch.choose("trie", GPU).backend == "native"


@pytest.mark.parametrize(
    ("items", "levels", "size"), [(1, 1, 1), (500, 3, 8), (5000, 4, 256), (3000, 3, 2048)]
)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("compiler", ["as installed", "CuPy's NVRTC"])
def test_every_trie_operation_equals_the_cpus(monkeypatch, items, levels, size, filtered, compiler):
    if compiler != "as installed":
        pytest.importorskip("cupy")
        monkeypatch.setattr(trie_cuda, "built_by_nvcc", lambda: "")
    codes = codes_of(items, levels, size)
    host, device = Trie.from_codes(codes, size), Trie.from_codes(codes.to(GPU), size, device=GPU)
    assert all(
        torch.equal(getattr(host.arrays, name), getattr(device.arrays, name).cpu())
        for name in ("code", "first_child", "rows")
    )
    allowed = torch.rand(host.num_items, generator=torch.Generator().manual_seed(1)) < 0.3
    mine = ItemFilter.from_mask(host, allowed) if filtered else None
    theirs = ItemFilter.from_mask(device, allowed.to(GPU)) if filtered else None
    nodes = torch.randint(-1, host.num_nodes + 2, (700,), dtype=torch.int32)
    wanted = torch.randint(-1, size, (700,))
    for length in range(levels + 1):
        prefixes = codes[:300, :length].contiguous()
        assert torch.equal(
            host.lookup(prefixes, filter=mine), device.lookup(prefixes.to(GPU), filter=theirs).cpu()
        )
    assert torch.equal(
        host.advance(nodes, wanted, filter=mine),
        device.advance(nodes.to(GPU), wanted.to(GPU), filter=theirs).cpu(),
    )
    assert torch.equal(host.mask(nodes, filter=mine), device.mask(nodes.to(GPU), filter=theirs).cpu())
    assert torch.equal(host.interval(nodes), device.interval(nodes.to(GPU)).cpu())
    assert torch.equal(host.items(nodes, filter=mine), device.items(nodes.to(GPU), filter=theirs).cpu())
    for ours, other in zip(
        host.children(nodes, filter=mine), device.children(nodes.to(GPU), filter=theirs), strict=True
    ):
        assert torch.equal(ours, other.cpu())


@pytest.mark.parametrize(
    ("items", "levels", "size"), [(1, 8, 4096), (4096, 1, 4096), (200_001, 4, 256), (200_001, 8, 4096)]
)
def test_the_trie_built_here_is_the_cpus(items, levels, size):
    """One item, a full root, keys of 96 bits; and the same rows named where two are equal."""
    codes = codes_of(items, levels, size) if levels > 1 else torch.randperm(size)[:, None]
    assert dispatch.choose("trie_build", GPU).backend == "triton"
    for dtype in (torch.int16, torch.int64):
        ours, wanted = build(codes.to(GPU, dtype), size), build(codes, size)
        for name in ("code", "first_child", "rows"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(wanted, name)), name
    twice = torch.cat((codes, codes[-1:]))
    with pytest.raises(DuplicateCodes) as error:
        build(twice.to(GPU), size)
    assert error.value.pairs == [(len(codes) - 1, len(codes))]


def requests_of(trie: Trie, users: int, seed: int) -> RequestFilter:
    """A filter for every other request, and items in a row left out of each, so that nodes above close."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(2, trie.num_items, generator=generator) < 0.3
    own = [ItemFilter.from_mask(trie, rows.to(trie.device)) for rows in allowed]
    ranks = torch.randint(trie.num_items, (users, 1), generator=generator) + torch.arange(30)
    left_out = RequestFilter.excluding(trie, trie.ids_by_rank[(ranks % trie.num_items).to(trie.device)])
    return RequestFilter.stack([[*own, None][user % 3] for user in range(users)]) & left_out


@pytest.mark.parametrize(("items", "levels", "size"), [(1, 1, 1), (500, 3, 8), (200_001, 4, 256)])
@pytest.mark.parametrize("fast", [True, False])
def test_filters_made_here_are_the_cpus(items, levels, size, fast):
    host = Trie.from_codes(codes_of(items, levels, size), size)
    device = host.to(GPU)
    assert device.arrays is host.arrays.to(GPU)  # one copy for the filters that move too
    wanted = requests_of(host, 5, seed=3)
    ranks = torch.arange(0, host.num_items, 2)
    first = wanted.filters[0]
    assert first is not None
    try:
        use_fast_kernels(fast)
        found = requests_of(device, 5, seed=3)
        moved = first.to(GPU).without_ranks(ranks.to(GPU)), first.to(GPU) & ~first.to(GPU)
    finally:
        use_fast_kernels(None)
    assert torch.equal(found.tensors.open.cpu(), wanted.tensors.open)
    assert torch.equal(found.tensors.filter_of.cpu(), wanted.tensors.filter_of)
    ours, theirs = found.tensors.closed.cpu(), wanted.tensors.closed
    most = min(ours.shape[1], theirs.shape[1])  # backends leave more or less room
    assert torch.equal(ours[:, :most], theirs[:, :most])
    assert bool((ours[:, most:] == NO_NODE).all()) and bool((theirs[:, most:] == NO_NODE).all())
    assert torch.equal(moved[0].open.cpu(), first.without_ranks(ranks).open)
    assert not moved[1].open.any()


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("filtered", ["", "one", "requests"])
@pytest.mark.parametrize(
    ("users", "beams", "size", "width"),
    [
        (3, 5, 8, 9),
        (6, 20, 64, 20),
        (1, 50, 256, 50),
        (3, 50, 2048, 50),
        (2, 7, 4096, 256),
        (2, 256, 300, 256),
    ],
)
def test_softmax_and_beam_step_equal_the_reference(normalize, filtered, users, beams, size, width):
    host = Trie.from_codes(codes_of(4000, 3, size), size)
    device = host.to(GPU)
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(host.num_items, generator=generator) < 0.3
    mine = theirs = None
    if filtered == "one":
        mine = ItemFilter.from_mask(host, allowed)
        theirs = ItemFilter.from_mask(device, allowed.to(GPU))
    if filtered == "requests":
        mine, theirs = requests_of(host, users, seed=4), requests_of(device, users, seed=4)
    nodes = torch.randint(0, host.arrays.num_inner, (users, beams), generator=generator).to(torch.int32)
    logits = torch.randn(users, beams, size, generator=generator)
    scores = -torch.rand(users, beams, generator=generator)
    total = logits.logsumexp(2) + 1 if normalize == "vocab" else None
    on_gpu = None if total is None else total.to(GPU)
    wanted = trie_beam_step(logits, scores, nodes, host, width, normalize, total, mine, backend="reference")
    found = trie_beam_step(
        logits.to(GPU), scores.to(GPU), nodes.to(GPU), device, width, normalize, on_gpu, theirs,
        backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(found.scores.cpu(), wanted.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pruned.cpu(), wanted.pruned, rtol=0, atol=1e-5)
    if normalize == "vocab":  # the same bits, so the same order
        for name in ("parents", "codes", "nodes"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name
    alive = found.nodes >= 0
    walked = device.advance(nodes.to(GPU).gather(1, found.parents), found.codes, filter=theirs)
    assert torch.equal(walked[alive], found.nodes[alive])
    rows = logits.flatten(0, 1), nodes.flatten()
    flat = None if total is None else total.flatten()
    log_prob = trie_softmax(*rows, host, normalize, flat, mine, backend="reference")
    on_device = trie_softmax(
        *(r.to(GPU) for r in rows), device, normalize, None if flat is None else flat.to(GPU), theirs,
        backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(on_device.cpu(), log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_narrow_logits_equals_the_references(dtype):
    host = Trie.from_codes(codes_of(4000, 3, 256), 256)
    nodes = torch.arange(1, 101, dtype=torch.int32).view(2, 50)
    logits = torch.randn(2, 50, 256, generator=torch.Generator().manual_seed(6)).to(dtype)
    scores = torch.zeros(2, 50)
    total = logits.float().logsumexp(2)
    wanted = trie_beam_step(logits, scores, nodes, host, 50, "vocab", total, backend="reference")
    found = trie_beam_step(
        logits.to(GPU), scores.to(GPU), nodes.to(GPU), host.to(GPU), 50, "vocab", total.to(GPU)
    )
    for name in wanted._fields:
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


def test_a_compiled_function_calls_the_kernels():
    trie = Trie.from_codes(codes_of(4000, 3, 64), 64).to(GPU)
    nodes = torch.arange(1, 41, dtype=torch.int32, device=GPU).view(2, 20)
    logits, scores = torch.randn(2, 20, 64, device=GPU), torch.zeros(2, 20, device=GPU)

    def step(logits: torch.Tensor) -> torch.Tensor:
        return trie_beam_step(logits * 2, scores, nodes, trie, 20, "valid").scores + 1

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(logits), step(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "m", "k", "d"), [(1, 1, 1, 1), (5000, 4, 256, 64), (3000, 3, 2048, 32), (999, 8, 300, 128)]
)
def test_codes_are_the_references_exactly(n, m, k, d, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator).to(GPU, dtype)
    codebooks = torch.randn(m, k, d, generator=generator).to(GPU, dtype)
    near = torch.cat((codebooks, codebooks * (1 + 2**-7)), dim=1)  # many near ties
    for books in (codebooks, near):
        codes, quantized = residual_quantize(x, books, backend="triton")
        wanted, total = residual_quantize(x, books, backend="reference")
        assert torch.equal(codes, wanted)
        assert torch.equal(quantized, total)


@pytest.mark.parametrize("dim", [1, 33, 64, 256])
def test_propagation_and_its_gradient_equal_the_reference(dim):
    generator = torch.Generator().manual_seed(4)
    users, items = (
        torch.randint(300, (9000,), generator=generator),
        torch.randint(200, (9000,), generator=generator),
    )
    users[:2500], items[:2500] = 300, torch.arange(2500)  # one vertex of several chunks
    graph = BipartiteGraph.from_edges(users, items, 301, 2500).to(GPU)
    x = torch.randn(2801, dim, generator=generator).to(GPU)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        own = x.to(dtype, copy=True).requires_grad_()
        out = lightgcn_propagate(graph, own, 3, backend=backend)
        (out * x.cos()).sum().backward()
        results.append((out.detach(), own.grad))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-5)


def test_what_triton_does_not_take_goes_to_cusparse_and_a_bfloat16_table_keeps_its_bound():
    generator = torch.Generator().manual_seed(7)
    users, items = (torch.randint(200, (3000,), generator=generator) for _ in range(2))
    graph = BipartiteGraph.from_edges(users, items, 200, 200).to(GPU)
    for dim, dtype, atol in ((8, torch.float64, 1e-12), (1025, torch.float32, 1e-5)):
        x = torch.randn(400, dim, generator=generator, dtype=dtype).to(GPU)
        wanted = lightgcn_propagate(graph, x, 3, backend="reference")
        torch.testing.assert_close(lightgcn_propagate(graph, x, 3), wanted, rtol=0, atol=atol)
        assert torch.equal(lightgcn_propagate(graph, x, 3), lightgcn_propagate(graph, x, 3, backend="sparse"))
    x = torch.randn(400, 64, generator=generator).to(GPU)
    wanted, size = (lightgcn_propagate(graph, y, 3, backend="reference") for y in (x, x.abs()))
    off = (lightgcn_propagate(graph, x, 3, table_dtype=torch.bfloat16) - wanted).abs()
    assert (off <= 1.01 * 3 * 2**-9 * size + 1e-6).all()


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("prefix", [False, True])
def test_attention_over_own_tokens_equals_the_reference(dtype, atol, groups, tokens, prefix):
    generator = torch.Generator().manual_seed(0)
    query, kept = (torch.randn(shape, generator=generator) for shape in ((70, 8, 64), (200, 2, groups, 64)))
    ancestors = torch.randint(200, (tokens, 70), generator=generator)
    bias = torch.randn(tokens, 8, generator=generator)
    given = (torch.randn(70, 8, 64, generator=generator), torch.randn(70, 8, generator=generator) * 3)
    wanted = beam_tree_attention(query, kept, ancestors, 0.125, bias, given if prefix else None)
    there = (given[0].to(GPU, dtype), given[1].to(GPU)) if prefix else None
    found = beam_tree_attention(
        query.to(GPU, dtype), kept.to(GPU, dtype), ancestors.to(GPU), 0.125, bias.to(GPU, dtype), there
    )
    assert dispatch.choose("beam_tree_attention", GPU).backend == "triton" and found.dtype == dtype
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("groups", "dim"), [(8, 64), (2, 64), (2, 128), (8, 16)])
def test_attention_over_a_prompt_equals_the_reference(dtype, atol, groups, dim):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 50, 8, dim, generator=generator)
    keys, values = (torch.randn(3, groups, 83, dim, generator=generator) for _ in range(2))
    mask = torch.zeros(3, 83)
    mask[1, 70:], mask[2, :50] = torch.finfo(dtype).min / 2, torch.finfo(dtype).min / 2
    drawn = query, keys, values, mask
    wanted = shared_prefix_attention(*drawn, 0.125)
    found = shared_prefix_attention(*(part.to(GPU, dtype) for part in drawn), 0.125)
    assert dispatch.choose("shared_prefix_attention", GPU).backend == "triton" and found[0].dtype == dtype
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.float().cpu(), right, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 3000, 33_152])
def test_the_log_sum_exp_of_rows_equals_the_reference(dtype, columns):
    logits = (torch.randn(50, columns, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    found = row_logsumexp(logits.to(GPU))
    assert dispatch.choose("row_logsumexp", GPU).backend == "triton"
    torch.testing.assert_close(found.cpu(), row_logsumexp(logits), rtol=0, atol=2e-5)


def t5() -> PreTrainedModel:
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=3 + 3 * 32, decoder_start_token_id=0, pad_token_id=0, **shape)
    )


def llama() -> PreTrainedModel:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=3 + 3 * 32, num_key_value_heads=2, pad_token_id=0, **shape)
    )


@pytest.mark.parametrize("build", [t5, llama])
@pytest.mark.parametrize("normalize", ["vocab", "valid"])
def test_the_engine_gives_the_cpus_lists(build, normalize):
    torch.manual_seed(5)
    model = build().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    catalog = Catalog.from_codes(codes_of(900, 3, 32), 32)
    ids, mask = torch.randint(3, 99, (5, 12)), torch.ones(5, 12, dtype=torch.int64)
    wanted = Decoder(model, catalog, 3, normalize).decode(ids, mask, 20)
    found = Decoder(model.to(GPU), catalog, 3, normalize).decode(ids, mask, 20)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-3)
    assert (found.items == wanted.items).float().mean() > 0.95


def test_threads_that_share_a_decoder_get_their_own_lists():
    torch.manual_seed(5)
    model = t5().eval().to(GPU)
    catalog = Catalog.from_codes(codes_of(900, 3, 32), 32)
    recorded, plain = (Decoder(model, catalog, 3, graphs=graphs) for graphs in (True, False))
    asked = [(torch.randint(3, 99, (2, 12)), torch.ones(2, 12, dtype=torch.int64)) for _ in range(16)]
    wanted = [plain.decode(*prompts, 8).scores for prompts in asked]
    with ThreadPoolExecutor(4) as threads:  # the first of them record
        found = list(threads.map(lambda prompts: recorded.decode(*prompts, 8).scores, asked))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [t5, llama])
def test_a_replayed_graph_gives_the_searchs_own_lists(build):
    torch.manual_seed(5)
    model = build().eval().to(GPU)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    catalog = Catalog.from_codes(codes_of(900, 3, 32), 32)
    recorded, plain = (Decoder(model, catalog, 3, graphs=graphs) for graphs in (True, False))
    for batch, length, shortest in [
        (5, 12, 12),
        (3, 9, 9),
        (8, 16, 16),
        (1, 30, 30),
        (8, 16, 1),
        (5, 12, 12),
    ]:
        ids = torch.randint(3, 99, (batch, length))
        lengths = torch.linspace(shortest, length, batch).long()  # a decoder's prompts end together
        places = torch.arange(length) if recorded.graphs.pad_left else torch.arange(length).flip(0)
        mask = (places[None] >= length - lengths[:, None]).long()
        found, wanted = recorded.decode(ids, mask, 20), plain.decode(ids, mask, 20)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)
        assert (found.items == wanted.items).float().mean() > 0.95
    kinds = {(bucket, tokens) for _, bucket, tokens, _ in recorded.graphs.recordings}
    assert kinds == {((8, 16), 64), ((4, 16), 32), ((8, 16), None), ((1, 32), None), ((8, 16), 96)}


@pytest.mark.parametrize("build", [t5, llama])
def test_a_replayed_graph_obeys_each_calls_own_filter(build):
    torch.manual_seed(5)
    model = build().eval().to(GPU)
    catalog = Catalog.from_codes(codes_of(900, 3, 32), 32)
    recorded, plain = (Decoder(model, catalog, 3, graphs=graphs) for graphs in (True, False))
    trie, generator = plain.trie, torch.Generator().manual_seed(6)
    for users, most in [(4, 30), (3, 25), (4, 28)]:  # of one class of lists, 128 nodes
        ids, mask = torch.randint(3, 99, (users, 12)), torch.ones(users, 12, dtype=torch.int64)
        left_out = RequestFilter.excluding(trie, torch.randint(900, (users, most), generator=generator))
        allowed = [torch.rand(900, generator=generator) < 0.3 for _ in range(users)]
        own = [ItemFilter.from_mask(trie, rows.to(GPU)) for rows in allowed]
        for filter in (own[0], left_out, RequestFilter.stack(own), RequestFilter.stack(own) & left_out):
            found, wanted = (d.decode(ids, mask, 20, filter=filter) for d in (recorded, plain))
            torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)
            assert (found.items == wanted.items).float().mean() > 0.95
        assert all(bool(rows[items].all()) for rows, items in zip(allowed, found.items, strict=True))
    assert recorded.graphs is not None and len(recorded.graphs.recordings) == 4  # a kind each
