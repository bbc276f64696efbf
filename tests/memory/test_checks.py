"""Wrong histories, texts, constants and settings are refused with a message that names the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cemg.errors import UserError
from cemg.memory import Constants, Memory, MemoryConfig
from cemg.memory.build import build_memory
from cemg.memory.config import POSITIVE, RANGES

TRAIN = [np.array([0, 1, 2]), np.array([1, 2, 3]), np.array([0, 1, 3])]
TEXTS = ["red lipstick", "red nail polish", "nail file", "lipstick brush", "clear nail polish"]
NAN = math.nan


@pytest.fixture
def memory() -> Memory:
    return build_memory(TRAIN, TEXTS)


@pytest.mark.parametrize("history", [3, None, "01", [[0, 1]], ["a"], [0.5], [0, [1]], np.int64(3)])
@pytest.mark.parametrize(
    "call",
    [
        lambda memory, history: memory.scores(history),
        lambda memory, history: memory.knows(history),
        lambda memory, history: memory.observe(history, 2),
        lambda memory, history: memory.forget(history),
    ],
)
def test_what_is_no_history_is_refused(
    memory: Memory, call: Callable[[Memory, Any], object], history: object
) -> None:
    before = memory.counts.tolist()
    with pytest.raises(UserError, match="is not a history"):
        call(memory, history)
    assert memory.counts.tolist() == before


@pytest.mark.parametrize("histories", [[0, 1], np.array([0, 1]), 7, None])
def test_one_history_in_place_of_a_list_of_them_is_refused(memory: Memory, histories: Any) -> None:
    for call in (lambda: memory.prior(histories), lambda: memory.ranker()(histories, 3)):
        with pytest.raises(UserError, match="is not a list of histories") as caught:
            call()
        assert caught.value.fix == "pass a list of histories, for one user [[3, 1, 4]]"


def test_histories_may_be_of_any_kind_of_integers(memory: Memory) -> None:
    expected = memory.scores([0, 1])[0].tolist()
    for history in ((0, 1), range(2), np.array([0, 1], np.int32), np.array([0, 1], np.uint8)):
        assert memory.scores(history)[0].tolist() == expected  # type: ignore[arg-type]
    assert memory.prior([]) == ([], []) and memory.scores([])[0].tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"top": -3}, "top must be at least 1, got -3"),
        ({"top": 1.5}, "top must be an integer, got 1.5"),
        ({"top": None}, "top must be an integer, got None"),
        ({"power": NAN}, "power must be a number from 0 to 100, got nan"),
        ({"power": -1}, "power must be a number from 0 to 100, got -1"),
        ({"power": "2"}, "power must be a number from 0 to 100, got '2'"),
    ],
)
def test_arguments_of_a_prior_are_checked(memory: Memory, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        memory.prior([[0, 1]], **arguments)


def test_events_and_texts_are_checked(memory: Memory) -> None:
    with pytest.raises(UserError, match=r"the item of an event must be an integer, got 2\.5"):
        memory.observe([0], 2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"position must be an integer, got 0\.5"):
        memory.observe([0, 1], 2, position=0.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="top must be at least 1, got 0"):
        memory.ranker()([np.array([0])], 0)
    for texts, message in (
        ("nail brush", "'nail brush' is not a list of texts"),
        (None, "None is not a list of texts"),
        (["a", 3], "3 is not a text"),
        ([NAN], "nan is not a text"),
    ):
        with pytest.raises(UserError, match=message):
            memory.add_items(texts)  # type: ignore[arg-type]
    assert memory.num_items == 5


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, -1.0, 1e9, "x", None, True])
def test_constants_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"the constant {name} must be a number .*, got {value!r}"):
        Constants(**{name: value})
    low, high = RANGES[name]
    Constants(**{name: high})
    if name in POSITIVE:
        with pytest.raises(UserError, match=f"the constant {name} must be a number above 0"):
            Constants(**{name: low})
    else:
        Constants(**{name: low})


@pytest.mark.parametrize("name", ["window", "history_items", "transition_items", "similar_items"])
@pytest.mark.parametrize("value", [0, -1, 1.5, NAN, "x", None, True, 10**30])
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"memory\.{name} must be "):
        MemoryConfig(**{name: value})


def test_the_window_has_a_limit_and_the_number_of_items_of_a_prior_may_exceed_the_catalog(
    memory: Memory,
) -> None:
    with pytest.raises(UserError, match=r"memory\.window must be at most 10,000, got 10001"):
        MemoryConfig(window=10_001)
    assert build_memory(TRAIN, TEXTS, config=MemoryConfig(window=10_000)).scores([0, 1])[1].tolist() == (
        memory.scores([0, 1])[1].tolist()
    )
    assert memory.prior([[0, 1]], top=10**7)[0][0].tolist() == memory.scores([0, 1])[0].tolist()


def test_another_kind_of_text_similarity_is_refused() -> None:
    with pytest.raises(UserError, match=r"memory\.text must be tfidf or none, got 'bert'"):
        MemoryConfig(text="bert")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "texts", "message"),
    [
        ([np.array([0, 9])], TEXTS, "sequence 0 of the training has item 9, but 5 items have texts"),
        ([np.array([0]), np.array([-1])], TEXTS, "sequence 1 of the training has item -1"),
        ([[0, 1], [0.5]], TEXTS, r"sequence 1 of the training is not a sequence of item rows: \[0.5\]"),
        ([[0, 1], [[1]]], TEXTS, r"sequence 1 of the training is not a sequence of item rows: \[\[1\]\]"),
        ([0, 1], TEXTS, "is not a list of histories"),
        ([np.array([0, 1])], [], "sequence 0 of the training has item 0, but 0 items have texts"),
        ([np.array([0, 1])], "abc", "'abc' is not a list of texts"),
        ([np.array([0, 1])], [1, 2], "1 is not a text"),
    ],
)
def test_training_sequences_and_texts_are_checked(train: Any, texts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_memory(train, texts)


def test_as_many_ids_as_texts_are_needed() -> None:
    with pytest.raises(UserError, match="there are 1 item ids but texts of 5 items"):
        build_memory(TRAIN, TEXTS, item_ids=["a"])


def test_a_memory_is_saved_and_loaded_at_the_path_of_a_string(memory: Memory, tmp_path: Path) -> None:
    memory.save(str(tmp_path / "new"))
    loaded = Memory.load(str(tmp_path / "new"))
    assert loaded.scores([0, 1])[1].tolist() == memory.scores([0, 1])[1].tolist()
    assert loaded.add_items(["nail brush"]) == range(5, 6)  # reads the other file of the folder


def test_scores_that_round_to_zero_are_not_listed() -> None:
    memory = build_memory(TRAIN, TEXTS, constants=Constants(decay=1e-200, text_weight=0.0))
    for history in ([0, 1, 3, 1], [2, 0, 1]):
        assert (memory.scores(history)[1] > 0).all() and len(memory.scores(history)[0])
