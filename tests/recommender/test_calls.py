"""The arguments that ``Recommender``, ``Decoder`` and ``Catalog`` accept, and their results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cemg
import cemg_kernels
from cemg.data import Dataset
from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.recommender import Recommender, as_histories
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter

ONE, TWO = ["item-0001", "item-0002"], [["item-0001", "item-0002"], ["item-0003"]]


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    return Recommender.from_run(tiny_run)


def test_the_package_exports_the_recommender():
    assert {"ItemPrior", "Recommender", "__version__"} <= set(dir(cemg)) and "Recommender" in cemg.__all__
    assert cemg.ItemPrior is cemg_kernels.ItemPrior


def test_a_result_has_ids_titles_and_scores(recommender, tiny_run):
    found = recommender.recommend(TWO, top=60, beams=60)  # of 50 items
    assert found.ids == recommender.item_ids(found) and found.ids[0][50:] == [None] * 10
    data = Dataset.load(tiny_run / "data")
    titles = dict(zip(data.item_ids, data.titles, strict=True))
    assert found.titles == [[titles.get(item) for item in row] for row in found.ids]
    assert any(found.titles[0]) and found.scores.shape == (2, 60)


def test_a_flat_list_is_one_history_and_a_nested_one_is_many(recommender):
    many = recommender.recommend(TWO, top=5)
    for one in (ONE, tuple(ONE), np.array(ONE), [np.array(ONE)], [ONE], iter(ONE)):
        found = recommender.recommend(one, top=5)
        assert found.ids == many.ids[:1]
        torch.testing.assert_close(found.scores, many.scores[:1], rtol=0, atol=1e-5)  # another batch
    assert recommender.recommend([], top=5).ids == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("item-0001 item-0002", "a history must be a list of item ids, got str 'item-0001 item-0002'"),
        (7, "a history must be a list of item ids, got int '7'"),
        ({"item-0001"}, "a history must be a list of item ids, got set"),
        (["item-0001 item-0002", "item-0003"], "it looks like a history in one string"),
        (["item-0001,item-0002"], "it looks like a history in one string"),
        ([["item-0001"], "item-0002"], "entry 1 of the histories is an item id, others are lists"),
        (["item-9999"], "item 'item-9999' is not in the catalog"),
    ],
)
def test_input_that_is_neither_one_history_nor_many_is_refused(recommender, given, said):
    with pytest.raises(UserError) as error:
        recommender.recommend(given)
    assert said in error.value.message


def test_the_fix_for_a_history_in_one_string_is_a_call_that_works(recommender):
    with pytest.raises(UserError) as error:
        recommender.recommend(["item-0001 item-0002"])
    fix = (error.value.fix or "").removeprefix("pass each history as a list of ids: ")
    assert recommender.recommend(json.loads(fix.replace("'", '"'))).ids == recommender.recommend(ONE).ids


def test_numpy_integers_are_accepted_as_ids():
    assert as_histories(np.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert as_histories(torch.tensor([1, 2])) == [[1, 2]]


def test_a_catalog_and_a_filter_accept_lists_and_arrays():
    codes = [[0, 1], [1, 0], [1, 1]]
    expected = Catalog.from_codes(torch.tensor(codes), 2)
    for given in (codes, np.array(codes), np.array(codes, dtype=np.uint16)):
        assert torch.equal(Catalog.from_codes(given, 2).codes, expected.codes)
    for mask in ([True, False, True], np.array([True, False, True])):
        assert len(ItemFilter.from_mask(expected.trie, mask)) == 2
    with pytest.raises(ValueError, match="allowed must be bool"):
        ItemFilter.from_mask(expected.trie, [1, 0, 1])


def test_a_decoder_accepts_lists_and_arrays(recommender):
    decoder = recommender.decoder
    assert isinstance(decoder, Decoder)
    ids, mask = recommender.prompter.batch([np.array([1, 2]), np.array([3])])
    expected = decoder.decode(ids, mask, 5)
    for kind in (np.asarray, torch.Tensor.tolist):
        found = decoder.decode(kind(ids), kind(mask), 5)
        assert torch.equal(found.items, expected.items) and torch.equal(found.scores, expected.scores)
        exact = decoder.decode_exact(kind(ids), kind(mask), 3, 5)
        assert torch.equal(exact.items, expected.items[:, :3])


def test_a_run_without_a_cache_recommends_and_creates_none(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run / "cache", ignore_errors=True)
    found = Recommender.from_run(run).recommend(ONE)
    assert found.ids == Recommender.from_run(tiny_run).recommend(ONE).ids
    assert not (run / "cache").exists()


def where_modes_hold(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs ``command``; as root, without the capability that ignores file modes."""
    words = ["setpriv", "--bounding-set=-dac_override,-fowner"] if os.getuid() == 0 else []
    return subprocess.run([*words, *map(str, command)], capture_output=True, text=True)


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root needs setpriv")
def test_a_run_in_a_read_only_folder_recommends(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for path in (*run.rglob("*"), run):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert "Permission denied" in where_modes_hold("touch", run / "new").stderr
    before = sorted(str(path) for path in run.rglob("*"))
    code = "from cemg.commands.recommend import main; main()"
    done = where_modes_hold(sys.executable, "-c", code, "--run", run, "--history", "item-0001", "--json")
    assert done.returncode == 0, done.stderr
    expected = Recommender.from_run(tiny_run).recommend([["item-0001"]]).ids[0]
    assert [item["item"] for item in json.loads(done.stdout)["items"]] == expected
    assert sorted(str(path) for path in run.rglob("*")) == before
