"""Invalid arguments of every public call are rejected before they reach C++."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import cemg_kernels
from cemg_kernels import BipartiteGraph, ItemFilter, RequestFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.runtime.interface import interface
from cemg_kernels.runtime.operands import integers_of

DRAWS = Path(__file__).with_name("boundary_draws.py")
CODES = [[0, 1, 2], [0, 1, 3], [3, 0, 0], [3, 2, 1]]


def drawn(seed: int, count: int, **environment: str) -> dict[str, dict[str, int]]:
    """The counts of ``count`` draws per call, run in another process, so that a crash fails the test."""
    command = [sys.executable, str(DRAWS), "--seed", str(seed), "--count", str(count)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=3600, env=os.environ | environment
    )
    last = ran.stderr.splitlines()[-1:]
    assert ran.returncode >= 0, f"signal {-ran.returncode} in draw {last}"
    assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{last}"
    counts: dict[str, dict[str, int]] = json.loads(ran.stdout.splitlines()[-1])
    return counts


def check(counts: dict[str, dict[str, int]], count: int) -> None:
    assert all(sum(own.values()) == count and own["failed"] == 0 for own in counts.values())
    assert (
        sum(own["answered"] for own in counts.values()) > sum(own["rejected"] for own in counts.values()) / 2
    )
    named = {name.split(".")[0].split(",")[0] for name in counts} | {"use_fast_kernels", "backends"}
    assert named >= set(cemg_kernels.__all__) - {"fast_kernels_enabled"}, "a public call has no draws"


@pytest.mark.medium
def test_changed_arguments_give_the_result_of_the_reference_or_an_error():
    check(drawn(0, 20), 20)


@pytest.mark.slow
def test_many_changed_arguments_give_the_result_of_the_reference_or_an_error():
    check(drawn(1000, 1500), 1500)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_no_draw_accesses_memory_outside_its_tensors(tmp_path: Path):
    """The module under AddressSanitizer and UndefinedBehaviorSanitizer, loaded into Python."""
    import pybind11

    module, csrc = tmp_path / "_native.so", DRAWS.parents[2] / "csrc"
    sources = [*sorted((csrc / "bindings").glob("*.cpp")), *sorted((csrc / "src").glob("*.cpp"))]
    includes = [pybind11.get_include(), sysconfig.get_path("include"), csrc / "include"]
    command = ["g++", "-std=c++20", "-O1", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden",
               "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
               f'-DCEMG_INTERFACE="{interface()}"',
               *(f"-I{folder}" for folder in includes), *map(str, sources), "-o", str(module)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    libraries = [  # libstdc++ too: ASan needs the functions that it intercepts when it starts
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    preloaded = " ".join(found.stdout.strip() for found in libraries)
    counts = drawn(
        5000, 100, CEMG_NATIVE=str(module), LD_PRELOAD=preloaded,
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )  # fmt: skip
    check(counts, 100)


@pytest.fixture(scope="module")
def trie() -> Trie:
    return Trie.from_codes(torch.tensor(CODES), 4)


@pytest.mark.parametrize("rank", [4, -1, 2**31 - 1, 2**31, -(2**63)])
def test_the_error_names_a_rank_outside_the_trie(trie, rank):
    everything = ItemFilter.everything(trie)
    for call in (everything.without_ranks, everything.allows_ranks):
        with pytest.raises(ValueError, match=rf"ranks are 0 to 3, got {rank}\b"):
            call(torch.tensor([0, rank]))


def test_a_repeated_rank_is_excluded_once(trie):
    everything = ItemFilter.everything(trie)
    twice = everything.without_ranks([2, 2, 0])
    assert twice.by_rank().tolist() == [False, True, False, True]
    assert torch.equal(twice.open, everything.without_ranks([0, 2]).open)


def test_lists_and_numpy_arrays_are_accepted_like_tensors(trie):
    codes = np.array(CODES, dtype=np.uint16)
    for given in (CODES, codes, codes[::-1][::-1], np.asfortranarray(codes)):
        other = Trie.from_codes(given, 4, np.arange(4))
        assert torch.equal(other.codes_by_rank(), trie.codes_by_rank())
    assert trie.items(trie.lookup(CODES)).tolist() == trie.items(trie.lookup(codes)).tolist() == [0, 1, 2, 3]
    nodes = trie.lookup([[0], [3]])
    assert trie.advance(nodes.numpy(), [1, 2]).tolist() == trie.lookup([[0, 1], [3, 2]]).tolist()
    mask = np.array([True, False, True, False])
    mask.setflags(write=False)
    allowed = ItemFilter.from_mask(trie, mask)
    assert torch.equal(allowed.open, ItemFilter.from_items(trie, np.array([0, 2])).open)
    assert torch.equal(allowed.open, ItemFilter.from_mask(trie, mask.tolist()).open)
    own = RequestFilter.excluding(trie, np.array([[0, 1], [2, -1]]))
    assert torch.equal(own.excluded, RequestFilter.excluding(trie, [[0, 1], [2]]).excluded)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.5], "ids must be integers, got torch.float32"),
        ([True], "ids must be integers, got torch.bool"),
        (["a"], "ids must be a tensor, a numpy array or lists of numbers, got list"),
        ([[1], [2, 3]], "lists of numbers, got list"),
        (None, "got NoneType"),
        (np.array(["a"]), "got ndarray"),
        ([2**70], "got list"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "ids is on the device meta"),
        (torch.ones(2, dtype=torch.int64).to_sparse(), "ids must be a dense tensor"),
    ],
)
def test_the_error_names_what_is_not_a_list_of_ids(trie, value, message):
    with pytest.raises(ValueError, match=message):
        integers_of("ids", value)
    with pytest.raises(ValueError):
        ItemFilter.from_items(trie, value)


def test_an_object_that_is_not_a_filter_is_rejected(trie):
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(TypeError, match="filter must be an ItemFilter or a RequestFilter, got Tensor"):
        trie.mask(torch.zeros(1, dtype=torch.int64), filter=mask)
    with pytest.raises(TypeError, match="a request has one ItemFilter, or None, got Tensor"):
        ItemFilter.stack([mask])


def test_threads_can_share_a_new_trie():
    """All threads need what a trie computes on first use: its fingerprint and the order of its ids."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.unique(torch.randint(0, 32, (3000, 3), generator=generator), dim=0)
    shared = Trie.from_codes(codes, 32, torch.arange(len(codes)) * 2)

    def finds_its_items(seed: int) -> bool:
        rows = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))[:600]
        own = RequestFilter.excluding(shared, rows[None, :20] * 2)
        found = shared.items(shared.lookup(codes[rows]), filter=own)
        expected = torch.cat((torch.full((20,), -1), rows[20:] * 2))
        return torch.equal(found, expected) and torch.equal(
            ItemFilter.from_items(shared, rows * 2).by_rank().nonzero()[:, 0],
            shared.ranks_of(rows * 2).sort().values,
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(finds_its_items, range(64)))


def test_a_filter_bitmap_of_another_trie_is_rejected(trie):
    words = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"has int64 \[1\] words"):
        ItemFilter(trie.arrays, words, trie.fingerprint)


@pytest.mark.parametrize("requests", [[2], [-1], [], [[0]]])
def test_a_request_outside_the_filter_cannot_be_selected(trie, requests):
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        RequestFilter.excluding(trie, [[0], [1]]).select(requests)


def test_operands_of_a_step_must_be_dense_floats_on_the_device_of_the_logits(trie):
    logits, nodes = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int32)
    scores, total = torch.zeros(1, 2), torch.zeros(1, 2)
    for wrong in (total.to("meta"), total.to_sparse(), total.long()):
        with pytest.raises(ValueError, match="logsumexp"):
            trie_beam_step(logits, scores, nodes, trie, 2, "vocab", wrong)
        with pytest.raises(ValueError, match="scores"):
            trie_beam_step(logits, wrong, nodes, trie, 2, "level")
    with pytest.raises(ValueError, match="width must be 1 to 16777216, got 1000000000000"):
        trie_beam_step(logits, scores, nodes, trie, 10**12, "level")
    with pytest.raises(TypeError, match="must be tensors, got ndarray and Tensor"):
        trie_softmax(logits[0].numpy(), nodes[0], trie, "level")


def test_a_negated_view_is_read_with_its_sign(trie):
    """Torch marks such a view with a bit; its memory holds the values before negation."""
    logits, nodes = torch.randn(2, 4), torch.zeros(2, dtype=torch.int32)
    view = torch._neg_view(-logits)
    assert torch.equal(trie_softmax(view, nodes, trie, "level"), trie_softmax(logits, nodes, trie, "level"))


GRAPH = {
    "num_users": 1, "num_items": 2, "row_ptr": torch.tensor([0, 2, 3, 4]),
    "neighbours": torch.tensor([1, 2, 0, 0]), "inv_sqrt_degree": torch.ones(3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": torch.tensor([1, 3, 0, 0])}, "neighbours must be 0 to 2, got 0 to 3"),
        ({"neighbours": torch.tensor([1, 2, 0, -1])}, "got -1 to 2"),
        ({"neighbours": torch.tensor([1, 2, 0])}, "row_ptr must ascend from 0 to 3"),
        ({"row_ptr": torch.tensor([0, 3, 2, 4])}, "row_ptr must ascend"),
        ({"row_ptr": torch.tensor([1, 2, 3, 4])}, "row_ptr must ascend"),
        ({"row_ptr": torch.tensor([0, 4])}, r"row_ptr must be contiguous torch.int64 \[4\]"),
        ({"row_ptr": torch.tensor([0, 2, 3, 4], dtype=torch.int32)}, "got torch.int32"),
        ({"inv_sqrt_degree": torch.ones(6)[::2]}, "contiguous"),
        ({"inv_sqrt_degree": torch.tensor([1.0, float("nan"), 1.0])}, "must be finite"),
        ({"num_items": -1}, "0 or more"),
        ({"num_users": 2**40}, "at most 2147483647 together"),
    ],
)
def test_a_graph_with_invalid_arrays_is_rejected(changes, message):
    assert BipartiteGraph(**GRAPH).num_edges == 2
    with pytest.raises(ValueError, match=message):
        BipartiteGraph(**(GRAPH | changes))
