"""The Triton kernels of a beam step against the reference: all tile sizes, and special values.

The tests reduce the tile sizes of the launcher, so that tiles, chunks, repeated rounds and the merge occur
with inputs that the interpreter processes in a fraction of a second.
"""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import ItemFilter, RequestFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.trie.packed import pack

pytestmark = pytest.mark.medium

kernels = pytest.importorskip("cemg_kernels.constrained.beam_step_triton")
softmax_kernels = import_module("cemg_kernels.constrained.softmax_triton")
child_range = import_module("cemg_kernels.trie.filter_triton").child_range
triton, tl = import_module("triton"), import_module("triton.language")

INF = float("inf")
SAME = 1e-5  # log-sum-exps of 2 ** 12 logits below 2 ** 5 differ in a few of their last bits, 2 ** -19 each


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts eight candidates at once and makes merges as small as possible."""
    sizes = {"PER_WARP": 8, "MIN_SORTED": 8, "MIN_MERGED": 4, "LIST_SIZES": (2, 4, 8, 16), "MIN_BLOCK_K": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)


def draw_case(
    users: int, beams: int, size: int, items: int, seed: int
) -> tuple[Trie, Tensor, Tensor, Tensor]:
    """Returns a trie of three levels, logits [B, W, K], scores [B, W] and nodes [B, W], some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.unique(torch.randint(size, (items, 3), generator=generator), dim=0)
    trie = Trie.from_codes(codes, size)
    nodes = torch.randint(-1, trie.arrays.num_inner, (users, beams), generator=generator).to(torch.int32)
    logits = torch.randn(users, beams, size, generator=generator) * 3
    return trie, logits, -torch.rand(users, beams, generator=generator) * 4, nodes


def filters_of(trie: Trie, users: int, seed: int) -> dict[str, ItemFilter | RequestFilter | None]:
    """Returns one filter of each kind that the kernels distinguish."""
    generator = torch.Generator().manual_seed(seed)
    sparse = ItemFilter.from_mask(trie, torch.rand(trie.num_items, generator=generator) < 0.3)
    excluded = RequestFilter.excluding(trie, torch.randint(trie.num_items, (users, 5), generator=generator))
    stacked = RequestFilter.stack([sparse if user % 2 else None for user in range(1, users + 1)])
    return {"none": None, "one": sparse, "excluded": excluded, "stacked": stacked, "both": excluded & stacked}


def assert_equal_in_every_bit(actual, expected) -> None:
    for name, actual_part, expected_part in zip(expected._fields, actual, expected, strict=True):
        assert torch.equal(actual_part, expected_part), name


def assert_same_choice(actual, expected) -> None:
    """Checks scores within SAME, and equal beams where the gap to the next score exceeds 2 * SAME."""
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=SAME)
    torch.testing.assert_close(actual.pruned, expected.pruned, rtol=0, atol=SAME)
    padded = torch.cat((expected.scores.new_full((len(expected.scores), 1), INF), expected.scores,
                        expected.pruned[:, None]), 1)  # fmt: skip
    gaps = (padded[:, :-1] - padded[:, 1:]).nan_to_num(nan=INF)  # nan if both are dead
    clear = (gaps[:, :-1] > 2 * SAME) & (gaps[:, 1:] > 2 * SAME)
    for actual_part, expected_part in zip(actual[1:4], expected[1:4], strict=True):
        assert torch.equal(actual_part[clear], expected_part[clear])
    assert bool(clear.any()) or expected.scores.numel() < 4


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("beams", "size", "width", "kind"),
    [(1, 1, 1, "none"), (3, 5, 4, "both"), (7, 8, 7, "none"), (8, 8, 3, "one"), (13, 6, 5, "excluded"),
     (13, 6, 5, "stacked"), (9, 31, 6, "none"), (4, 40, 5, "both"), (2, 100, 7, "none")],
)  # fmt: skip
def test_a_step_equals_the_reference_with_any_tile_sizes(beams, size, width, kind):
    trie, logits, scores, nodes = draw_case(2, beams, size, 200, seed=beams)
    chosen = filters_of(trie, 2, seed=size)[kind]
    arguments = logits, scores, nodes, trie, width, "vocab", logits.logsumexp(2), chosen
    actual, expected = (trie_beam_step(*arguments, backend=name) for name in ("triton", "reference"))
    assert_equal_in_every_bit(actual, expected)


def test_the_small_tile_sizes_cover_every_code_path(small):
    shapes = (1, 1, 1), (1, 8, 7), (1, 8, 9), (3, 5, 4), (8, 8, 3), (2, 100, 7)
    plans = [kernels.plan_of(*shape) for shape in shapes]
    assert {plan.block_k > plan.kept for plan in plans} == {True, False}
    assert {plan.chunk < plan.top * plan.lists for plan in plans} == {True, False}
    assert plans[2].top < 9 < plans[2].chunk  # fewer candidates than the width, so the merge pads


@pytest.mark.parametrize(
    ("normalize", "beams", "size", "width"),
    [
        ("valid", 12, 256, 50),
        ("level", 6, 700, 20),
        pytest.param("valid", 50, 256, 50, marks=pytest.mark.slow),
        pytest.param("level", 50, 256, 50, marks=pytest.mark.slow),
        pytest.param("valid", 6, 700, 20, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_realistic_size_selects_the_same_beams_as_the_reference(normalize, beams, size, width):
    trie, logits, scores, nodes = draw_case(1, beams, size, 3000, seed=3)
    nodes = nodes.clamp(max=size // 2)  # mostly nodes of the first level, which have several children
    arguments = logits, scores, nodes, trie, width, normalize
    actual, expected = (trie_beam_step(*arguments, backend=name) for name in ("triton", "reference"))
    assert_same_choice(actual, expected)


@pytest.mark.usefixtures("small")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture sets constants that examples do not change
@given(
    users=st.integers(1, 2), beams=st.integers(1, 9), size=st.integers(1, 20), width=st.integers(1, 7),
    items=st.integers(1, 60), kind=st.sampled_from(["none", "one", "both"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_ties_and_special_values_are_ordered_as_in_the_reference(
    users, beams, size, width, items, kind, seed
):
    trie, logits, scores, nodes = draw_case(users, beams, size, items, seed=seed % 1000)
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, -INF, INF, math.nan, 3e38, -3e38])
    logits = odd[torch.randint(len(odd), logits.shape, generator=generator)]
    scores = odd[torch.randint(len(odd), scores.shape, generator=generator)].clamp(max=0.0)
    total = odd[torch.randint(len(odd), scores.shape, generator=generator)]
    chosen = filters_of(trie, users, seed % 100)[kind]
    arguments = logits, scores, nodes, trie, width, "vocab", total, chosen
    actual, expected = (trie_beam_step(*arguments, backend=name) for name in ("triton", "reference"))
    assert_equal_in_every_bit(actual, expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "one beam above all", "few groups"])
def test_candidates_in_the_worst_order_are_selected_exactly(order):
    """Every node is full: two beams of 64 children, of which 16 are sorted at once.

    In the case ``few groups`` the best candidates are in seven of the 16 groups whose maxima give the bound,
    so 28 candidates reach the first bound.
    """
    trie = Trie.from_codes(torch.cartesian_prod(torch.arange(64), torch.arange(64)), 64)
    nodes = torch.tensor([[1, 2]], dtype=torch.int32)
    plan = kernels.plan_of(2, 64, 7)
    assert (plan.block_k, plan.kept) == (64, 16)
    rise = torch.arange(128.0).view(1, 2, 64) / 128
    grouped = rise + 20 * (torch.arange(64) % 16 < 7)
    logits = {"rising": rise, "falling": -rise, "equal": rise * 0, "few groups": grouped}.get(
        order, rise.clone()
    )
    if order == "one beam above all":
        logits[0, 1] += 20
    arguments = logits, torch.zeros(1, 2), nodes, trie, 7, "vocab", torch.full((1, 2), 30.0)
    actual, expected = (trie_beam_step(*arguments, backend=name) for name in ("triton", "reference"))
    assert_equal_in_every_bit(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_equal_the_reference(dtype):
    trie, logits, scores, nodes = draw_case(1, 4, 9, 60, seed=1)
    logits = logits.to(dtype)
    total = logits.float().logsumexp(2)
    arguments = logits, scores, nodes, trie, 4, "vocab", total
    actual, expected = (trie_beam_step(*arguments, backend=name) for name in ("triton", "reference"))
    assert_equal_in_every_bit(actual, expected)
    flat = logits[0], nodes[0], trie, "vocab", total[0]
    assert torch.equal(trie_softmax(*flat, backend="triton"), trie_softmax(*flat, backend="reference"))


def test_logits_can_be_columns_of_a_wider_tensor():
    trie, logits, scores, nodes = draw_case(2, 4, 9, 60, seed=2)
    wide = torch.full((2, 4, 30), math.nan)
    wide[:, :, 7:16] = logits
    columns, total = wide[:, :, 7:16], logits.logsumexp(2)
    actual = trie_beam_step(columns, scores, nodes, trie, 4, "vocab", total, backend="triton")
    expected = trie_beam_step(logits, scores, nodes, trie, 4, "vocab", total, backend="reference")
    assert_equal_in_every_bit(actual, expected)
    rows = columns.transpose(0, 1)[:, 0], nodes[0], trie, "vocab", total[0]
    assert torch.equal(trie_softmax(*rows, backend="triton"), trie_softmax(*rows, backend="reference"))


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
@pytest.mark.parametrize("kind", ["none", "one", "stacked", "both"])
@pytest.mark.parametrize("block", [16, 512])
def test_log_probabilities_equal_the_reference(normalize, kind, block, monkeypatch):
    monkeypatch.setattr(softmax_kernels, "SOFTMAX_BLOCK", block)
    trie, logits, _, nodes = draw_case(2, 3, 29, 300, seed=5)
    rows, flat_nodes = logits.flatten(0, 1), nodes.flatten()
    rows[3, ::2], rows[4] = math.nan, -INF
    total = rows.nan_to_num(nan=-INF).logsumexp(1) if normalize == "vocab" else None
    arguments = rows, flat_nodes, trie, normalize, total, filters_of(trie, 2, 5)[kind]
    actual, expected = (trie_softmax(*arguments, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if normalize == "vocab" else SAME)


def test_empty_inputs_give_empty_outputs():
    trie, logits, scores, nodes = draw_case(1, 3, 4, 20, seed=0)
    none = logits[:0], scores[:0], nodes[:0], trie, 5, "level"
    assert [len(part) for part in trie_beam_step(*none, backend="triton")] == [0] * 5
    assert trie_softmax(logits[0, :0], nodes[0, :0], trie, "level", backend="triton").shape == (0, 4)


def test_a_step_beyond_the_limits_is_rejected_if_triton_is_named_and_runs_on_torch_otherwise(monkeypatch):
    trie, logits, scores, nodes = draw_case(1, 2, 3, 20, seed=0)
    wide = logits, scores, nodes, trie, 300, "level"
    with pytest.raises(ValueError, match=r"width 256, got 2, 3 and 300; use backend='torch'"):
        trie_beam_step(*wide, backend="triton")
    beam_step = import_module("cemg_kernels.constrained.beam_step")
    monkeypatch.setattr(beam_step, "pick", lambda op, device, backend: backend or "triton")
    assert_equal_in_every_bit(trie_beam_step(*wide), trie_beam_step(*wide, backend="torch"))


@triton.jit
def walk(packed_ptr, nodes_ptr, begins_ptr, ends_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    node = tl.load(nodes_ptr + at)
    begin, end = child_range(packed_ptr, node, (node >= 0) & (node < count - 1))
    tl.store(begins_ptr + at, begin)
    tl.store(ends_ptr + at, end)


@pytest.mark.parametrize("gap", [1, 3, 20])
def test_first_children_are_unpacked_from_bitmaps_and_from_lists(gap):
    """A block of 64 numbers with gaps of 20 is stored as a list."""
    nodes = torch.randint(-5, 310, (512,), generator=torch.Generator().manual_seed(0))
    begins, ends = torch.empty(2, 512, dtype=torch.int32)
    walk[(1,)](pack(torch.arange(300) * gap), nodes.to(torch.int32), begins, ends, 300, BLOCK=512)
    inner = (nodes >= 0) & (nodes < 299)
    assert torch.equal(begins.long(), torch.where(inner, nodes * gap, 0))
    assert torch.equal(ends.long(), torch.where(inner, (nodes + 1) * gap, 0))
