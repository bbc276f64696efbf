"""The engine answers as the recommender does; events, removals and additions hold from the next search."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cemg.commands import catalog as catalog_command
from cemg.errors import UserError
from cemg.recommender import Recommender
from cemg.serve.engine import Engine, Query


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    return Recommender.from_run(tiny_run)


@pytest.fixture
def engine(tiny_run: Path) -> Engine:
    return Engine(Recommender.from_run(tiny_run))


def ask(engine: Engine, history: list[str], **options: object) -> list[str]:
    return engine.recommend([Query(tuple(history), beams=20, **options)])[0].items  # type: ignore[arg-type]


def test_answers_are_those_of_the_recommender_with_the_same_memory(engine: Engine) -> None:
    data = engine.recommender.artifacts.load_data()
    users = [user for user, items in zip(data.user_ids, data.sequences, strict=True) if len(items) > 2][:5]
    queries = [Query(tuple(engine.history(user)), limit=limit, beams=20) for user, limit in
               zip(users, (1, 2, 3, 4, 5), strict=True)]  # fmt: skip
    answers = engine.recommend(queries)
    found = engine.recommender.recommend(
        [list(query.history) for query in queries], top=5, beams=20, exclude_history=True
    )
    assert found.ids is not None
    for query, answer, ids in zip(queries, answers, found.ids, strict=True):
        assert answer.items == ids[: query.limit] and len(answer.scores) == len(answer.titles) == query.limit
        assert not {*answer.items} & {*query.history} and answer.strategy == "mixture"


def test_the_memory_knows_the_whole_data_and_forgets_a_user(engine: Engine) -> None:
    data = engine.recommender.artifacts.load_data()
    counts = engine.recommender.memory.counts.copy()
    every = np.bincount(np.concatenate(data.sequences), minlength=data.num_items)
    assert counts.tolist() == every.tolist()
    user = data.user_ids[0]
    assert engine.interactions(user) == len(data.sequences[0])
    for _ in range(2):
        engine.forget(user)
        assert not engine.knows(user) and engine.interactions(user) == 0 and engine.history(user) == []
    left = np.bincount(np.concatenate(data.sequences[1:]), minlength=data.num_items)
    assert engine.recommender.memory.counts.tolist() == left.tolist()


def test_an_event_is_in_the_history_and_a_late_one_in_its_place(engine: Engine) -> None:
    items = [str(item) for item in engine.recommender.catalog.item_ids]
    assert engine.learn("new", items[3], 30.0) and engine.learn("new", items[1], 10.0)
    assert engine.learn("new", items[2], 20.0) and engine.learn("new", items[4], 30.0)
    assert engine.history("new") == [items[1], items[2], items[3], items[4]]
    assert not engine.learn("new", "no such item", 40.0) and len(engine.history("new")) == 4
    answer = engine.recommend([Query(tuple(engine.history("new")), limit=5, beams=20)])[0]
    assert len(answer.items) == 5 and not {*answer.items} & {*items[1:5]}
    user = engine.users("user", "", 1)[0]  # one of the data: its interactions come before any event
    engine.learn(user, items[0], -5.0)
    assert engine.history(user)[-1] == items[0]


def test_unknown_items_are_skipped_and_a_user_without_history_gets_what_is_popular(engine: Engine) -> None:
    (answer,) = engine.recommend([Query(("nothing", "like this"), limit=4, beams=20)])
    assert answer.skipped == ["nothing", "like this"] and answer.strategy == "popularity"
    counts = engine.recommender.memory.counts
    rows = [engine.recommender.catalog.item_ids.index(item) for item in answer.items]
    assert counts[rows].tolist() == sorted(counts, reverse=True)[:4]


def test_a_removal_holds_from_the_next_search_and_can_be_undone(engine: Engine) -> None:
    history = engine.history("u1") or engine.history(engine.users("user", "", 1)[0])
    first = ask(engine, history, limit=3)
    engine.remove([first[0]], 5)
    second = ask(engine, history, limit=3)
    assert first[0] not in second and engine.version == 5 and engine.removed == {first[0]}
    engine.restore([first[0]], 6)
    assert ask(engine, history, limit=3) == first and engine.removed == set()


def test_an_added_item_is_searched_and_others_keep_their_ids(engine: Engine, tmp_path: Path) -> None:
    before = engine.recommender.catalog
    texts = ["sturdy rudder for the garden", "plain music telescope"]
    codes = engine.encode(texts, [None] * len(texts)).tolist()
    extended = engine.extended({"n1": codes[0], "n2": codes[1]})
    assert len(engine.recommender.catalog) == len(before)  # nothing changes before it is added
    engine.add(extended, texts, 9)
    after = engine.recommender.catalog
    assert after.item_ids == [*before.item_ids, "n1", "n2"] and engine.version == 9
    assert (after.codes[: len(before)] == before.codes).all() and after.codes[-2:].tolist() == codes
    every = ask(engine, engine.history("u1"), limit=20, exact=True)
    assert engine.has("n1") and len(every) == 20
    assert engine.learn("u1", "n1", 1.0) and engine.history("u1")[-1] == "n1"
    assert len(ask(engine, engine.history("u1"), limit=5)) == 5
    with pytest.raises(UserError, match="n1 is already in the catalog"):
        engine.extended({"n1": codes[0]})


def test_live_additions_equal_those_of_the_command(
    tiny_run: Path, tmp_path: Path, engine: Engine, command
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "new.csv").write_text("item,text\nn1,sturdy rudder for the garden\n")
    words = ["add", "--run", tmp_path / "run", "--items", tmp_path / "new.csv"]
    assert command(catalog_command.app, *words) == 0
    stored = Engine(Recommender.from_run(tmp_path / "run"))
    texts = ["sturdy rudder for the garden."]  # composed as by the readers
    engine.add(engine.extended({"n1": engine.encode(texts, [None] * len(texts)).tolist()[0]}), texts, 1)
    assert (stored.recommender.catalog.codes == engine.recommender.catalog.codes).all()
    history = engine.history(engine.users("user", "", 1)[0])
    queries = [Query(tuple(history), limit=10, beams=20), Query((*history, "n1"), limit=10, beams=20)]
    for one, other in zip(stored.recommend(queries), engine.recommend(queries), strict=True):
        assert one.items == other.items
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)
