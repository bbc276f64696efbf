"""cemg-catalog remove, restore and list."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cemg.artifacts import RunArtifacts
from cemg.commands import catalog, evaluate, recommend
from cemg.errors import UserError
from cemg.recommender import Recommender
from cemg.tokenizer import Catalog

HISTORY = ["item-0001", "item-0002"]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_removed_items_are_not_recommended_until_they_are_restored(run, command, capsys):
    before = Recommender.from_run(run).recommend(HISTORY, top=50).ids[0]
    codes = (run / "catalog" / "catalog.safetensors").read_bytes()
    gone = before[:3]
    assert command(catalog.main, "remove", "--run", run, "--items", " ".join(gone)) == 0
    assert "3 items removed; 47 of 50 are recommended" in capsys.readouterr().err
    recommender = Recommender.from_run(run)
    assert not set(gone) & set(recommender.recommend(HISTORY, top=50).ids[0])
    assert recommender.recommend(HISTORY, top=10).ids[0] == before[3:13]  # vocab: other scores stay
    assert recommender.recommend([gone], top=5).ids[0][0] is not None  # a history may still have them
    only = recommender.recommend(HISTORY, top=3, filter=recommender.only(before[2:4]))
    assert only.ids[0] == [before[3], None, None]
    listed = recommender.recommend([HISTORY, HISTORY], top=2, filter=[None, recommender.only(before[:5])])
    assert listed.ids == [before[3:5], before[3:5]]
    exact = recommender.recommend(HISTORY, top=4, exact=True, exclude_history=True)
    assert not {*gone, *HISTORY} & set(exact.ids[0])
    assert (run / "catalog" / "catalog.safetensors").read_bytes() == codes
    assert command(catalog.main, "restore", "--run", run, "--items", ",".join(gone[:2])) == 0
    assert "2 items restored; 49 of 50 are recommended" in capsys.readouterr().err
    assert set(before) - set(Recommender.from_run(run).recommend(HISTORY, top=50).ids[0]) == {gone[2]}


def test_the_transformers_engine_leaves_removed_items_out_too(run, command):
    before = Recommender.from_run(run, engine="transformers").recommend(HISTORY, top=10, beams=20).ids[0]
    command(catalog.main, "remove", "--run", run, "--items", before[0])
    found = Recommender.from_run(run, engine="transformers").recommend(HISTORY, top=9, beams=20).ids[0]
    assert found == before[1:]


def test_ids_can_be_read_from_a_file_and_a_second_removal_adds_to_the_first(run, tmp_path, command, capsys):
    (tmp_path / "ids.txt").write_text("item-0003\nitem-0004\n")
    for items in (tmp_path / "ids.txt", "item-0004 item-0005"):
        assert command(catalog.main, "remove", "--run", run, "--items", items) == 0
    assert "1 item removed; 47 of 50 are recommended" in capsys.readouterr().err
    assert Recommender.from_run(run).removed == ["item-0003", "item-0004", "item-0005"]


def test_unknown_items_and_items_that_were_not_removed_are_refused(run, command, capsys):
    assert command(catalog.main, "remove", "--run", run, "--items", "item-0001 item-99") == 2
    assert "item 'item-99' is not in the catalog of 50 items" in capsys.readouterr().err
    assert command(catalog.main, "restore", "--run", run, "--items", "item-0001") == 2
    assert "item 'item-0001' is not a removed item" in capsys.readouterr().err
    assert Recommender.from_run(run).removed == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("item-0003", "item-0004"),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("[", "{").replace("]", "}"),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_list_of_removed_items_is_refused(run, command, capsys, damage):
    command(catalog.main, "remove", "--run", run, "--items", "item-0003")
    path = run / "removed.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"removed\.json"):
        Recommender.from_run(run)
    assert command(recommend.main, "--run", run, "--history", "item-0001") == 2
    fix = capsys.readouterr().err.splitlines()[-1].removeprefix("  fix:   ")
    assert fix.startswith("delete it")
    Path(fix.partition(": rm ")[2]).unlink()
    assert Recommender.from_run(run).removed == []


def test_the_catalog_is_listed_with_codes_and_titles(run, command, capsys):
    command(catalog.main, "remove", "--run", run, "--items", "item-0002")
    capsys.readouterr()
    assert command(catalog.main, "list", "--run", run, "--json") == 0
    items = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Catalog.load(run / "catalog")
    assert [item["item"] for item in items] == expected.item_ids
    assert [item["codes"] for item in items] == expected.codes.tolist()
    assert [item["item"] for item in items if item["removed"]] == ["item-0002"]
    titles = Recommender.from_run(run).titles()
    assert [item["title"] for item in items] == [titles[item["item"]] for item in items]
    assert command(catalog.main, "list", "--run", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 50 and lines[1].startswith("item-0002\t") and lines[1].endswith("(removed)")
    assert command(catalog.main, "show", "--run", run, "--item", "item-0003") == 0
    assert capsys.readouterr().out.strip() == lines[2].split("\t")[1]


def test_popularity_and_memory_are_evaluated_without_removed_items(run, command):
    ids = RunArtifacts.open(run).load_catalog().item_ids
    assert command(catalog.main, "remove", "--run", run, "--items", " ".join(map(str, ids[3:]))) == 0
    assert command(evaluate.main, "--run", run, "--model", "memory") == 0
    for model in ("popularity", "memory"):
        (path,) = (run / "results").glob(f"*-{model}-test.json")
        assert json.loads(path.read_text())["spread"]["metrics"]["coverage@10"] <= 3 / len(ids)
