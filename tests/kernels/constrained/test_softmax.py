"""Log-probabilities on the trie, for each normalisation, against a float64 computation row by row."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import ItemFilter, Trie, trie_softmax
from cemg_kernels.constrained.softmax import flat_arguments

pytestmark = pytest.mark.medium

INF = float("inf")
every_backend = pytest.mark.parametrize("backend", ["reference", "native", "triton"])


def make_case(rows: int, size: int, *, seed: int = 0) -> tuple[Trie, Tensor, Tensor]:
    """Returns a trie of two levels, logits [R, K] and nodes [R], some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.unique(torch.randint(size, (size * 3, 2), generator=generator), dim=0)
    trie = Trie.from_codes(codes, size)
    nodes = torch.randint(-1, trie.num_nodes, (rows,), generator=generator).to(torch.int32)
    return trie, torch.randn(rows, size, generator=generator) * 3, nodes


@every_backend
@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 31), (20, 256), (64, 300)])
@pytest.mark.parametrize("filtered", [False, True])
def test_log_probabilities_equal_the_formula(backend, normalize, rows, size, filtered):
    trie, logits, nodes = make_case(rows, size)
    chosen = ItemFilter.from_mask(trie, torch.arange(trie.num_items) % 2 == 0) if filtered else None
    total = logits.logsumexp(1) + 0.5 if normalize == "vocab" else None
    out = trie_softmax(logits, nodes, trie, normalize, total, chosen, backend=backend)
    allowed = trie.mask(nodes, filter=chosen)
    expected = torch.full((rows, size), -INF, dtype=torch.float64)
    for r in range(rows):
        over = {"vocab": [], "level": logits[r].tolist(), "valid": logits[r][allowed[r]].tolist()}[normalize]
        log_sum = float(total[r]) if total is not None else math.log(sum(map(math.exp, over))) if over else 0
        expected[r, allowed[r]] = (logits[r, allowed[r]].double() - log_sum).clamp(max=0)
    # float32: |logit| and |log-sum| < 16, each with an error of 2^-20; the sum of exponentials adds 2^-20
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3 * 2**-20)


@every_backend
def test_a_prefix_without_children_has_no_finite_logit(backend):
    trie, logits, _ = make_case(3, 8)
    nodes = torch.tensor([-1, trie.num_nodes - 1, 0], dtype=torch.int32)
    out = trie_softmax(logits, nodes, trie, "valid", backend=backend)
    assert (out[:2] == -INF).all() and out[2].isfinite().any()


@every_backend
def test_nan_counts_as_negative_infinity_and_infinity_as_the_largest_number(backend):
    trie = Trie.from_codes(torch.arange(4)[:, None], 4)
    nodes = torch.zeros(3, dtype=torch.int32)
    logits = torch.tensor([[math.nan, 0.0, 0.0, -INF], [INF, 5.0, 1.0, math.nan], [-INF] * 4])
    out = trie_softmax(logits, nodes, trie, "level", backend=backend)
    half = math.log(0.5)
    assert out[0].tolist() == [-INF, pytest.approx(half), pytest.approx(half), -INF]
    assert float(out[1, 0]) == 0.0 and float(out[1, 3]) == -INF
    assert float(out[1, 1]) < -1e38
    assert (out[2] == -INF).all()
    assert not out.isnan().any()


@every_backend
def test_log_probabilities_never_exceed_zero(backend):
    trie = Trie.from_codes(torch.arange(4)[:, None], 4)
    logits = torch.tensor([[3.0, 1.0, -1.0, 2.0]])
    root, total = torch.zeros(1, dtype=torch.int32), torch.tensor([1.5])
    out = trie_softmax(logits, root, trie, "vocab", total, backend=backend)
    assert out.tolist() == [[0.0, -0.5, -2.5, 0.0]]


@every_backend
@pytest.mark.parametrize("total", [math.nan, -INF, INF])
def test_an_infinite_or_nan_logsumexp_does_not_give_nan(backend, total):
    trie = Trie.from_codes(torch.arange(4)[:, None], 4)
    root = torch.zeros(1, dtype=torch.int32)
    out = trie_softmax(torch.zeros(1, 4), root, trie, "vocab", torch.tensor([total]), backend=backend)
    assert not out.isnan().any() and (out < -1e38).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_trie_filter_and_logits_equal_the_reference(data):
    """Covers ties, NaN, infinities, nodes that are -1 or leaves, and filters that allow nothing."""
    levels, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    item = st.tuples(*[st.integers(0, size - 1)] * levels)
    codes = torch.tensor(data.draw(st.lists(item, min_size=1, max_size=20, unique=True)))
    trie = Trie.from_codes(codes, size)
    allowed = data.draw(st.none() | st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)))
    chosen = None if allowed is None else ItemFilter.from_mask(trie, torch.tensor(allowed))
    nodes = data.draw(st.lists(st.integers(-1, trie.num_nodes), min_size=1, max_size=5))
    logit = st.sampled_from([-INF, -3.0, -0.5, 0.0, 0.5, 2.0, 40.0, INF, math.nan])
    row = st.lists(logit, min_size=size, max_size=size)
    logits = torch.tensor(data.draw(st.lists(row, min_size=len(nodes), max_size=len(nodes))))
    normalize = data.draw(st.sampled_from(["vocab", "level", "valid"]))
    total = data.draw(st.lists(logit, min_size=len(nodes), max_size=len(nodes)))
    total = torch.tensor(total) if normalize == "vocab" else None
    operands = logits, torch.tensor(nodes, dtype=torch.int32), trie, normalize, total, chosen
    expected = trie_softmax(*operands, backend="reference")
    assert not expected.isnan().any() and (expected <= 0).all()
    for backend in ("native", "triton"):
        # as above; if one logit is the largest float, the log-probabilities of the others are as large
        out = trie_softmax(*operands, backend=backend)
        torch.testing.assert_close(out, expected, rtol=2**-22, atol=3 * 2**-20)


def test_arguments_that_do_not_fit_are_rejected():
    trie, logits, nodes = make_case(5, 8)
    total = logits.logsumexp(1)
    with pytest.raises(ValueError, match="needs logsumexp"):
        trie_softmax(logits, nodes, trie)
    with pytest.raises(ValueError, match="does not take logsumexp"):
        trie_softmax(logits, nodes, trie, "level", total)
    with pytest.raises(ValueError, match="vocab, level, valid"):
        trie_softmax(logits, nodes, trie, "softmax", total)
    with pytest.raises(ValueError, match=r"logits must be \[5, 8\]"):
        trie_softmax(logits[:, :7], nodes, trie, "level")
    with pytest.raises(ValueError, match=r"logsumexp must be \[5\]"):
        trie_softmax(logits, nodes, trie, "vocab", total[:4])
    with pytest.raises(ValueError, match="floating"):
        trie_softmax(logits.long(), nodes, trie, "level")


@every_backend
def test_the_custom_op_passes_opcheck(backend):
    trie, logits, nodes = make_case(5, 8)
    chosen = ItemFilter.from_mask(trie, torch.arange(trie.num_items) % 2 == 0)
    by_columns = logits.t().contiguous().t()
    for allowed, laid_out in product((None, chosen.tensors), (logits, by_columns)):
        for over, total in enumerate((logits.logsumexp(1), None, None)):
            operands = laid_out, nodes, over, total, backend
            torch.library.opcheck(
                torch.ops.cemg.trie_softmax.default, (*flat_arguments(trie.arrays, allowed), *operands)
            )


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_log_probabilities_compile_without_a_graph_break(engine):
    trie, logits, nodes = make_case(5, 8)
    chosen = ItemFilter.from_mask(trie, torch.arange(trie.num_items) % 2 == 0)

    def halved(logits: Tensor) -> Tensor:
        return trie_softmax(logits / 2, nodes, trie, "valid", None, chosen) / 2

    torch._dynamo.reset()
    compiled = torch.compile(halved, fullgraph=True, backend=engine)
    assert torch.equal(compiled(logits), halved(logits))
