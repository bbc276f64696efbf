"""Catalogs whose items share semantic IDs: all items of an ID are returned."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cemg.decoding import Decoder, Recommendations, TransformersDecoder, score_all
from cemg.decoding.shared_ids import expand_shared_ids
from cemg.errors import UserError
from cemg.evaluation.metrics import ranks_of_targets
from cemg.evaluation.search import best_rows
from cemg.tokenizer import Catalog
from cemg_kernels import RequestFilter

from .conftest import FAMILIES, SIZE, START, Bench, random_catalog

NORMALIZE = ("vocab", "level", "valid")


def shared_catalog(ids: int, items: int, seed: int, *, named: bool = False) -> Catalog:
    """``items`` items on ``ids`` semantic IDs, some of one item and some of many, with training counts."""
    generator = torch.Generator().manual_seed(seed)
    leaves = random_catalog(ids, seed).codes
    of_item = torch.cat([torch.arange(ids), (torch.rand(items - ids, generator=generator) ** 3 * ids).long()])
    of_item = of_item[torch.randperm(items, generator=generator)]
    counts = torch.randint(0, 4, (items,), generator=generator)
    names = (
        [f"item {i}" for i in range(items)]
        if named
        else (torch.randperm(items, generator=generator) + 7).tolist()
    )
    return Catalog.from_codes(leaves[of_item], SIZE, names, shared=True, counts=counts)


def by_hand(catalog: Catalog, scores: list[float], allowed: list[bool], top: int) -> list[tuple[int, float]]:
    """Catalog rows and scores: best ID first, then by training count, then by row."""
    codes = [tuple(row) for row in catalog.codes.tolist()]
    assert catalog.counts is not None
    order = sorted(
        (row for row in range(len(codes)) if allowed[row]),
        key=lambda row: (-scores[row], codes[row], -int(catalog.counts[row]), row),
    )
    return [(row, scores[row]) for row in order[:top]]


def rows_found(catalog: Catalog, items: list[int]) -> list[int]:
    return [i if catalog.named else catalog.item_ids.index(i) for i in items if i >= 0]


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    family=st.sampled_from(FAMILIES),
    normalize=st.sampled_from(NORMALIZE),
    ids=st.integers(1, 40),
    more=st.integers(0, 60),
    top=st.integers(1, 12),
    filtered=st.sampled_from(["none", "only", "history", "both"]),
    exact=st.booleans(),
    named=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_all_items_of_an_id_have_its_score_and_are_sorted_by_training_count(
    bench, family, normalize, ids, more, top, filtered, exact, named, seed
):
    catalog = shared_catalog(ids, ids + more, seed, named=named)
    made = Bench(bench(family).model, catalog)
    prompts = made.prompts([1 + seed % 6, 4], seed)
    decoder = Decoder(made.model, catalog, START, normalize)
    generator = torch.Generator().manual_seed(seed + 1)
    allowed = torch.ones(2, len(catalog), dtype=torch.bool)
    filter = None
    if filtered in ("only", "both"):
        kept = torch.rand(len(catalog), generator=generator) < 0.5
        filter, allowed = (
            catalog.only([catalog.item_ids[i] for i in kept.nonzero().flatten()]),
            allowed & kept,
        )
    if filtered in ("history", "both"):
        gone = torch.rand(2, len(catalog), generator=generator) < 0.4
        own = catalog.excluding([[catalog.item_ids[i] for i in row.nonzero().flatten()] for row in gone])
        filter, allowed = own if filter is None else own & filter, allowed & ~gone
    if exact:
        found = decoder.decode_exact(*prompts, top, top, filter=filter)
    else:
        found = decoder.decode(*prompts, len(catalog), filter=filter).top(top)
    for row in range(2):
        length = int(prompts[1][row].sum())
        prompt = prompts[0][row, :length] if made.seq2seq else prompts[0][row, -length:]
        open_ = allowed[row]
        scores = torch.full((len(catalog),), float("-inf"))
        if bool(open_.any()):
            of = Catalog.from_codes(
                catalog.codes[open_ if normalize == "valid" else slice(None)], SIZE, shared=True
            )
            scored = Bench(made.model, of).all_scores(prompt, normalize)
            scores[open_ if normalize == "valid" else slice(None)] = scored
        expected = by_hand(catalog, [round(s, 4) for s in scores.tolist()], open_.tolist(), top)
        count = len(expected)
        assert int((found.items[row] >= 0).sum()) == count
        torch.testing.assert_close(
            found.scores[row, :count], torch.tensor([s for _, s in expected]), rtol=0, atol=2e-4
        )
        rows = rows_found(catalog, found.items[row].tolist())
        assert len(set(rows)) == count and all(open_[r] for r in rows)
        assert torch.equal(found.codes[row, :count], catalog.codes[rows])
        for first, second in pairwise(rows):  # within an ID, by count and then by row
            if torch.equal(catalog.codes[first], catalog.codes[second]):
                assert (-int(catalog.counts[first]), first) < (-int(catalog.counts[second]), second)
        assert int(found.certified[row]) <= count
        if exact or ids + more <= 3:
            assert int(found.certified[row]) == count


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_reference_engine_and_every_backend_return_the_same_items(bench, family, same_lists):
    catalog = shared_catalog(30, 70, 5)
    made = Bench(bench(family).model, catalog)
    prompts = made.prompts([5, 3])
    expected = TransformersDecoder(made.model, catalog, START).decode(*prompts, 12)
    assert torch.unique(expected.items[0]).numel() == 12
    for backend in ("native", "torch", "reference"):
        found = Decoder(made.model, catalog, START, backend=backend).decode(*prompts, 12)
        assert torch.equal(found.items, expected.items)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)


def test_certified_counts_items():
    """One ID with three items scores far above the others: one beam finds and proves its three items."""
    catalog = Catalog.from_codes(torch.tensor([[0, 0], [1, 1], [0, 0], [0, 0]]), 2, shared=True)
    leaves = Recommendations(
        torch.tensor([[0, 1]]),
        torch.tensor([[-1.0, -5.0]]),
        torch.tensor([[[0, 0], [1, 1]]]),
        torch.tensor([1]),
    )
    found = expand_shared_ids(leaves, catalog, None, 5)
    assert found.items.tolist() == [[0, 2, 3, 1, -1]] and found.certified.tolist() == [3]
    cut = expand_shared_ids(leaves, catalog, None, 2)
    assert cut.items.tolist() == [[0, 2]] and cut.certified.tolist() == [2]


def test_score_all_returns_the_score_of_each_items_id(bench):
    catalog = shared_catalog(20, 50, 3)
    made = Bench(bench("llama").model, catalog)
    decoder = Decoder(made.model, catalog, START)
    scores = score_all(decoder, *made.prompts([4]))
    for row in range(len(catalog)):
        same = (catalog.codes == catalog.codes[row]).all(1)
        assert torch.equal(scores[0, same], scores[0, row].expand(int(same.sum())))
    every = decoder.decode(*made.prompts([4]), len(catalog))
    ranked = best_rows(scores, catalog, len(catalog))[0].tolist()
    assert [catalog.item_ids[row] for row in ranked] == every.items[0].tolist()


def test_metrics_rank_items_and_not_their_ids(bench):
    """The target is the third item of the best ID: its rank is 2, not 0."""
    catalog = Catalog.from_codes(
        torch.tensor([[0, 0, 0]] * 3 + [[1, 2, 3]]), SIZE, shared=True, counts=[1, 5, 3, 9]
    )
    made = Bench(bench("t5").model, catalog)
    found = Decoder(made.model, catalog, START).decode(*made.prompts([4]), 4)
    place = found.items[0].tolist().index(0)
    assert found.items[0].tolist() in ([1, 2, 0, 3], [3, 1, 2, 0])
    assert ranks_of_targets(found.items, torch.tensor([0])).tolist() == [place]


def test_shared_ids_are_refused_unless_asked_for_and_the_fix_works():
    codes = torch.tensor([[0, 1], [0, 1]])
    with pytest.raises(UserError, match="no catalog can be built from these codes") as caught:
        Catalog.from_codes(codes, 4)
    assert "shared=True" in str(caught.value.fix)
    catalog = Catalog.from_codes(codes, 4, shared=True)
    assert (len(catalog), catalog.num_ids) == (2, 1)


def test_a_shared_catalog_is_the_same_after_saving_and_loading(tmp_path):
    tokens = [[5, 3, -1], [9, 8, 7]]
    codes = torch.tensor([[0, 2], [1, 1], [0, 2], [1, 0]])
    catalog = Catalog.from_codes(
        codes, (2, 3), ["a", "b", "c", "d"], tokens=tokens, shared=True, counts=[1, 2, 3, 4]
    )
    catalog.save(tmp_path)
    again = Catalog.load(tmp_path)
    assert again.shared is not None and again.shared.members.tolist() == [2, 0, 3, 1]
    assert again.codebook_sizes == (2, 3) and again.code_tokens().table.tolist() == tokens
    assert again.digest() == catalog.digest() and again.item_ids == ["a", "b", "c", "d"]
    assert again.extended(torch.tensor([[0, 2]]), ["e"]).shared.members.tolist() == [2, 0, 4, 3, 1]
    assert again.first(2).num_ids == 2


@pytest.mark.parametrize("ids", [[-1, 0], [0.5, 1.5], [None, 3]])
def test_invalid_ids_are_refused(ids):
    with pytest.raises(UserError, match="item ids must be strings, or integers from 0 on"):
        Catalog.from_codes(torch.tensor([[0, 1], [0, 1]]), 4, ids, shared=True)


def test_a_wrong_number_of_counts_is_refused():
    with pytest.raises(UserError, match=r"counts must be \[2\]"):
        Catalog.from_codes(torch.tensor([[0, 1], [0, 1]]), 4, shared=True, counts=np.ones(3, dtype=int))


def test_a_filter_of_semantic_ids_is_refused(bench):
    catalog = shared_catalog(5, 9, 1)
    made = Bench(bench("t5").model, catalog)
    decoder, prompts = Decoder(made.model, catalog, START), made.prompts([3])
    with pytest.raises(UserError, match="is a filter of semantic IDs") as caught:
        decoder.decode(*prompts, 3, filter=RequestFilter.excluding(catalog.trie, [[0]]))
    assert "catalog.excluding(histories)" in str(caught.value.fix)
    found = decoder.decode(*prompts, 9, filter=catalog.excluding([catalog.item_ids[:4]]))
    assert sorted(i for i in found.items[0].tolist() if i >= 0) == sorted(catalog.item_ids[4:])


def test_a_filter_of_another_shared_catalog_is_refused(bench):
    one, other = shared_catalog(5, 9, 1), shared_catalog(5, 9, 1)
    made = Bench(bench("t5").model, one)
    with pytest.raises(UserError, match="another catalog"):
        Decoder(made.model, one, START).decode(*made.prompts([3]), 3, filter=other.only([other.item_ids[0]]))
