"""Items that training never saw are left out of the data, added afterwards, and tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cemg.artifacts import RunArtifacts
from cemg.commands import new_items, train
from cemg.data import Dataset
from cemg.errors import UserError
from cemg.experiments import Store, plan, work, write_experiment_report
from cemg.experiments.work import Options, Source, run_tasks


def shop(users: int = 120, items: int = 40) -> Dataset:
    """Groups of eight items with a word of their own; a user has seven items of one group."""
    rng = np.random.default_rng(0)
    words = ["garden", "music", "kitchen", "office", "telescope"]
    sequences = [
        (8 * (user % (items // 8)) + rng.permutation(8)[:7]).astype(np.int32) for user in range(users)
    ]
    texts: list[str | None] = [f"{words[item // 8]} {item}" for item in range(items)]
    users_, items_ = [f"u{n}" for n in range(users)], [f"i{n}" for n in range(items)]
    return Dataset("shop", users_, items_, sequences, [""] * items, texts, [None] * items, "as drawn")


def test_the_training_data_has_neither_the_items_nor_their_interactions() -> None:
    data = shop()
    left_out = new_items.draw_items(data, 0)
    rest = new_items.without_items(data, left_out)
    gone = {data.item_ids[row] for row in np.flatnonzero(left_out)}
    assert len(gone) == 2 and rest.num_items == 38 and not gone & {*rest.item_ids}
    for whole, remaining in zip(data.sequences, rest.sequences, strict=True):
        ids = [data.item_ids[row] for row in whole]
        assert [rest.item_ids[row] for row in remaining] == [item for item in ids if item not in gone]
    assert [rest.texts[n] for n in range(38)] == [data.texts[int(item[1:])] for item in rest.item_ids]
    assert new_items.draw_items(data, 1).tolist() != left_out.tolist()


def test_the_targets_are_the_left_out_ones_with_their_whole_history() -> None:
    data = shop()
    left_out = new_items.draw_items(data, 0)
    rest = new_items.without_items(data, left_out)
    added = [data.item_ids[row] for row in np.flatnonzero(left_out)]
    catalog = [*rest.item_ids, *reversed(added)]
    split = new_items.split_of(data, rest, added, catalog)
    by_hand = [s for s in data.sequences if left_out[s[-1]]]
    assert [catalog[item] for item in split.test] == [data.item_ids[s[-1]] for s in by_hand]
    assert [[catalog[i] for i in h] for h in split.histories("test")] == [
        [data.item_ids[i] for i in s[:-1]] for s in by_hand
    ]
    assert split.train_counts(40)[38:].tolist() == [0, 0]
    assert split.train_counts(40).sum() == sum(map(len, rest.split().train))
    unwanted = next(
        item for item in data.item_ids if item not in {data.item_ids[s[-1]] for s in data.sequences}
    )
    with pytest.raises(UserError, match="no user has a target that was left out"):
        new_items.split_of(data, rest, [unwanted], catalog)


def test_a_data_set_without_texts_and_images_is_refused() -> None:
    data = shop(items=16)  # 5 % of them is none
    with pytest.raises(UserError, match="shop: too few items have a text or an image"):
        new_items.draw_items(data, 0)


@pytest.mark.medium
def test_the_task_trains_adds_and_tests(
    tmp_path: Path, tiny_settings: list[str], command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop().save(tmp_path / "shop")
    own = [one for one in tiny_settings if not one.startswith("data.")]
    tasks = plan(["rq5"], {"shop": tmp_path / "shop"}, models=["cemg"], settings=own)
    (task,) = (task for task in tasks if task.variant == "new items")
    ran: list[str] = []

    def here(words: list[str], log: int) -> int:
        main = train.main if words[0] != sys.executable else (lambda: new_items.app())
        ran.append("train" if words[0] != sys.executable else words[3])
        return command(main, *words[1 if words[0] != sys.executable else 3 :])

    monkeypatch.setattr(work, "run_command", here)
    store = Store(tmp_path / "out")
    options = Options(sources={("shop", "leave-one-out"): Source(840, "a" * 64)})
    assert run_tasks([task], store, options) == [] and ran == ["prepare", "train", "test"]
    assert not list((store.path(task) / "run").glob("results/*"))  # the items in training are not tested
    found = store.results(task)
    assert set(found) == {"CEMG, new items", "CEMG, new items, search alone", "Item memory, new items"}
    record = found["CEMG, new items"]
    assert record["split"]["items"] == 40 and "2 items were added after training" in record["split"]["split"]
    catalog = RunArtifacts.open(store.path(task) / "run").load_catalog()
    added = set(catalog.item_ids[38:])
    assert len(added) == 2
    users = sum(shop().item_ids[s[-1]] in added for s in shop().sequences)
    assert record["split"]["users"] == users == record["cold"]["targets"]
    assert found["Item memory, new items"]["metrics"]["HR@20"] > 0  # by their texts
    page = write_experiment_report(store, [task], ["rq5"]).read_text()
    assert "2 items were added after training" in page

    (store.path(task) / "result.json").unlink()  # interrupted before the end: nothing is added twice
    before = json.dumps(record["metrics"])
    assert run_tasks([task], store, options) == [] and ran[3:] == ["train", "test"]
    assert json.dumps(store.results(task)["CEMG, new items"]["metrics"]) == before
