"""The split in time: one cut for all users, targets after it, and what cannot be cut."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cemg.commands import data as data_command
from cemg.data import Dataset, read_dataset
from cemg.errors import UserError
from cemg.evaluation import PopularityRanker, evaluate

# Times 1 … 10, so the cuts are at 9 (80 %) and 10 (90 %). Each user has each item once.
EVENTS = {
    "a": [("i", 1), ("j", 2), ("k", 9), ("l", 10)],
    "b": [("i", 3), ("j", 4), ("l", 10)],
    "c": [("k", 5), ("i", 9)],
    "d": [("l", 10), ("k", 10)],
    "e": [("j", 6), ("k", 7), ("l", 8)],
    "g": [("i", 9), ("j", 9), ("k", 9)],
    "h": [("j", 10)],
}
FILLER = [("i", 1), ("j", 1), ("i", 2), ("j", 2), ("i", 3), ("j", 3), ("i", 4), ("j", 4), ("i", 5), ("j", 5)]


def write_events(path: Path, *, shuffled: bool = False) -> Path:
    """50 interactions: those of EVENTS, and 32 more before the first cut, by users without targets."""
    rows = [(user, item, time) for user, events in EVENTS.items() for item, time in events]
    rows += [(f"f{n}", *FILLER[n % len(FILLER)]) for n in range(32)]
    order = np.random.default_rng(0).permutation(len(rows)) if shuffled else range(len(rows))
    lines = ["user,item,timestamp", *(",".join(map(str, rows[n])) for n in order)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("shuffled", [False, True])
def test_targets_are_the_first_items_after_a_cut_and_histories_are_before_it(
    tmp_path: Path, shuffled: bool
) -> None:
    data = read_dataset(write_events(tmp_path / "shop.csv", shuffled=shuffled), min_count=0, split="time")
    split = data.split()

    def by_user(part: str) -> dict[str, tuple[list[str], str]]:
        rows = zip(split.users_of(part), split.histories(part), split.targets(part), strict=True)
        return {data.user_ids[u]: ([data.item_ids[i] for i in h], data.item_ids[t]) for u, h, t in rows}

    assert data.cuts is not None and data.cuts[data.user_ids.index("a")].tolist() == [2, 3]
    assert by_user("valid") == {"a": (["i", "j"], "k"), "c": (["k"], "i")}
    assert by_user("test") == {"a": (["i", "j", "k"], "l"), "b": (["i", "j"], "l")}
    assert split.train_counts(data.num_items).sum() == 40  # of 50: those before time 9
    assert split.fingerprint["users"] == 2
    assert split.fingerprint["split"] == "in time, at 80% and 90% of the interactions"
    assert "split" not in read_dataset(tmp_path / "shop.csv", min_count=0).split().fingerprint


def test_the_cuts_are_saved_and_a_folder_with_them_is_not_read_as_leave_one_out(tmp_path: Path) -> None:
    data = read_dataset(write_events(tmp_path / "shop.csv"), min_count=0, split="time")
    data.save(tmp_path / "shop")
    loaded = Dataset.load(tmp_path / "shop")
    assert loaded.split().fingerprint == data.split().fingerprint
    assert read_dataset(tmp_path / "shop").split().fingerprint == data.split().fingerprint
    assert json.loads((tmp_path / "shop" / "dataset.json").read_text())["format"] == 2  # refused before
    plain = read_dataset(tmp_path / "shop.csv", min_count=0)
    plain.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "dataset.json").read_text())["format"] == 1


@pytest.mark.parametrize("damage", ["missing", "changed", "short"])
def test_damaged_cuts_are_refused(tmp_path: Path, damage: str) -> None:
    data = read_dataset(write_events(tmp_path / "shop.csv"), min_count=0, split="time")
    data.save(tmp_path / "shop")
    cuts = tmp_path / "shop" / "cuts.parquet"
    if damage == "missing":
        cuts.unlink()
    elif damage == "changed":
        cuts.write_bytes(cuts.read_bytes()[:-1] + b"x")
    else:
        with pytest.raises(UserError, match=r"cuts must be \[39, 2\], got \(1, 2\)"):
            Dataset(**{name: getattr(data, name) for name in data.__slots__} | {"cuts": data.cuts[:1]})
        return
    with pytest.raises(UserError, match=r"cuts\.parquet") as caught:
        Dataset.load(tmp_path / "shop")
    assert "cemg-data prepare" in str(caught.value)


def test_the_sequence_format_takes_the_times_beside_it(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "interactions.txt").write_text("1 10 11 12\n2 10 12 11\n3 11 10 12\n4 12 11 10\n")
    with pytest.raises(UserError, match="shop has no times, which a split in time needs") as caught:
        read_dataset(tmp_path / "shop", split="time")
    assert "--times" in str(caught.value)
    (tmp_path / "shop" / "timestamps.txt").write_text("1 1 2 9\n2 1 2 10\n3 3 4 12\n4 5 6 7\n")
    split = read_dataset(tmp_path / "shop", split="time").split()
    assert split.test.tolist() == [1, 2] and [h.tolist() for h in split.histories("test")] == [[0, 2], [1, 0]]
    assert read_dataset(tmp_path / "shop").cuts is None  # leave-one-out does not read the file


def test_times_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    rows = [f"u{n},i{n % 3},{5 if n else 1}" for n in range(30)]
    (tmp_path / "shop.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    with pytest.raises(UserError, match="cannot be split in time") as caught:
        read_dataset(tmp_path / "shop.csv", min_count=0, split="time")
    assert "its times are 1 … 5, and the cuts would be at 5 and 5" in str(caught.value)


def test_a_folder_prepared_for_leave_one_out_is_refused_and_the_fix_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_events(Path("shop.csv"))
    assert command(data_command.main, "prepare", "shop.csv", "out", "--min-count", "0") == 0
    with pytest.raises(UserError, match="was prepared for a leave-one-out split") as caught:
        read_dataset(Path("out"), split="time")
    fix = str(caught.value).partition("prepare its source into another folder: cemg-data ")[2].splitlines()[0]
    words = shlex.split(fix.replace("SOURCE", "shop.csv"))
    assert command(data_command.main, *words, "--min-count", "0") == 0
    assert read_dataset(Path("out-time"), split="time").cuts is not None
    assert read_dataset(Path("out")).cuts is None  # it is kept


def test_each_part_is_evaluated_on_its_own_users(tmp_path: Path) -> None:
    data = read_dataset(write_events(tmp_path / "shop.csv"), min_count=0, split="time")
    split = data.split()
    assert split.valid_users.tolist() != split.users.tolist()
    ranker = PopularityRanker.fit(split)
    valid, test = (evaluate(ranker, split, part=part, progress=False) for part in ("valid", "test"))
    assert len(valid.ranks) == len(split.valid) == 2 and len(test.ranks) == len(split.test) == 2
    assert valid.fingerprint["part"] == "valid" and "part" not in test.fingerprint


@pytest.mark.parametrize("cuts", [[[3, 4], [1, 2]], [[1, 0], [1, 2]], [[-1, 0], [1, 2]]])
def test_cuts_beyond_a_history_are_refused(tmp_path: Path, cuts: list[list[int]]) -> None:
    data = read_dataset(write_events(tmp_path / "shop.csv"), min_count=0, split="time")
    with pytest.raises(UserError, match="cuts must be ascending and within the history of each user"):
        dataclasses.replace(
            data, user_ids=["a", "b"], sequences=[np.array([0, 1]), np.array([1, 2, 3])], cuts=np.array(cuts)
        )
