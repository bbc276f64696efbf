"""Recommendations for every user in one file, and the options --only and --exclude."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from cemg.commands import evaluate, recommend
from cemg.data import Dataset
from cemg.recommender import Recommender


def test_each_user_gets_the_same_list_in_a_batch_of_all_users_as_alone(tiny_run, tmp_path, command):
    data, recommender = Dataset.load(tiny_run / "data"), Recommender.from_run(tiny_run)
    out = tmp_path / "all.parquet"
    assert command(recommend.main, "--run", tiny_run, "--all", out, "--top", 4, "--exclude-history") == 0
    table = pl.read_parquet(out)
    assert table.columns == ["user", "rank", "item", "title", "score"]
    assert table["user"].unique(maintain_order=True).to_list() == data.user_ids
    for user in (0, 7, data.num_users - 1):
        own = [data.item_ids[row] for row in data.sequences[user]]
        found = recommender.recommend(own, top=4, exclude_history=True)
        rows = table.filter(pl.col("user") == data.user_ids[user])
        assert rows["rank"].to_list() == [1, 2, 3, 4] and rows["item"].to_list() == found.ids[0]
        assert rows["title"].to_list() == [title or "" for title in found.titles[0]]
        assert rows["score"].to_list() == pytest.approx(found.scores[0].tolist(), abs=1e-4)  # another batch


def test_the_lists_before_the_test_item_give_the_reported_metrics(tiny_run, tmp_path, command):
    run, out = Path(shutil.copytree(tiny_run, tmp_path / "run")), tmp_path / "test.parquet"
    options = ("--top", 10, "--beams", 10, "--exclude-history", "--memory", "off")
    assert command(recommend.main, "--run", run, "--all", out, "--part", "test", *options) == 0
    result = tmp_path / "r.json"
    assert command(evaluate.main, "--run", run, "--recommendations", out, "--result", result) == 0
    reported = json.loads((run / "results" / "synthetic-cemg-test.json").read_text())
    found = json.loads(result.read_text())["metrics"]
    assert found == reported["metrics_history_excluded_in_search"]


def test_an_interrupted_write_keeps_the_old_file(tiny_run, tmp_path, command, monkeypatch):
    out = tmp_path / "all.parquet"
    out.write_text("old")
    monkeypatch.setattr(Recommender, "recommend", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(recommend.main, "--run", tiny_run, "--all", out) == 130
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("as_file", [False, True])
def test_only_and_exclude_accept_ids_or_a_file(tiny_run, tmp_path, command, capsys, as_file):
    def written(ids: list[str], name: str) -> str:
        (tmp_path / name).write_text("\n".join(ids) + "\n\n")
        return str(tmp_path / name) if as_file else ", ".join(ids)

    some, fewer = [f"item-00{n:02}" for n in range(1, 9)], ["item-0002", "item-0003"]
    arguments = ("--run", tiny_run, "--history", "item-0001", "--top", 20, "--json")
    allowed = ("--only", written(some, "only"), "--exclude", written(fewer, "exclude"))
    assert command(recommend.main, *arguments, *allowed) == 0
    items = [item["item"] for item in json.loads(capsys.readouterr().out)["items"]]
    assert sorted(items) == sorted({*some} - {*fewer})
    assert command(recommend.main, *arguments, *allowed[2:]) == 0
    items = [item["item"] for item in json.loads(capsys.readouterr().out)["items"]]
    assert len(items) == 20 and not set(items) & set(fewer)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--all", "a.csv"), "--all a.csv must end in .parquet"),
        (
            ("--all", "a.parquet", "--user", "x"),
            "give exactly one of --history, --user, --histories and --all",
        ),
        (("--user", "x", "--part", "test"), "--part test has no effect without --all"),
        (("--all", "a.parquet", "--part", "train"), "--part must be all, test or valid, got 'train'"),
        (("--history", "item-0001", "--only", "item-9999"), "item 'item-9999' is not in the catalog"),
        (("--history", "item-0001", "--exclude", " , "), "--exclude names no item"),
    ],
)
def test_conflicting_options_are_refused(tiny_run, command, capsys, arguments, said):
    assert command(recommend.main, "--run", tiny_run, *arguments) == 2
    assert said in capsys.readouterr().err


def test_only_with_no_remaining_item_gives_empty_lists(tiny_run, command, capsys):
    arguments = ("--history", "item-0001", "--only", "item-0002", "--exclude", "item-0002", "--json")
    assert command(recommend.main, "--run", tiny_run, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["items"] == []
