"""Beam selection, by every backend, against a sort of all candidates in Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import ItemFilter, RequestFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.constrained.softmax import flat_arguments, sanitize
from cemg_kernels.runtime import dispatch

pytestmark = pytest.mark.medium

INF = float("inf")
BACKENDS = ["reference", "torch", "native", "triton"]


def make_trie(size: int, levels: int, items: int, *, seed: int = 0) -> Trie:
    generator = torch.Generator().manual_seed(seed)
    return Trie.from_codes(
        torch.unique(torch.randint(size, (items, levels), generator=generator), dim=0), size
    )


def brute_force(log_prob: Tensor, scores: Tensor, nodes: Tensor, trie: Trie, width: int):
    """Returns the kept (score, parent, code, node) of a user and the best pruned score, by sorting tuples."""
    candidates = []
    for w in range(log_prob.shape[0]):
        for k in range(trie.codebook_size):
            total = float(scores[w] + log_prob[w, k])
            if total > -INF:
                child = int(trie.advance(nodes[w : w + 1], torch.tensor([k])))
                candidates.append((-total, w, k, child))
    candidates.sort()
    kept = [(-s, w, k, child) for s, w, k, child in candidates[:width]]
    kept += [(-INF, 0, 0, -1)] * (width - len(kept))
    return kept, -candidates[width][0] if len(candidates) > width else -INF


def assert_step_is_brute_force(
    logits, scores, nodes, trie, width, backend, normalize="level", filter=None, total=None
):
    """Checks for equal bits. Where Triton sums in another order, starts from the same log-sum-exps."""
    flat = (logits.reshape(-1, trie.codebook_size), nodes.flatten())
    if backend == "triton" and total is None:
        allowed = trie.mask(flat[1], filter=filter) if normalize == "valid" else torch.tensor(True)
        total, normalize = sanitize(flat[0]).masked_fill(~allowed, -INF).logsumexp(1), "vocab"
    shaped = None if total is None else total.view(nodes.shape)
    step = trie_beam_step(logits, scores, nodes, trie, width, normalize, shaped, filter, backend=backend)
    softmax = backend if backend in ("native", "triton") else "reference"
    log_prob = trie_softmax(*flat, trie, normalize, total, filter, backend=softmax)
    for b, rows in enumerate(log_prob.view(logits.shape)):
        kept, pruned = brute_force(rows, scores[b], nodes[b], trie, width)
        actual = zip(*(t[b].tolist() for t in step[:4]), strict=True)
        assert list(actual) == kept
        assert float(step.pruned[b]) == pruned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["level", "valid"])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(
    ("users", "beams", "size", "width"), [(1, 1, 1, 1), (2, 3, 31, 5), (3, 2, 64, 8), (2, 4, 5, 50)]
)
def test_a_step_equals_a_sort_of_all_candidates(backend, normalize, filtered, users, beams, size, width):
    trie = make_trie(size, 3, size * 4)
    generator = torch.Generator().manual_seed(1)
    nodes = torch.randint(-1, trie.arrays.num_inner, (users, beams), generator=generator).to(torch.int32)
    logits = torch.randn(users, beams, size, generator=generator)
    scores = -torch.rand(users, beams, generator=generator)
    chosen = ItemFilter.from_mask(trie, torch.arange(trie.num_items) % 3 == 0) if filtered else None
    assert_step_is_brute_force(logits, scores, nodes, trie, width, backend, normalize, chosen)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("width", [1, 20, 333])
def test_among_thousands_of_ties_the_lowest_parents_and_codes_are_kept(filtered, width):
    # 5 of 6 codes continue a node, which gives rows of several scans and many pruned candidates
    trie = make_trie(600, 2, 100_000)
    generator = torch.Generator().manual_seed(2)
    nodes = 1 + torch.arange(24, dtype=torch.int32).view(2, 12)
    logits = torch.randint(-3, 3, (2, 12, 600), generator=generator).float()
    logits[0, 3, ::7], logits[1, 5, ::11], logits[1, 6, 100:] = float("nan"), INF, -INF
    scores = -torch.randint(3, (2, 12), generator=generator).float()
    total = torch.full((2, 12), 6.5)
    chosen = ItemFilter.from_mask(trie, torch.arange(trie.num_items) % 3 == 0) if filtered else None
    steps = (
        trie_beam_step(logits, scores, nodes, trie, width, "vocab", total, chosen, backend=backend)
        for backend in ("native", "reference")
    )
    for actual, expected in zip(*steps, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [256, 2048])
@pytest.mark.parametrize("kind", ["random", "tied", "best codes lead nowhere", "some excluded", "odd values"])
def test_one_user_with_nodes_of_any_density_equals_the_definition(size, kind):
    counts = [1, 2, 15, 17, 33, size // 4, size // 2 + 1, size * 2 // 3, size - 1, size] * 8
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.stack((torch.full((n,), i), torch.randperm(size, generator=generator)[:n]), 1)
        for i, n in enumerate(counts)
    ]
    trie = Trie.from_codes(torch.cat(rows), size)
    nodes = trie.lookup(torch.arange(len(counts))[:, None])[None]  # [1, 80]
    logits = torch.randn(1, len(counts), size, generator=generator)
    scores = -torch.rand(1, len(counts), generator=generator).sort().values
    excluded = None
    if kind == "tied":
        logits = logits.round()
    elif kind == "best codes lead nowhere":
        logits += 20.0 * ~trie.mask(nodes[0])[None]
    elif kind == "some excluded":
        best = (logits + scores[..., None]).masked_fill(~trie.mask(nodes[0])[None], -INF)
        children = trie.advance(nodes[0].repeat_interleave(size), torch.arange(size).repeat(len(counts)))
        excluded = RequestFilter.excluding(trie, [trie.items(children[best.flatten().topk(60).indices])])
    elif kind == "odd values":
        logits[0, 8, 5], logits[0, 9, 7], logits[0, 18, ::3], logits[0, 19] = math.nan, INF, -INF, -INF
    total = sanitize(logits).logsumexp(2)
    for width in (1, 50, 400):
        for normalize in ("vocab", "level", "valid"):
            actual, expected = (
                trie_beam_step(logits, scores, nodes, trie, width, normalize,
                               total if normalize == "vocab" else None, excluded, backend=backend)
                for backend in ("native", "reference")
            )  # fmt: skip
            if normalize == "vocab":
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            else:  # log-sum-exps below 16, or below 32 if all codes count, with two roundings
                rounding = 2**-19 if normalize == "valid" else 2**-18
                torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=rounding)
                torch.testing.assert_close(actual.pruned, expected.pruned, rtol=0, atol=rounding)


@settings(max_examples=120, deadline=None)
@given(
    users=st.integers(1, 2),
    beams=st.integers(1, 4),
    size=st.integers(1, 6),
    width=st.integers(1, 12),
    normalize=st.sampled_from(["vocab", "level", "valid"]),
    allowed=st.sampled_from(["all", "some", "none", "by request"]),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_ties_and_special_values_are_ordered_as_in_a_stable_sort(
    users, beams, size, width, normalize, allowed, backend, seed
):
    trie = make_trie(size, 2, 9, seed=seed % 100)
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, -INF, INF, math.nan])

    def draw(values: Tensor, *shape: int) -> Tensor:
        return values[torch.randint(len(values), shape, generator=generator)]

    def some() -> ItemFilter:
        return ItemFilter.from_mask(trie, torch.rand(trie.num_items, generator=generator) < 0.5)

    nodes = torch.randint(-1, trie.num_nodes, (users, beams), generator=generator).to(torch.int32)
    scores = draw(torch.tensor([0.0, -0.0, -1.0, -INF, math.nan]), users, beams)
    total = draw(odd, users * beams) if normalize == "vocab" else None
    chosen = {
        "all": lambda: None,
        "some": some,
        "none": lambda: ItemFilter.from_items(trie, []),
        "by request": lambda: (
            RequestFilter.stack([some(), None][:users])
            & RequestFilter.excluding(trie, draw(torch.arange(-1, trie.num_items), users, 3))
        ),
    }[allowed]()
    logits = draw(odd, users, beams, size)
    assert_step_is_brute_force(logits, scores, nodes, trie, width, backend, normalize, chosen, total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
def test_logits_of_any_float_dtype_and_stride_equal_float32_logits(backend, dtype, normalize):
    trie = make_trie(20, 3, 300, seed=1)
    generator = torch.Generator().manual_seed(2)
    # a slice of the logits of all levels
    logits = torch.randn(2, 2, 50, generator=generator).to(dtype)[..., 7:27]
    nodes = torch.randint(trie.arrays.num_inner, (2, 2), generator=generator).to(torch.int32)
    scores = -torch.rand(2, 2, generator=generator).to(dtype).t()
    total = logits.float().logsumexp(2) if normalize == "vocab" else None
    step, expected = (
        trie_beam_step(*operands, nodes, trie, 4, normalize, total, backend=backend)
        for operands in ((logits, scores), (logits.float().contiguous(), scores.float().contiguous()))
    )
    assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))
    assert (step.nodes >= 0).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_beams_or_no_users_give_no_candidates(backend):
    trie = make_trie(6, 2, 20)
    for users, beams in ((2, 0), (0, 3)):
        nodes = torch.zeros(users, beams, dtype=torch.int32)
        step = trie_beam_step(
            torch.zeros(users, beams, 6), torch.zeros(users, beams), nodes, trie, 3, "level", backend=backend
        )
        assert step.nodes.shape == (users, 3) and (step.nodes == -1).all()
        assert step.scores.isneginf().all() and step.pruned.isneginf().all() and not step.parents.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_beams_have_no_candidates_and_stay_dead(backend):
    trie = Trie.from_codes(torch.tensor([[0, 0], [0, 1], [1, 0]]), 2)
    nodes = torch.tensor([[1, 1, -1, 2]], dtype=torch.int32)
    scores = torch.tensor([[-INF, math.nan, 0.0, -0.5]])
    step = trie_beam_step(torch.zeros(1, 4, 2), scores, nodes, trie, 3, "valid", backend=backend)
    assert step.scores.tolist() == [[-0.5, -INF, -INF]]
    assert step.parents.tolist() == [[3, 0, 0]]
    assert step.nodes.tolist() == [[5, -1, -1]]
    assert step.pruned.tolist() == [-INF]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_beam_as_wide_as_the_catalog_finds_the_exact_ranking(backend):
    """A beam as wide as the catalog prunes nothing, so the result is the exact ranking."""
    trie = make_trie(4, 3, 30, seed=4)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))  # one row per level
    wide = trie.num_items
    nodes, scores = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1)
    for m in range(3):
        rows = logits[m].expand(1, nodes.shape[1], 4)
        step = trie_beam_step(rows, scores, nodes, trie, wide, "level", backend=backend)
        nodes, scores = step.nodes, step.scores
        assert step.pruned.tolist() == [-INF]
    log_prob = logits.log_softmax(1)
    leaves = torch.arange(trie.arrays.num_inner, trie.num_nodes)
    assert sorted(nodes[0].tolist()) == leaves.tolist()
    ids = trie.items(nodes[0])
    codes = torch.empty(wide, 3, dtype=torch.int64)  # the codes of each item, from the path of each beam
    for code in torch.cartesian_prod(*[torch.arange(4)] * 3):
        item = int(trie.items(trie.lookup(code[None])))
        if item >= 0:
            codes[item] = code
    expected = log_prob[torch.arange(3), codes].sum(1)[ids]
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=6 * 2**-21)  # sums of three terms below 8
    assert (scores[0].diff() <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocab_uses_the_logsumexp_of_the_caller(backend):
    trie = Trie.from_codes(torch.arange(4)[:, None], 4)
    logits, total = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), torch.tensor([[4.0]])
    nodes = torch.zeros(1, 1, dtype=torch.int32)
    step = trie_beam_step(logits, torch.zeros(1, 1), nodes, trie, 2, "vocab", total, backend=backend)
    assert step.scores.tolist() == [[-1.0, -2.0]] and step.pruned.tolist() == [-3.0]


def test_arguments_that_do_not_fit_are_rejected():
    trie = make_trie(5, 2, 10)
    logits, scores, nodes = torch.zeros(2, 3, 5), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="width"):
        trie_beam_step(logits, scores, nodes, trie, 0, "level")
    with pytest.raises(ValueError, match="scores"):
        trie_beam_step(logits, scores[:, :2], nodes, trie, 3, "level")
    with pytest.raises(ValueError, match="logits"):
        trie_beam_step(logits[..., :4], scores, nodes, trie, 3, "level")
    with pytest.raises(ValueError, match="needs logsumexp"):
        trie_beam_step(logits, scores, nodes, trie, 3)


def step_arguments(users: int = 2) -> tuple[Trie, ItemFilter, Tensor, Tensor, Tensor]:
    """Returns a trie, a filter, and logits, scores and nodes of 3 beams with 6 codes."""
    trie = make_trie(6, 3, 60)
    chosen = ItemFilter.from_mask(trie, torch.arange(trie.num_items) % 3 > 0)
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randint(-1, trie.arrays.num_inner, (users, 3), generator=generator).to(torch.int32)
    return (trie, chosen, torch.randn(users, 3, 6, generator=generator), -torch.rand(users, 3), nodes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("users", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_custom_op_passes_opcheck(backend, users):
    trie, chosen, logits, scores, nodes = step_arguments(users)
    one_each = RequestFilter.stack([chosen, None][:users]) & RequestFilter.excluding(trie, [[3, 9]] * users)
    by_columns = logits.transpose(1, 2).contiguous().transpose(1, 2)
    cases = zip((None, chosen.tensors, one_each.tensors), (logits, by_columns, logits), range(3), strict=True)
    for allowed, laid_out, over in cases:
        total = logits.logsumexp(2) if over == 0 else None
        operands = laid_out, scores, nodes, 4, over, total, backend
        torch.library.opcheck(
            torch.ops.cemg.trie_beam_step.default, (*flat_arguments(trie.arrays, allowed), *operands)
        )


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_beam_step_compiles_without_a_graph_break(engine, filtered):
    trie, chosen, logits, scores, nodes = step_arguments()
    allowed = chosen if filtered else None

    def two_steps(logits: Tensor, scores: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = trie_beam_step(logits, scores, nodes, trie, 3, "level", None, allowed)
        second = trie_beam_step(logits * 2, first.scores, first.nodes, trie, 2, "valid", None, allowed)
        return second.scores + 0, second.codes, second.nodes

    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend=engine)
    for actual, expected in zip(
        compiled(logits, scores, nodes), two_steps(logits, scores, nodes), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.skipif(not dispatch.native_available(), reason="the C++ is not built")
def test_too_many_candidates_for_the_native_backend_are_rejected():
    trie = Trie.from_codes(torch.tensor([[0], [32767]]), 32768)
    with pytest.raises(ValueError, match="131073 beams with 32768 codes each are more than 2\\^32"):
        dispatch.native().trie_beam_step(
            trie.arrays.view, None, logits=0, logsumexp=0, normalize=dispatch.native().Normalize.VALID,
            scores=0, nodes=0, users=1, beams=2**17 + 1, width=1, next_scores=0, parents=0, codes=0,
            next_nodes=0, pruned=0,
        )  # fmt: skip
