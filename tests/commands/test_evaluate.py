"""cemg-eval and the end of cemg-train evaluate the lists that cemg-recommend serves."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import warnings
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from cemg import progress
from cemg.artifacts import RunArtifacts
from cemg.commands import catalog, console, evaluate, recommend, train
from cemg.data import Dataset
from cemg.evaluation import evaluate as evaluate_ranker
from cemg.evaluation.ranker import beam_ranker
from cemg.recommender import Recommender

WORDS = ["plain", "sturdy", "garden", "kitchen", "music", "office", "telescope", "small", "blue", "old"]
SERVED = "metrics_history_excluded_in_search"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The text that the console prints to stderr."""
    stream = io.StringIO()
    monkeypatch.setattr(progress.console, "_file", stream)
    return stream


def write_served(run: Path, path: Path) -> pl.DataFrame:
    """Writes a table of the lists that the run serves to each user before the test item."""
    data, recommender = Dataset.load(run / "data"), Recommender.from_run(run)
    split, rows = data.split(), []
    for user, history in zip(split.users, split.histories("test"), strict=True):
        own = [data.item_ids[row] for row in history]
        found = recommender.recommend(own, top=10, beams=10, exclude_history=True, memory="off")
        rows += [(data.user_ids[user], rank, item) for rank, item in enumerate(found.ids[0], start=1)]
    table = pl.DataFrame(rows, schema=["user", "rank", "item"], orient="row").drop_nulls()
    table.sample(fraction=1, shuffle=True, seed=0).write_parquet(path)
    return table


def test_metrics_with_excluded_history_are_those_of_the_served_lists(tiny_run, tmp_path, command, capsys):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    record = json.loads((run / "results" / "synthetic-cemg-test.json").read_text())
    write_served(run, tmp_path / "served.parquet")
    arguments = ("--run", run, "--recommendations", tmp_path / "served.parquet")
    assert command(evaluate.main, *arguments, "--result", tmp_path / "r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["metrics"] == record[SERVED] and record[SERVED].keys() == record["metrics"].keys()
    assert found["metrics_history_removed"] == found["metrics"]  # there is none in the lists
    assert found["config"] == {"model": "recommendations", "file": "served.parquet", "notes": []}
    printed = capsys.readouterr().out
    assert "synthetic-recommendations-served-test" in printed and "synthetic-popularity-test" in printed


def test_the_table_shows_both_ways_to_exclude_the_history(tiny_run):
    page = (tiny_run / "report" / "report.html").read_text()
    assert "- history removed from the list" in page and "- history excluded in the search" in page


def test_lists_can_be_csv_or_one_row_per_user_and_gaps_are_reported(tiny_run, tmp_path, command, said):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    table = write_served(run, tmp_path / "served.parquet")
    table.write_csv(tmp_path / "a.csv")
    table.group_by("user", maintain_order=True).agg("item").write_parquet(tmp_path / "b.parquet")
    results = []
    for name in ("served.parquet", "a.csv", "b.parquet"):
        arguments = ("--run", run, "--recommendations", tmp_path / name, "--result", tmp_path / "r.json")
        assert command(evaluate.main, *arguments) == 0
        results.append(json.loads((tmp_path / "r.json").read_text())["metrics"])
    assert results[1:] == results[:1] * 2
    short = table.filter(pl.col("user") != table["user"][0])
    pl.concat([short, short[:1].with_columns(user=pl.lit("stranger"))]).write_parquet(tmp_path / "c.parquet")
    assert command(evaluate.main, "--run", run, "--recommendations", tmp_path / "c.parquet") == 0
    lines = said.getvalue()
    assert "note: 1 of 40 users have no recommendations and count as misses" in lines
    assert "note: 1 users of the file are not among the evaluated users" in lines


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"user": ["u"], "thing": ["x"]}, "has no column item"),
        ({"user": ["user-0001"], "item": ["item-9999"]}, "item 'item-9999' is not among the 50 of this run"),
        ({"user": ["a", "a"], "item": ["item-0001", "item-0001"]}, "user 'a' has item 'item-0001' more than"),
        ({"user": ["a"], "item": ["item-0001"], "rank": ["first"]}, "a rank is not a number"),
        ({"user": ["a", None], "item": ["item-0001", "item-0002"]}, "has rows without a user"),
        ({"user": ["a"], "item": ["item-0001"], "rank": [[1]]}, "column rank has type List(Int64)"),
        ({"user": [["a"]], "item": ["item-0001"]}, "column user has type List(String)"),
        ({"user": ["a"], "item": [[["item-0001"]]]}, "column item has type List(String)"),
        ({"user": ["a"], "item": [{"id": "item-0001"}]}, "column item has type Struct"),
        ({"user": [b"\xff"], "item": ["item-0001"]}, "column user has type Binary"),
    ],
)
def test_a_table_without_lists_is_refused(tiny_run, tmp_path, command, capsys, rows, message):
    pl.DataFrame(rows).write_parquet(tmp_path / "l.parquet")
    assert command(evaluate.main, "--run", tiny_run, "--recommendations", tmp_path / "l.parquet") == 2
    assert message in capsys.readouterr().err
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    assert command(evaluate.main, "--run", tiny_run, "--recommendations", tmp_path / "torn.parquet") == 2
    assert "torn.parquet cannot be read as a table" in capsys.readouterr().err


def test_a_training_ends_with_the_table_five_titles_the_report_and_the_next_command(
    tiny_run, tmp_path, command, said, capsys, feature_cache
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert command(train.main, "--run", run, "--cache", feature_cache) == 0
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    assert lines[-2] == f"report: {run}/report/report.html" and (run / "report" / "report.html").is_file()
    shown = [line for line in lines if "item-00" in line]
    data = Dataset.load(run / "data")
    titles = dict(zip(data.item_ids, data.titles, strict=True))
    assert len(shown) == 5 and "HR@10" in said.getvalue()
    for line in shown:
        item = next(cell.strip() for cell in line.split("│") if "item-" in cell)
        assert (titles[item] or "") in line
    program, *arguments = shlex.split(lines[-1].removeprefix("next:   "))
    assert program == "cemg-recommend"
    capsys.readouterr()
    assert command(recommend.main, *arguments, "--json") == 0
    served = [item["item"] for item in json.loads(capsys.readouterr().out)["items"]]
    assert all(item in line for item, line in zip(served[:5], shown, strict=True))


def test_a_model_trained_on_valid_codes_warns_under_another_normalization(said):
    from cemg.config import load_config

    valid = load_config(None, ["generator.loss=valid", "decoding.normalize=valid"])
    for config, name in ((valid, None), (valid, "valid"), (load_config(None), "level")):
        console.warn_of_normalize(config, name)
    assert said.getvalue() == ""
    console.warn_of_normalize(valid, "vocab")
    assert said.getvalue().startswith("warning: this model was trained with generator.loss=valid, so")


def test_warnings_of_other_libraries_are_not_shown_and_ours_are(said):
    def body() -> None:
        for module in ("torch.nn.modules", "sklearn.manifold", "transformers.modeling"):
            warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module=module)
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="cemg.features.vision")

    before = warnings.showwarning
    console.run(body)
    assert said.getvalue() == "warning: ours\n" and warnings.showwarning is before


def test_a_progress_bar_ends_full_even_if_the_work_stops_early(monkeypatch):
    from rich.console import Console

    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=100))
    with progress.bar("early", total=10) as advance:
        advance(3)
    assert "3/3" in stream.getvalue() and stream.getvalue().endswith("\x1b[?25h")  # the cursor is back
    assert list(progress.track(range(4), "whole")) == [0, 1, 2, 3]
    assert "4/4" in stream.getvalue()
    for item in progress.track(range(4), "broken"):
        if item == 1:
            break
    with progress.bar("after", total=1) as advance:  # nothing is left open: a second live bar would raise
        advance(1)
    assert "1/1" in stream.getvalue()


def test_removed_and_added_items_are_evaluated_as_they_are_served(tiny_run, tmp_path, command, said):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = write_served(run, tmp_path / "a.parquet")
    gone = before.filter(pl.col("rank") == 1)["item"].unique().to_list()
    command(catalog.main, "remove", "--run", run, "--items", " ".join(gone))
    new = "item,title,text\n" + "".join(f"n{k},{word},{word} rudder\n" for k, word in enumerate(WORDS))
    (tmp_path / "new.csv").write_text(new)
    assert command(catalog.main, "add", "--run", run, "--items", tmp_path / "new.csv") == 0
    assert command(evaluate.main, "--run", run, "--result", tmp_path / "r.json") == 0
    record = json.loads((tmp_path / "r.json").read_text())
    note = f"{len(gone)} of 50 items are removed: they are not listed and count as misses"
    assert note in record["config"]["notes"] and f"note: {note}" in said.getvalue()
    served = write_served(run, tmp_path / "served.parquet")
    assert not set(gone) & set(served["item"]) and served["item"].str.starts_with("n").any()
    old = served.filter(~pl.col("item").str.starts_with("n"))
    arguments = ("--run", run, "--result", tmp_path / "r.json", "--recommendations")
    assert command(evaluate.main, *arguments, tmp_path / "served.parquet") == 0
    whole = json.loads((tmp_path / "r.json").read_text())["metrics"]
    old.write_parquet(tmp_path / "old.parquet")
    assert command(evaluate.main, *arguments, tmp_path / "old.parquet") == 0
    closed_up = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert (
        all(whole[name] <= closed_up[name] for name in whole) and whole != closed_up
    )  # new items take ranks


@pytest.mark.parametrize("engine", ["cemg", "transformers"])
def test_a_ranker_never_lists_a_removed_item(tiny_run, engine):
    artifacts = RunArtifacts.open(tiny_run)
    catalog, data = artifacts.load_catalog(), artifacts.load_data()
    model, vocabulary = artifacts.load_generator()
    histories = data.split().histories("test")[:5]
    rank = partial(beam_ranker, artifacts, model, vocabulary, catalog, beams=10, engine=engine)
    gone = rank()(histories, 10)[:, 0].unique().tolist()
    found = rank(removed=gone)(histories, 10)
    assert not set(gone) & set(found.flatten().tolist()) and (found >= 0).sum() >= 20
    if engine == "cemg":
        excluded = rank(removed=gone, exclude_history=True)(histories, 10).tolist()
        assert not any(
            {*gone, *own.tolist()} & set(row) for own, row in zip(histories, excluded, strict=True)
        )


def test_the_memory_alone_is_evaluated_like_the_generator(tiny_run, tmp_path, command, capsys):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert command(evaluate.main, "--run", run, "--model", "memory", "--result", tmp_path / "r.json") == 0
    assert "synthetic-memory-test" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    artifacts = RunArtifacts.open(run)
    split, memory = artifacts.load_data().split(), artifacts.load_memory()
    alone = evaluate_ranker(memory.ranker(), split, progress=False)
    assert found["metrics"] == alone.metrics
    assert found["metrics_history_removed"] == alone.metrics_history_removed
    assert found["config"]["model"] == "memory" and "decay" in found["config"]["constants"]
    for stage in ("memory", "gate"):  # as in a run that an earlier version trained
        shutil.rmtree(run / stage)
    assert command(evaluate.main, "--run", run, "--model", "memory") == 2
    assert "has no item memory" in capsys.readouterr().err


def test_items_that_were_removed_are_not_in_the_lists_of_the_memory(tiny_run, tmp_path, command, said):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    data = RunArtifacts.open(run).load_data()
    targets = {data.item_ids[row] for row in data.split().test}
    assert command(catalog.main, "remove", "--run", run, "--items", " ".join(sorted(targets))) == 0
    arguments = ("--run", run, "--model", "memory", "--result", tmp_path / "r.json")
    assert command(evaluate.main, *arguments) == 0
    assert f"{len(targets)} of 50 items are removed" in said.getvalue()
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["HR@20"] == 0


@pytest.mark.parametrize("option", [("--beams", 5), ("--engine", "transformers"), ("--exact",)])
def test_options_of_the_search_do_not_combine_with_the_memory(tiny_run, command, capsys, option):
    assert command(evaluate.main, "--run", tiny_run, "--model", "memory", *option) == 2
    assert "--model memory cannot be combined with" in capsys.readouterr().err
    assert command(evaluate.main, "--run", tiny_run, "--model", "memroy") == 2
    assert "unknown model 'memroy'" in capsys.readouterr().err
