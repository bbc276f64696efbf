"""Item priors: their construction, their tensors on a trie, and beam steps under them by every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg_kernels import ItemFilter, ItemPrior, RequestFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.constrained.prior import UNIT, PriorTensors, child_masses, mixed_scores
from cemg_kernels.constrained.softmax import flat_arguments
from cemg_kernels.runtime.dispatch import use_fast_kernels

INF = float("inf")
BACKENDS = ["reference", "torch", "native"]  # test_mixture_triton.py tests the Triton kernel
TRIE = Trie.from_codes([[0, 0], [0, 1], [1, 0], [3, 2]], 4, [10, 11, 12, 13])  # in rank order


def make_trie(size: int, levels: int, items: int, seed: int = 0) -> Trie:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.unique(torch.randint(size, (items, levels), generator=generator), dim=0)
    return Trie.from_codes(codes[torch.randperm(len(codes), generator=generator)], size)


def draw_prior(trie: Trie, users: int, seed: int, most: int = 40) -> ItemPrior:
    """Masses between 1e-9 and 1 on a random number of items."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, min(most, trie.num_items) + 1, users)
    items = [rng.choice(trie.num_items, n, replace=False) for n in counts]
    return ItemPrior(items, [10.0 ** -rng.integers(0, 10, n) * rng.random(n) for n in counts])


@pytest.mark.parametrize(
    "given",
    [
        ([10, 12], [1.0, 3.0]),
        ((10, 12), (1, 3)),
        ([[10, 12]], [[1, 3]]),
        (np.array([10, 12], dtype=np.int32), np.array([2.0, 6.0], dtype=np.float32)),
        (torch.tensor([[12, 10]]), torch.tensor([[1.5, 0.5]])),
        ([torch.tensor([12, 10])], [np.array([1.5e300, 0.5e300])]),
        ([[12, 10, 11]], [[3e-300, 1e-300, 0]]),
    ],
)
def test_priors_are_normalised_whatever_holds_them(given):
    tensors = ItemPrior(*given).on(TRIE, 0.25)
    zeros = [0.0] * (tensors.ranks.shape[1] - 2)
    assert tensors.sums.tolist() == [[0.0, 0.25, *[0.25 for _ in zeros], 1.0]]
    assert tensors.ranks[0, [0, -1]].tolist() == [0, 2] and tensors.weight.tolist() == [0.25]


def test_requests_of_different_lengths_are_padded_with_the_number_of_items():
    tensors = ItemPrior([[13, 10, 11], [], [12]], [[1, 1, 2], [], [5]]).on(TRIE, [0.5, 0.5, 1.0])
    assert tensors.ranks.tolist() == [[0, 1, 3], [4, 4, 4], [2, 4, 4]] and tensors.ranks.dtype == torch.int32
    assert tensors.sums.tolist() == [[0, 0.25, 0.75, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert tensors.weight.tolist() == [0.5, 0.0, 1.0]  # the second has no prior


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("scale", [1e308, 1e290, 1.0, 1e-290])
def test_small_masses_beside_huge_ones_stay_and_count_once_those_are_filtered_out(scale, fast):
    """Whatever the ratio, a positive mass is at least one unit, and exact after a renormalisation."""
    small = max(1e-315, scale * 1e-200 * 1e-130)
    prior = ItemPrior([[10, 11, 12, 13], [10, 12]], [[small * 3, scale, small, 0.0], [1.0, 3.0]])
    everything = torch.tensor([[[i, i + 1] for i in range(4)]] * 2, dtype=torch.int32)
    use_fast_kernels(fast)
    try:
        whole = prior.on(TRIE, 0.5)
        rest = prior.on(TRIE, 0.5, ItemFilter.from_items(TRIE, [10, 12, 13]))
    finally:
        use_fast_kernels(None)
    assert whole.masses_of(everything).tolist() == [[UNIT, 1, UNIT, 0], [0.25, 0, 0.75, 0]]
    left = rest.masses_of(everything)[0]
    torch.testing.assert_close(left, torch.tensor([0.75, 0, 0.25, 0], dtype=torch.float64), rtol=1e-3, atol=0)
    assert rest.weight.tolist() == [0.5, 0.5]


def test_masses_are_renormalised_over_the_allowed_items():
    prior = ItemPrior([[10, 12, 13], [11, 12]], [[1, 1, 3], [1, 3]])
    seen = RequestFilter.excluding(TRIE, [[13], [12, 11]])
    tensors = prior.on(TRIE, 0.5, seen)
    everything = torch.tensor([[[0, 4], [0, 2], [2, 3], [3, 4]]] * 2, dtype=torch.int32)
    assert tensors.masses_of(everything).tolist() == [[1, 0.5, 0.5, 0], [0, 0, 0, 0]]
    assert tensors.weight.tolist() == [0.5, 0.0]  # of the second request no item is left
    one = prior.on(TRIE, 0.5, ItemFilter.from_items(TRIE, [12, 13]))
    assert one.masses_of(everything)[:, 2:].tolist() == [[0.25, 0.75], [1, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_the_masses_of_the_children_sum_to_that_of_their_node_in_every_bit(seed):
    trie = make_trie(5, 3, 60, seed)
    prior = draw_prior(trie, 2, seed)
    tensors = prior.on(trie, 0.5)
    items, mass = prior.padded()
    for row in range(2):
        own = {int(i): float(m) for i, m in zip(items[row], mass[row], strict=True) if i >= 0}
        total = math.fsum(own.values())
        begins = torch.arange(trie.num_items, dtype=torch.int32)
        leaves = torch.stack((begins, begins + 1), 1).expand(2, -1, -1)
        single = tensors.masses_of(leaves)[row]
        for rank, item in enumerate(trie.ids_by_rank.tolist()):
            assert abs(float(single[rank]) - own.get(item, 0.0) / total) <= 2 * UNIT
            assert (float(single[rank]) > 0) == (own.get(item, 0.0) > 0)
    nodes = torch.arange(trie.arrays.num_inner, dtype=torch.int32).expand(2, -1)
    below = child_masses(trie.arrays, tensors, nodes)
    ranks = trie.interval(nodes[0]).expand(2, -1, -1)
    assert torch.equal(below.sum(2), tensors.masses_of(ranks))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("given_ids", [False, True])
def test_one_call_of_cpp_builds_the_tensors_of_the_definition(seed, given_ids):
    rows = torch.randperm(343, generator=torch.Generator().manual_seed(seed))[:150]
    codes = torch.stack((rows // 49, rows // 7 % 7, rows % 7), dim=1)
    trie = Trie.from_codes(codes, 7, rows * 5 + 3 if given_ids else None)
    prior = draw_prior(trie, 4, seed)
    prior.mass[::3] = 0.0
    if given_ids:
        prior = prior.renamed(rows.numpy()[prior.items] * 5 + 3)
    some = prior.items[[0, -1]].tolist()
    filters = (
        None,
        ItemFilter.from_mask(trie, torch.arange(150) % 3 > 0),
        RequestFilter.excluding(trie, [prior.items[: prior.counts[0]].tolist(), [], some, some]),
    )
    for filter in filters:
        built = prior.on(trie, [0.1, 0.2, 0.0, 1.0], filter)
        use_fast_kernels(False)
        try:
            expected = prior.on(trie, [0.1, 0.2, 0.0, 1.0], filter)
        finally:
            use_fast_kernels(None)
        assert torch.equal(built.ranks, expected.ranks) and torch.equal(built.weight, expected.weight)
        apart = (built.sums - expected.sums).abs().amax()
        assert float(apart) <= 2 * UNIT * built.ranks.shape[1]
        assert [part.dtype for part in built] == [part.dtype for part in expected]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_native_search_equals_one_by_the_definition(seed, normalize, filtered):
    """Scores within the last bits of two log-sum-exps; the same beams where scores are farther apart."""
    size, users, width = (9, 300, 40)[seed % 3], 3, 12
    trie = make_trie(size, 3, 400, seed)
    filter = RequestFilter.excluding(trie, [[5, 6, 7], [], [1]]) if filtered else None
    tensors = draw_prior(trie, users, seed).on(trie, (0.0, 0.6, 1.0), filter)
    generator = torch.Generator().manual_seed(seed)
    beams = torch.zeros(users, 1), torch.zeros(users, 1, dtype=torch.int32), torch.zeros(users, 1)
    for _ in range(3):
        scores, nodes, own = beams
        logits = torch.randn(*nodes.shape, size, generator=generator) * 4
        total = logits.logsumexp(2) + 0.1 if normalize == "vocab" else None
        operands = logits, scores, nodes, trie, width, normalize, total, filter
        found, expected = (
            trie_beam_step(*operands, backend=backend, prior=tensors, generator_scores=own)
            for backend in ("native", "reference")
        )
        for part in ("scores", "generator_scores", "pruned"):
            mine, other = getattr(found, part), getattr(expected, part)
            torch.testing.assert_close(mine, other, rtol=0, atol=0 if normalize == "vocab" else 2**-18)
        apart = (expected.scores.diff(dim=1).abs() > 2**-16) | expected.scores[:, 1:].isneginf()
        clear = torch.nn.functional.pad(apart, (1, 0), value=True) & torch.nn.functional.pad(apart, (0, 1))
        assert clear.any() and torch.equal(found.nodes[clear], expected.nodes[clear])
        beams = expected.scores, expected.nodes, expected.generator_scores


@pytest.mark.parametrize(
    ("items", "mass", "message"),
    [
        ([[1, 2]], [[1.0]], r"got \[2\] items and \[1\] masses"),
        ([[1], [2]], [[1.0]], r"got \[1, 1\] items and \[1\] masses"),
        ([[1], [2]], [[1.0], [0.0]], "the masses of request 1 of the prior sum to 0"),
        ([[1], [2, 3]], [[1.0], [1.0, -0.5]], "request 1 of the prior has the mass -0.5"),
        ([[1]], [[math.nan]], "request 0 of the prior has the mass nan"),
        ([[1]], [[INF]], "request 0 of the prior has the mass inf"),
        ([[1]], [["much"]], "masses of a prior must be numbers"),
        ([1, [2]], [[1.0], [1.0]], "some entries are sequences"),
        ("12", [[1.0]], "items of a prior must be one sequence"),
        (7, [[1.0]], "items of a prior must be one sequence"),
        ([[[1]]], [[[1.0]]], "must be one-dimensional"),
    ],
)
def test_a_prior_without_a_distribution_is_refused(items, mass, message):
    with pytest.raises(ValueError, match=message):
        ItemPrior(items, mass)


@pytest.mark.parametrize(
    ("items", "weight", "message"),
    [
        ([[10], [11, 77]], 0.5, "request 1 of the prior has the item 77, which the trie does not have"),
        ([[10], [11, -1]], 0.5, "request 1 of the prior has the item -1"),
        ([[10], [11, 12, 11]], 0.5, "request 1 of the prior has the item 11 twice"),
        ([["a"], ["b"]], 0.5, "items of a prior must be integers, got 'a'"),
        ([[10], [11]], 1.5, "must be within 0 to 1, got 1.5"),
        ([[10], [11]], [0.5, math.nan], "must be within 0 to 1, got nan"),
        ([[10], [11]], [0.5, 0.5, 0.5], "one number or 2"),
        ([[10], [11]], "half", "a number or 2 numbers"),
    ],
)
def test_items_and_weights_that_do_not_fit_the_trie_are_refused(items, weight, message):
    prior = ItemPrior(items, [[1.0] * len(row) for row in items])
    with pytest.raises(ValueError, match=message):
        prior.on(TRIE, weight)


def test_a_filter_of_another_number_of_requests_is_refused():
    with pytest.raises(ValueError, match="a filter of 2 requests cannot serve 3 rows"):
        ItemPrior([[10]] * 3, [[1]] * 3).on(TRIE, 0.5, RequestFilter.excluding(TRIE, [[13], [12]]))


def brute_force(
    log_prob: Tensor, scores: Tensor, own: Tensor, nodes: Tensor, trie: Trie, mass: dict[int, float],
    weight: float, width: int,
):  # fmt: skip
    """Returns the kept (score, parent, code, node, generator score) of a user and the best pruned score."""
    candidates = []
    for w in range(log_prob.shape[0]):
        for k in range(trie.codebook_size):
            child = int(trie.advance(nodes[w : w + 1], torch.tensor([k])))
            if child < 0 or not float(scores[w]) > -INF:
                continue
            begin, end = trie.interval([child])[0].tolist()
            below = math.fsum(mass.get(rank, 0.0) for rank in range(begin, end))
            g = torch.nan_to_num(own[w], nan=-INF, neginf=-INF) + log_prob[w, k]
            mixed = float(mixed_scores(g[None], torch.tensor([below], dtype=torch.float64),
                                       torch.tensor([weight], dtype=torch.float64)))  # fmt: skip
            if mixed > -INF:
                candidates.append((-mixed, w, k, child, float(g)))
    candidates.sort()
    kept = [(-s, w, k, child, g) for s, w, k, child, g in candidates[:width]]
    kept += [(-INF, 0, 0, -1, -INF)] * (width - len(kept))
    return kept, -candidates[width][0] if len(candidates) > width else -INF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.3), (1e-6, 0.5, 1 - 1e-6)])
@pytest.mark.parametrize(("beams", "size", "width"), [(1, 1, 1), (3, 7, 5), (2, 31, 8), (4, 5, 40)])
def test_a_mixed_step_equals_a_sort_of_all_candidates(backend, filtered, weights, beams, size, width):
    """Exact where all backends share the log-sum-exp; the last bits of log and exp may differ."""
    trie = make_trie(size, 3, size * 4, seed=beams)
    generator = torch.Generator().manual_seed(1)
    nodes = torch.randint(-1, trie.arrays.num_inner, (3, beams), generator=generator).to(torch.int32)
    nodes[:, 0] = 0
    logits = torch.randn(3, beams, size, generator=generator) * 3
    own, scores = -torch.rand(2, 3, beams, generator=generator)
    if beams > 2:
        own[1, 0], own[0, 1], scores[2, 1], scores[0, 2] = -INF, math.nan, -INF, math.nan
    total = logits.logsumexp(2)
    filter = None
    if filtered:
        filter = RequestFilter.excluding(trie, [[0, 1], [2], []])
    tensors = draw_prior(trie, 3, beams).on(trie, weights, filter)
    step = trie_beam_step(
        logits, scores, nodes, trie, width, "vocab", total, filter, backend=backend, prior=tensors,
        generator_scores=own,
    )  # fmt: skip
    log_prob = trie_softmax(logits.flatten(0, 1), nodes.flatten(), trie, "vocab", total.flatten(), filter)
    single = tensors.sums.diff(dim=1)
    for b, rows in enumerate(log_prob.view(logits.shape)):
        mass = dict(zip(tensors.ranks[b].tolist(), single[b].tolist(), strict=True))
        allowed = None if filter is None else filter.select([b])
        children = trie.mask(nodes[b], filter=allowed)
        kept, pruned = brute_force(
            rows.masked_fill(~children, -INF), scores[b], own[b], nodes[b], trie,
            {rank: m for rank, m in mass.items() if rank < trie.num_items}, float(tensors.weight[b]), width,
        )  # fmt: skip
        parts = (step.scores, step.parents, step.codes, step.nodes, step.generator_scores)
        assert list(zip(*(part[b].tolist() for part in parts), strict=True)) == kept
        assert float(step.pruned[b]) == pruned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
def test_a_weight_of_0_gives_the_bits_of_a_step_without_prior(backend, normalize):
    trie = make_trie(16, 3, 200)
    generator = torch.Generator().manual_seed(3)
    nodes = torch.randint(trie.arrays.num_inner, (2, 6), generator=generator).to(torch.int32)
    logits, scores = torch.randn(2, 6, 16, generator=generator), -torch.rand(2, 6, generator=generator)
    total = logits.logsumexp(2) if normalize == "vocab" else None
    operands = logits, scores, nodes, trie, 9, normalize, total
    plain = trie_beam_step(*operands, backend=backend)
    mixed = trie_beam_step(
        *operands, backend=backend, prior=draw_prior(trie, 2, 0).on(trie, [0.0, 0.4]), generator_scores=scores
    )
    for part, expected in zip(mixed[:5], plain, strict=True):
        assert torch.equal(part[0], expected[0])
    assert torch.equal(mixed.generator_scores[0], plain.scores[0])
    assert not torch.equal(mixed.scores[1], plain.scores[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_beam_that_the_generator_rules_out_lives_while_it_has_mass(backend):
    root, zero = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1)
    logits = torch.tensor([[[0.0, -INF, -INF, -INF]]])
    tensors = ItemPrior([12, 13], [3.0, 1.0]).on(TRIE, 0.5)
    step = trie_beam_step(logits, zero, root, TRIE, 4, "valid", backend=backend, prior=tensors,
                          generator_scores=zero)  # fmt: skip
    expected = torch.tensor([[0.5, 0.375, 0.125, 0.0]]).log()
    assert step.codes.tolist() == [[0, 1, 3, 0]] and torch.equal(step.scores, expected)
    assert step.generator_scores.tolist() == [[0.0, -INF, -INF, -INF]]
    following = trie_beam_step(
        torch.zeros(1, 4, 4), step.scores, step.nodes, TRIE, 4, "valid", backend=backend, prior=tensors,
        generator_scores=step.generator_scores,
    )  # fmt: skip
    leaves = TRIE.items(following.nodes)
    assert leaves[0, 0].tolist() == 12 and sorted(leaves[0].tolist()) == [10, 11, 12, 13]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_1_ranks_by_the_prior_alone(backend):
    root, zero = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1)
    tensors = ItemPrior([10, 11, 13], [1.0, 2.0, 5.0]).on(TRIE, 1.0)
    step = trie_beam_step(torch.zeros(1, 1, 4), zero, root, TRIE, 4, "valid", backend=backend, prior=tensors,
                          generator_scores=zero)  # fmt: skip
    assert step.codes[0, :2].tolist() == [3, 0] and step.nodes[0, 2:].tolist() == [-1, -1]
    assert torch.equal(step.scores[0, :2], torch.tensor([0.625, 0.375]).log())


def test_arguments_that_do_not_fit_are_refused():
    root, zero = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1)
    tensors = ItemPrior([[10], [11]], [[1], [1]]).on(TRIE, 0.5)
    operands = torch.zeros(2, 1, 4), zero, root, TRIE, 4, "valid"
    with pytest.raises(ValueError, match="go together"):
        trie_beam_step(*operands, prior=tensors)
    with pytest.raises(ValueError, match="go together"):
        trie_beam_step(*operands, generator_scores=zero)
    with pytest.raises(ValueError, match=r"generator_scores must be \[2, 1\]"):
        trie_beam_step(*operands, prior=tensors, generator_scores=zero[:1])
    with pytest.raises(TypeError, match=r"make it with ItemPrior\.on"):
        trie_beam_step(*operands, prior=tensors.sums, generator_scores=zero)
    with pytest.raises(ValueError, match=r"ranks of the prior must be dense torch.int32 \[2, 1\]"):
        trie_beam_step(*operands, prior=tensors.select(slice(0, 1)), generator_scores=zero)
    with pytest.raises(ValueError, match=r"sums of the prior must be dense torch\.float64"):
        single = PriorTensors(tensors.ranks, tensors.sums.float(), tensors.weight)
        trie_beam_step(*operands, prior=single, generator_scores=zero)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_beams_or_no_users_give_no_candidates(backend):
    for users, beams in ((2, 0), (0, 3)):
        nodes, zero = torch.zeros(users, beams, dtype=torch.int32), torch.zeros(users, beams)
        tensors = ItemPrior([[10], [11]], [[1], [1]]).on(TRIE, 0.5).select(slice(0, users))
        step = trie_beam_step(
            torch.zeros(users, beams, 4), zero, nodes, TRIE, 3, "level", backend=backend, prior=tensors,
            generator_scores=zero,
        )  # fmt: skip
        assert step.nodes.shape == (users, 3) and (step.nodes == -1).all()
        assert step.scores.isneginf().all() and step.generator_scores.isneginf().all()


@pytest.mark.medium
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_custom_op_passes_opcheck_and_compiles_without_a_graph_break(backend):
    trie = make_trie(6, 3, 60)
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randint(-1, trie.arrays.num_inner, (2, 3), generator=generator).to(torch.int32)
    logits, scores = torch.randn(2, 3, 6, generator=generator), -torch.rand(2, 3, generator=generator)
    tensors = draw_prior(trie, 2, 5).on(trie, 0.5)
    operands = logits, scores, nodes, 4, 1, None, backend, list(tensors), scores
    torch.library.opcheck(
        torch.ops.cemg.trie_mixed_beam_step.default, (*flat_arguments(trie.arrays, None), *operands)
    )

    def step(logits: Tensor, scores: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        found = trie_beam_step(logits, scores, nodes, trie, 3, "level", prior=tensors,
                               generator_scores=scores, backend=backend)  # fmt: skip
        return found.generator_scores + 0, found.nodes

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(logits, scores, nodes), step(logits, scores, nodes), strict=True):
        assert torch.equal(actual, expected)
