"""Recommendations for every user in one file, and the options --only and --exclude."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cemg.commands import all_users, evaluate, recommend, train
from cemg.commands.all_users import AllUsers
from cemg.data import Dataset
from cemg.recommender import Recommender
from cemg.storage.parts import Parts

KILLED = """
import os, signal
from cemg.commands import all_users, recommend
table = all_users.AllUsers.table
def killed(self, number):
    return table(self, number) if number < 3 else os.kill(os.getpid(), signal.SIGKILL)
all_users.AllUsers.table, all_users.PART_USERS = killed, 8
recommend.main()
"""  # a program that is killed in its fourth part


@pytest.fixture(scope="module")
def batched_run(make_once, tiny_run, command) -> Path:
    """The tiny run with batches of 4 users; its lists come in 5 parts of 8 users with ``small_parts``."""

    def change(folder: Path) -> None:
        shutil.copytree(tiny_run, folder / "run")
        assert command(train.main, "--run", folder / "run", "--set", "decoding.batch_size=4") == 0

    return make_once("batched", change) / "run"


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(all_users, "PART_USERS", 8)


@pytest.fixture
def write(command, small_parts, batched_run) -> Callable[..., int]:
    """``write(out, *options)`` runs the command on the run with 5 parts."""
    return lambda out, *options: command(
        recommend.main, "--run", batched_run, "--all-users", out, "--top", 5, *options
    )


def stop_after(monkeypatch, parts: int) -> list[int]:
    """Ctrl-C after that many parts. Returns the parts that are computed from here on."""
    computed: list[int] = []
    table = AllUsers.table

    def stopping(self: AllUsers, number: int) -> pa.Table:
        if len(computed) == parts:
            raise KeyboardInterrupt
        computed.append(number)
        return table(self, number)

    monkeypatch.setattr(AllUsers, "table", stopping)
    return computed


@pytest.mark.parametrize("memory", ["off", "constant", "gate"])
def test_each_user_gets_the_same_list_in_a_batch_of_all_users_as_alone(tiny_run, tmp_path, command, memory):
    data, recommender = Dataset.load(tiny_run / "data"), Recommender.from_run(tiny_run)
    out, options = tmp_path / "all.parquet", ("--memory", memory, "--exclude-history")
    assert command(recommend.main, "--run", tiny_run, "--all-users", out, "--top", 4, *options) == 0
    table = pl.read_parquet(out)
    assert table.columns == ["user", "rank", "item", "title", "score"]
    assert table["user"].unique(maintain_order=True).to_list() == data.user_ids
    for user, history in zip(data.user_ids, data.sequences, strict=True):
        own = [data.item_ids[row] for row in history]
        found = recommender.recommend(own, top=4, exclude_history=True, memory=memory)
        rows = table.filter(pl.col("user") == user)
        assert rows["rank"].to_list() == [1, 2, 3, 4] and rows["item"].to_list() == found.ids[0]
        assert rows["title"].to_list() == [title or "" for title in found.titles[0]]
        assert rows["score"].to_list() == found.scores[0].tolist()  # bit for bit


def test_the_lists_do_not_depend_on_the_size_of_batches_and_parts(tiny_run, tmp_path, command, write):
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    assert write(one) == 0
    assert command(recommend.main, "--run", tiny_run, "--all-users", other, "--top", 5) == 0
    assert pl.read_parquet(one).equals(pl.read_parquet(other))
    assert pq.ParquetFile(one).num_row_groups == 5 and pq.ParquetFile(other).num_row_groups == 1


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_joined_shards_are_the_same_file_as_without_shards(tmp_path, write, shards):
    whole, out = tmp_path / "whole.parquet", tmp_path / "all.parquet"
    assert write(whole) == 0
    for index in reversed(range(1, shards + 1)):  # 7 shards: two of them have no part
        assert write(out, "--shard", f"{index}/{shards}") == 0
    assert not out.exists() and write(out, "--join") == 0
    assert out.read_bytes() == whole.read_bytes()
    assert len(list(tmp_path.iterdir())) == shards + 2


@pytest.mark.parametrize("shard", [(), ("--shard", "2/2")])
def test_an_interrupted_command_continues_with_the_missing_parts(tmp_path, write, monkeypatch, shard, capsys):
    out, expected = tmp_path / "all.parquet", tmp_path / "expected.parquet"
    assert write(expected, *shard) == 0
    with monkeypatch.context() as patch:
        first = stop_after(patch, 1)
        assert write(out, *shard) == 130
        assert "interrupted: finished parts are kept; the same command continues" in capsys.readouterr().err
    second = stop_after(monkeypatch, 9)
    assert not out.exists() and write(out, *shard) == 0
    assert sorted(first + second) == ([1, 3] if shard else [0, 1, 2, 3, 4])
    written = out.with_name("all.shard-2-of-2.parquet") if shard else out
    assert written.read_bytes() == (tmp_path / written.name.replace("all", "expected")).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_killed_process_loses_no_finished_part(tmp_path, batched_run, write, monkeypatch):
    expected, out = tmp_path / "expected.parquet", tmp_path / "all.parquet"
    assert write(expected) == 0
    arguments = ["--run", batched_run, "--all-users", out, "--top", "5"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    computed = stop_after(monkeypatch, 9)
    assert write(out) == 0 and computed == [3, 4]
    assert out.read_bytes() == expected.read_bytes()


def test_parts_of_another_command_are_not_mixed_in(tmp_path, write, monkeypatch, capsys):
    out = tmp_path / "all.parquet"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert write(out) == 130
    assert write(out, "--exclude-history") == 2
    err = capsys.readouterr().err
    assert f"error: {out} has unfinished parts of another command" in err
    assert "cause: its --exclude-history is false, not true" in err and ".all.parquet.parts" in err
    for part in (tmp_path / ".all.parquet.parts").glob("part-*"):
        part.unlink()
    assert write(out, "--exclude-history") == 0  # a command that was killed before its first part


def test_a_missing_shard_is_named(tmp_path, write, capsys):
    out = tmp_path / "all.parquet"
    assert write(out, "--join") == 2
    assert f"error: there is no shard of {out}" in capsys.readouterr().err
    assert write(out, "--shard", "1/3") == write(out, "--shard", "3/3") == 0
    assert write(out, "--join") == 2
    err = capsys.readouterr().err
    assert f"error: shard 2/3 of {out} is missing" in err and "--shard 2/3 in place of --join" in err
    assert not out.exists()
    assert write(out, "--shard", "1/2") == 0 and write(out, "--join") == 2
    assert "cause: there are some of N = 2 (1 files), 3 (2 files)" in capsys.readouterr().err


def test_shards_of_another_run_command_or_version_are_refused(tmp_path, tiny_run, write, monkeypatch, capsys):
    out = tmp_path / "all.parquet"

    def refused(cause: str) -> bool:
        assert write(out, "--shard", "1/2") == 0 and write(out, "--join") == 2 and not out.exists()
        err = capsys.readouterr().err
        return "was computed by another command" in err and f"cause: its {cause}" in err

    with monkeypatch.context() as patch:
        patch.setattr(all_users, "__version__", "0.0.9")
        assert write(out, "--shard", "2/2") == 0
    assert refused("version of CEMG is 0.0.9, not ")
    assert write(out, "--shard", "2/2", "--only", "item-0001,item-0002") == 0 and refused("--only is ")
    assert write(out, "--shard", "2/2", "--memory", "off") == 0 and refused("--memory is off, not gate")
    record = AllUsers.about.func
    with monkeypatch.context() as patch:
        patch.setattr(AllUsers, "about", property(lambda self: record(self) | {"data of the run": "0" * 64}))
        assert write(out, "--shard", "2/2") == 0
    assert refused("data of the run is 000000000000…, not ")


def test_a_damaged_or_renamed_shard_is_refused(tmp_path, write, capsys):
    out = tmp_path / "all.parquet"
    first, second = (tmp_path / f"all.shard-{n}-of-2.parquet" for n in (1, 2))
    assert write(out, "--shard", "1/2") == write(out, "--shard", "2/2") == 0
    whole = second.read_bytes()
    for content, said in ((whole[:-40], "is not a finished shard"), (first.read_bytes(), "holds shard 1/2")):
        second.write_bytes(content)
        assert write(out, "--join") == 2 and f"error: {second} {said}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("options", [("--join",), (), ("--shard", "1/2")])
def test_two_commands_do_not_write_the_same_file_at_once(tmp_path, write, capsys, monkeypatch, options):
    out = tmp_path / "all.parquet"
    assert write(out, "--shard", "1/2") == write(out, "--shard", "2/2") == 0
    written = tmp_path / "all.shard-1-of-2.parquet" if "--shard" in options else out
    with Parts(written, {}, total=0, schema=all_users.SCHEMA):
        assert write(out, *options) == 2
        assert f"error: {written} is being written by process {os.getpid()}" in capsys.readouterr().err
    assert write(out, *options) == 0


def test_the_lists_before_the_test_item_give_the_reported_metrics(tiny_run, tmp_path, command):
    run, out = Path(shutil.copytree(tiny_run, tmp_path / "run")), tmp_path / "test.parquet"
    options = ("--top", 10, "--beams", 10, "--exclude-history", "--memory", "off")
    assert command(recommend.main, "--run", run, "--all-users", out, "--part", "test", *options) == 0
    result = tmp_path / "r.json"
    assert command(evaluate.main, "--run", run, "--recommendations", out, "--result", result) == 0
    reported = json.loads((run / "results" / "synthetic-cemg-test.json").read_text())
    found = json.loads(result.read_text())["metrics"]
    assert found == reported["metrics_history_excluded_in_search"]


def test_an_interrupted_write_keeps_the_old_file(tiny_run, tmp_path, command, monkeypatch):
    out = tmp_path / "all.parquet"
    out.write_text("old")
    monkeypatch.setattr(Recommender, "recommend", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(recommend.main, "--run", tiny_run, "--all-users", out) == 130
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
        (("--all-users", "a.csv"), "--all-users a.csv must end in .parquet"),
        (
            ("--all-users", "a.parquet", "--user", "x"),
            "give exactly one of --history, --user, --histories and --all-users",
        ),
        (("--user", "x", "--part", "test"), "--part test has no effect without --all-users"),
        (("--all-users", "a.parquet", "--part", "train"), "--part must be all, test or valid, got 'train'"),
        (("--user", "x", "--shard", "1/2"), "--shard 1/2 has no effect without --all-users"),
        (("--user", "x", "--join"), "--join has no effect without --all-users"),
        (("--all-users", "a.parquet", "--shard", "1/2", "--join"), "--shard and --join exclude each other"),
        (("--all-users", "a.parquet", "--shard", "0/2"), "--shard must be i/N with i from 1 to N, got '0/2'"),
        (("--all-users", "a.parquet", "--shard", "3/2"), "--shard must be i/N with i from 1 to N, got '3/2'"),
        (("--all-users", "a.parquet", "--shard", "½/2"), "--shard must be i/N with i from 1 to N, got '½/2'"),
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
