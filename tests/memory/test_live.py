"""Events and items that are added to a memory give what building it with them gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cemg.errors import DamagedError, UserError
from cemg.memory import TEXTS_FILE, Constants, Memory, MemoryConfig, similarity, transitions
from cemg.memory.build import build_memory
from cemg.memory.similarity import TextIndex
from cemg.storage import files

ITEMS = 12
TEXTS: list[str | None] = [f"word{i % 5} word{i % 7} kind{i}" for i in range(ITEMS)]
CONFIG = MemoryConfig(window=3, transition_items=4, similar_items=3)  # rows are cut, so their order counts
CONSTANTS = Constants(exponent=0.3, text_weight=0.5, repeat_weight=0.3, scale=0.7)
added_texts = st.sampled_from([*TEXTS, "word1 word2", "word2 word6 kind3", "unknown", None])
sequences = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=9), min_size=1, max_size=6)


def built(users: Sequence[Sequence[int]], texts: Sequence[str | None] = TEXTS, **others: object) -> Memory:
    train = [np.array(user, dtype=np.int32) for user in users]
    return build_memory(train, texts, config=CONFIG, constants=CONSTANTS, **others)  # type: ignore[arg-type]


def assert_equal(live: Memory, rebuilt: Memory) -> None:
    """The same items and scores for the history of each single item, and of all together."""
    assert live.counts.tolist() == rebuilt.counts.tolist()
    everything = range(live.num_items)
    for history in (*([item] for item in everything), list(everything)):
        (items, scores), (expected_items, expected) = live.scores(history), rebuilt.scores(history)
        assert items.tolist() == expected_items.tolist()
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(sequences, st.lists(st.tuples(st.integers(0, 5), st.integers(0, ITEMS - 1)), max_size=15))
def test_observed_events_equal_a_rebuild(users: list[list[int]], events: list[tuple[int, int]]) -> None:
    live = built(users)
    histories = [list(user) for user in users]
    for user, item in events:
        history = histories[user % len(histories)]
        live.observe(history, item)  # a repeated item among them
        history.append(item)
        live.scores(history)  # rows that a query has cached follow later events
    assert_equal(live, built(histories))


@settings(deadline=None, max_examples=50)
@given(sequences, st.data())
def test_events_of_many_users_at_once_equal_a_rebuild(users: list[list[int]], data: st.DataObject) -> None:
    """Also after and before single events, and a second time."""
    histories = [[0, 1], *(list(user) for user in users)]
    live = built(histories)
    for _ in range(data.draw(st.integers(1, 3))):
        known = [*map(len, histories)]
        for history in histories:
            history.extend(data.draw(st.lists(st.integers(0, ITEMS - 1), max_size=3)))
        live.observe_many([np.array(history, np.int32) for history in histories], known)
        live.scores(histories[0])
        if data.draw(st.booleans()):
            live.observe(histories[0], 3)
            histories[0].append(3)
        elif data.draw(st.booleans()):
            live.forget(histories[-1])
            histories[-1] = []
    assert_equal(live, built(histories))


def test_events_of_many_users_are_added_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "EVENTS", 2)
    live = built([[0, 1], [4]])
    live.observe_many([np.array([0, 1, 2, 0, 1]), np.array([4, 4, 5])], [2, 1])
    assert_equal(live, built([[0, 1, 2, 0, 1], [4, 4, 5]]))


def test_events_of_many_users_survive_a_file(tmp_path: Path) -> None:
    live = built([[0, 1], [4]])
    live.observe_many([np.array([0, 1, 2]), np.array([4, 4, 5])], [2, 1])
    live.save(tmp_path)
    assert_equal(Memory.load(tmp_path), built([[0, 1, 2], [4, 4, 5]]))


@pytest.mark.parametrize(
    ("histories", "known", "message"),
    [
        ([[0, 99]], [1], "the memory has no item 99"),
        ([[0, 1]], [3], "known must be a number per history, from 0 to its length"),
        ([[0, 1]], [1, 1], "known must be a number per history"),
        ([[0, 1]], [0.5], "known must have integers"),
        ([[0, 2**32 + 1]], [1], "sequence 0 has item row 4294967297"),
        ([0, 1], [1, 1], "is not a list of histories"),
    ],
)
def test_events_of_many_users_are_checked(histories: list[list[int]], known: list[int], message: str) -> None:
    live = built([[0, 1]])
    with pytest.raises(UserError, match=message):
        live.observe_many(histories, known)  # type: ignore[arg-type]
    assert_equal(live, built([[0, 1]]))


@settings(deadline=None, max_examples=25)
@given(sequences, st.data())
def test_a_late_event_equals_a_rebuild_with_it_in_its_place(
    users: list[list[int]], data: st.DataObject
) -> None:
    live = built(users)
    histories = [list(user) for user in users]
    for _ in range(3):
        history = histories[data.draw(st.integers(0, len(histories) - 1))]
        position = data.draw(st.integers(0, len(history)))
        item = data.draw(st.integers(0, ITEMS - 1))
        live.observe(history, item, position=position)
        history.insert(position, item)
    assert_equal(live, built(histories))


@settings(deadline=None, max_examples=25)
@given(sequences, sequences)
def test_a_deleted_user_leaves_nothing_behind(users: list[list[int]], others: list[list[int]]) -> None:
    live = built([*users, *others])
    for user in others:
        live.forget(user)
    assert_equal(live, built(users))


def test_the_order_of_a_cut_row_follows_the_counts_of_other_users() -> None:
    users = [[0, item] for item in (1, 1, 2, 2, 3, 3, 4, 4, 5)]  # row 0 has five items, and is cut to four
    live = built(users)
    assert 5 not in live.scores([0])[0]
    for _ in range(200):
        live.observe([], 4)  # so common now that its transition from item 0 is worth less than that of item 5
    assert_equal(live, built([*users, *[[4]] * 200]))
    assert 5 in live.scores([0])[0] and 4 not in live.transitions.row(0, 4)[0]


@settings(deadline=None, max_examples=15)
@given(sequences, st.lists(st.sampled_from([*TEXTS, "word1 word2", "unknown", None]), min_size=1, max_size=5))
def test_new_items_equal_a_rebuild_with_the_same_words(
    users: list[list[int]], texts: list[str | None]
) -> None:
    live = built(users)
    first = TextIndex.fit(TEXTS)
    assert first is not None
    assert live.add_items(texts) == range(ITEMS, ITEMS + len(texts))
    new = ITEMS + len(texts) - 1
    live.observe(users[0], new)
    everything = [*TEXTS, *texts]
    index = TextIndex(first.words, first.weights, first.vectors_of(everything))
    rebuilt = built([[*users[0], new], *users[1:]], everything, index=index)
    assert_equal(live, rebuilt)


@settings(deadline=None, max_examples=40)
@given(st.lists(added_texts, min_size=1, max_size=8), st.data())
def test_a_changed_text_equals_an_item_that_was_added_with_it(
    texts: list[str | None], data: st.DataObject
) -> None:
    live, final = built([[0, 1], [1, 2]]), list[str | None]()
    for text in texts:
        live.add_items([text])
        final.append(text)
        if data.draw(st.booleans()):
            place, other = data.draw(st.integers(0, len(final) - 1)), data.draw(added_texts)
            live.change_text(ITEMS + place, other)
            final[place] = other
    rebuilt = built([[0, 1], [1, 2]])
    rebuilt.add_items(final)
    assert_equal(live, rebuilt)
    count = ITEMS + data.draw(st.integers(0, len(final)))
    assert_equal(live.first(count), rebuilt.first(count))
    for memory in (live, rebuilt):
        memory.add_items(["word1 kind3"])
    assert_equal(live, rebuilt)


def test_the_text_of_an_item_that_was_not_added_is_not_changed() -> None:
    live = built([[0, 1], [1, 2]])
    live.add_items(["word1"])
    for item in (0, ITEMS + 1, -1):
        with pytest.raises(UserError, match=f"the text of item {item} cannot be changed"):
            live.change_text(item, "word2")


@settings(deadline=None, max_examples=20)
@given(st.lists(added_texts, min_size=1, max_size=8), st.data())
def test_restored_rows_equal_those_that_were_computed(texts: list[str | None], data: st.DataObject) -> None:
    """Also where items are added, and texts are changed, before and after rows move into arrays."""
    live, count = built([[0, 1]]), data.draw(st.integers(1, len(texts)))
    live.add_items(texts[:count])
    assert live.similar is not None
    frozen = live.similar.frozen()
    live.add_items(texts[count:])  # while the arrays are made
    rows = frozen.added_rows()
    assert rows is not None
    restored = built([[0, 1]])
    restored.restore_items(rows)
    live.similar.replace_rows(rows, frozen)
    restored.add_items(texts[count:])
    assert_equal(restored, live)
    for memory in (live, restored):
        memory.change_text(ITEMS, "word2 word6")
    assert_equal(restored, live)
    rebuilt = built([[0, 1]])
    rebuilt.add_items(["word2 word6", *texts[1:]])
    assert_equal(live, rebuilt)


@settings(deadline=None, max_examples=15)
@given(sequences, st.lists(st.sampled_from([*TEXTS, "word1 word2", None]), min_size=1, max_size=6), st.data())
def test_the_first_items_of_an_extended_memory_are_the_memory_before(
    users: list[list[int]], texts: list[str | None], data: st.DataObject
) -> None:
    """Rows are cut to three items, so new items displace others."""
    count = data.draw(st.integers(0, len(texts)))
    before, live = built(users), built(users)
    before.add_items(texts[:count])
    live.add_items(texts)
    first = live.first(ITEMS + count)
    assert_equal(first, before)
    first.add_items(texts[count:])
    assert_equal(first, live)


def test_items_that_are_added_in_blocks_equal_items_that_are_added_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"word{i % 5} kind{i % 12}" for i in range(40)]
    together, blocks, alone = (built([[0, 1], [1, 2]]) for _ in range(3))
    together.add_items(texts)
    monkeypatch.setattr(similarity, "COMPARED", 7)
    blocks.add_items(texts)
    for text in texts:
        alone.add_items([text])
    assert_equal(blocks, alone)
    assert_equal(together, alone)


def test_the_ids_of_added_items_are_compared_with_those_of_a_catalog(tmp_path: Path) -> None:
    live = built([[0, 1]], item_ids=range(ITEMS))
    live.add_items(["word1", "word2"])
    with pytest.raises(UserError, match="there are 13 item ids, but the memory has 14 items"):
        live.record_ids(range(ITEMS + 1))
    live.check_catalog([*range(ITEMS), "a", "b"])  # not known yet
    live.record_ids([*range(ITEMS), "a", "b"])
    live.save(tmp_path)
    loaded = Memory.load(tmp_path)
    loaded.check_catalog([*range(ITEMS), "a", "b", "later"])
    loaded.check_catalog([*range(ITEMS), "other"])  # a catalog from before
    with pytest.raises(UserError, match="does not belong to the catalog"):
        loaded.check_catalog([*range(ITEMS), "b", "a"])
    loaded.add_items(["word3"])
    loaded.check_catalog([*range(ITEMS), "b", "a", "c"])  # not known again


@pytest.mark.parametrize("killed", ["before the memory", "after the memory"])
def test_a_process_that_is_killed_while_it_saves_leaves_one_whole_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    before, after = built([[0, 1, 2]]), built([[0, 1, 2]])
    before.save(tmp_path)
    after.add_items(["word1 kind3", "word2"])
    if killed == "before the memory":
        monkeypatch.setattr(files, "save_tensors", keep_first(files.save_tensors))
    after.save(tmp_path)
    monkeypatch.undo()
    loaded, expected = Memory.load(tmp_path), before if killed == "before the memory" else after
    assert_equal(loaded, expected)
    for memory in (loaded, expected):
        memory.add_items(["word3 kind3"])
    assert_equal(loaded, expected)


def keep_first(save: Callable[..., None]) -> Callable[..., None]:
    """The first call saves, later ones are lost with the process."""
    calls = iter([save])
    return lambda *arguments, **options: next(calls, lambda *_, **__: None)(*arguments, **options)


def test_texts_of_too_few_items_are_refused_by_name(tmp_path: Path) -> None:
    built([[0, 1]]).save(tmp_path)
    texts = (tmp_path / TEXTS_FILE).read_bytes()
    more = built([[0, 1]])
    more.add_items(["word1"])
    more.save(tmp_path)
    (tmp_path / TEXTS_FILE).write_bytes(texts)
    with pytest.raises(DamagedError, match=TEXTS_FILE) as caught:
        Memory.load(tmp_path).add_items(["word2"])
    assert caught.value.cause == "it has the texts of 12 items; the memory has 13"


def test_a_new_item_is_reached_from_its_neighbors_without_any_event() -> None:
    live = built([[0, 1], [1, 2]])
    (row,) = live.add_items([TEXTS[9]])
    assert row in live.scores([9])[0] and 9 in live.scores([row])[0]
    assert row not in live.scores([10])[0] or TEXTS[10] == TEXTS[9]


def test_a_changed_memory_can_be_saved_and_continues(tmp_path: Path) -> None:
    users = [[0, 1, 2], [2, 3, 4, 5]]
    built(users, item_ids=range(ITEMS)).save(tmp_path)
    live = Memory.load(tmp_path)
    live.observe(users[0], 7)
    live.add_items(["word1 kind3"])
    live.observe([*users[0], 7], ITEMS)
    live.save(tmp_path / "again")
    loaded = Memory.load(tmp_path / "again")
    assert_equal(loaded, live)
    loaded.check_catalog(range(ITEMS + 1))
    for memory in (live, loaded):
        memory.observe(users[1], 7)
        memory.add_items(["word2"])
    assert_equal(loaded, live)
    assert Memory.load(tmp_path).num_items == ITEMS  # the file that was loaded is unchanged
    assert_equal(Memory.load(tmp_path), built(users))


def test_a_memory_without_texts_takes_new_items() -> None:
    live = built([[0, 1]], [None] * 3)
    (row,) = live.add_items(["a text"])
    assert live.scores([row])[0].tolist() == [row]  # by the repeat term
    live.observe([0, 1], row)
    assert row in live.scores([1])[0] and 1 in live.scores([row])[0]


def test_unknown_items_and_positions_are_refused() -> None:
    live = built([[0, 1, 2]])
    with pytest.raises(UserError, match=f"the memory has no item {ITEMS}"):
        live.observe([0], ITEMS)
    with pytest.raises(UserError, match="the memory has no item -1"):
        live.forget([0, -1])
    with pytest.raises(UserError, match=r"position must be within 0 … 2, got 3"):
        live.observe([0, 1], 2, position=3)
    assert_equal(live, built([[0, 1, 2]]))


def test_scores_do_not_depend_on_when_a_memory_was_built() -> None:
    """Sums of weights are exact, so 3,000 events in any order give the same transitions."""
    rng = np.random.default_rng(0)
    users = [rng.integers(0, 4, 30).tolist() for _ in range(100)]
    live = built([users[0][:1]])
    live.forget(users[0][:1])
    for user in users[::-1]:
        for at, item in enumerate(user):
            live.observe(user[:at], item)
    rebuilt = built(users)
    merged, base = live.transitions.merged(), rebuilt.transitions.base
    assert merged.items.tolist() == base.items.tolist() and merged.values.tolist() == base.values.tolist()
    assert dataclasses.asdict(live.constants) == dataclasses.asdict(rebuilt.constants)


def test_events_that_were_not_learned_cannot_be_forgotten():
    memory = built([[0, 1, 2], [0, 4]])
    memory.forget([0, 1, 2])
    for never in ([0, 1, 2], [0, 0], [7]):
        with pytest.raises(UserError, match="cannot be forgotten"):
            memory.forget(never)
    assert_equal(memory, built([[0, 4]]))


@settings(deadline=None, max_examples=25)
@given(sequences, st.lists(st.integers(-1, ITEMS + 1), max_size=8), st.booleans())
def test_the_shares_of_events_are_their_addends_of_the_score(
    users: list[list[int]], history: list[int], live: bool
) -> None:
    memory = built(users)
    if live:
        memory.observe(users[0], 3)
    items, scores = memory.scores(history)
    shares = memory.event_shares(history, np.arange(ITEMS))
    assert shares.shape == (ITEMS, len(history)) and (shares >= 0).all()
    known = np.isin(np.arange(ITEMS), items)
    np.testing.assert_allclose(shares.sum(1), known.astype(float), atol=1e-9)
    if not history:
        return
    newest = memory.scores([history[-1]])  # alone, the newest event adds what it adds to all
    own = np.zeros(ITEMS)
    own[newest[0]] = newest[1]
    np.testing.assert_allclose(shares[items, -1] * scores, own[items], rtol=1e-6, atol=1e-12)
