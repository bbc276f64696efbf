"""The constants of a memory are chosen on validation users, and follow the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from cemg.data import Dataset
from cemg.evaluation import evaluate
from cemg.memory import Constants, MemoryConfig
from cemg.memory.build import build_memory, fit_memory
from cemg.memory.counting import count_transitions
from cemg.memory.fit import Validation, repeat_share
from cemg.memory.similarity import TextIndex

ITEMS = 40


def data_of(sequences: Sequence[Sequence[int]], texts: Sequence[str | None] | None = None) -> Dataset:
    return Dataset(
        name="drawn", user_ids=[f"u{u}" for u in range(len(sequences))],
        item_ids=[f"i{i}" for i in range(ITEMS)], sequences=[np.array(s, np.int32) for s in sequences],
        titles=[""] * ITEMS, texts=list(texts) if texts is not None else [None] * ITEMS,
        images=[None] * ITEMS, tie_rule="as written",
    )  # fmt: skip


def draw(seed: int = 0, users: int = 60) -> Dataset:
    """Users who walk around a circle of items, with texts that repeat every ten items."""
    rng = np.random.default_rng(seed)
    walks = [
        (rng.integers(ITEMS) + np.cumsum(rng.integers(1, 4, rng.integers(3, 12)))) % ITEMS
        for _ in range(users)
    ]
    return data_of([walk.tolist() for walk in walks], [f"kind{i % 10} colour{i % 4}" for i in range(ITEMS)])


@pytest.mark.parametrize("keeps", [True, False])
def test_the_ndcg_of_the_search_is_that_of_the_evaluation(keeps: bool) -> None:
    data, config = draw(), MemoryConfig(history_items=4)  # histories are longer
    split = data.split()
    constants = Constants(decay=0.7, exponent=0.2, text_weight=0.5, text_decay=0.65, repeat_weight=0.1)
    memory = build_memory(split.train, data.texts, config=config, constants=constants)
    index = TextIndex.fit(data.texts)
    assert index is not None
    transitions = count_transitions(split.train, ITEMS, window=config.window, constants=constants)
    validation = Validation(
        split, transitions, index.most_similar(config.similar_items), config=config, keeps_history=keeps
    )
    done = evaluate(memory.ranker(), split, part="valid", progress=False)
    expected = done.metrics if keeps else done.metrics_history_removed
    # the evaluation breaks ties by item, the search counts them as half a rank
    assert validation.ndcg(constants) == pytest.approx(expected["NDCG@10"], abs=0.02)
    assert validation.scaled(constants).scale == memory.constants.scale


def test_the_search_scores_histories_of_more_than_128_items_as_the_memory_does() -> None:
    rng = np.random.default_rng(0)
    data = data_of([rng.integers(ITEMS, size=200).tolist() for _ in range(4)])
    split, config = data.split(), MemoryConfig(history_items=180)
    constants = Constants(decay=0.99, text_weight=0.0)
    memory = build_memory(split.train, data.texts, config=config, constants=constants)
    validation = Validation(split, memory.transitions.base, None, config=config, keeps_history=True)
    scores = validation.scores(validation.scaled(constants))
    for user, history in enumerate(split.histories("valid")):
        items, expected = memory.scores(history)
        cells = validation.users == user
        assert validation.items[cells].tolist() == items.tolist()
        np.testing.assert_allclose(scores[cells], expected, rtol=1e-6)


def test_fitted_constants_are_at_least_as_good_as_the_default_ones() -> None:
    data = draw()
    split = data.split()
    fitted = fit_memory(data, split, config=MemoryConfig())
    default = build_memory(split.train, data.texts)
    scores = [
        evaluate(memory.ranker(), split, part="valid", progress=False).metrics_history_removed["NDCG@10"]
        for memory in (fitted, default)
    ]
    assert scores[0] > scores[1]


def test_the_search_does_not_depend_on_the_test_items_and_repeats_exactly() -> None:
    data = draw()
    rng = np.random.default_rng(1)
    changed = dataclasses.replace(
        data, sequences=[np.append(s[:-1], rng.integers(ITEMS)).astype(np.int32) for s in data.sequences]
    )
    found = [fit_memory(d, d.split(), config=MemoryConfig()).constants for d in (data, changed, data)]
    assert found[0] == found[1] == found[2]


def test_the_repeat_term_is_fitted_only_where_people_come_back() -> None:
    rng = np.random.default_rng(0)
    returning = data_of([[int(i) for i in rng.choice(rng.integers(0, ITEMS, 3), 8)] for _ in range(50)])
    assert repeat_share(returning.split().train) > 0.3
    constants = fit_memory(returning, returning.split(), config=MemoryConfig()).constants
    assert constants.repeat_weight > 0 and constants.text_weight == 0
    assert repeat_share(draw().split().train) == 0
    assert fit_memory(draw(), draw().split(), config=MemoryConfig()).constants.repeat_weight == 0


def test_texts_that_say_nothing_about_the_next_item_get_no_weight() -> None:
    rng = np.random.default_rng(0)
    data = draw(users=200)
    noise = dataclasses.replace(data, texts=[f"kind{rng.integers(10)}" for _ in range(ITEMS)])
    weights = [fit_memory(d, d.split(), config=MemoryConfig()).constants.text_weight for d in (data, noise)]
    assert weights[1] < weights[0] or weights[1] == 0


def test_every_choice_is_logged() -> None:
    lines: list[dict[str, float]] = []
    fit_memory(draw(), draw().split(), config=MemoryConfig(), log=lambda step, values: lines.append(values))
    scores = [line["memory/ndcg@10"] for line in lines]
    assert len(scores) == 8 and scores == sorted(scores)
    assert {name for line in lines for name in line} == {
        "memory/ndcg@10", "memory/decay", "memory/text_weight", "memory/exponent", "memory/text_decay",
    }  # fmt: skip
