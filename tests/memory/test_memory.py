"""The item memory equals its formulas, computed by loops, and its files are checked."""

from __future__ import annotations

import copy
import dataclasses
import errno
import math
import pickle
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cemg.data import Dataset, synthetic_dataset
from cemg.errors import DamagedError, UserError
from cemg.evaluation import evaluate
from cemg.memory import MEMORY_FILE, TEXTS_FILE, Constants, Memory, MemoryConfig, counting, similarity
from cemg.memory.build import build_memory, fit_memory
from cemg.memory.memory import ids_digest
from cemg.memory.rows import Rows, RowsWriter, best_positions, largest, sum_by_key
from cemg.memory.similarity import TextIndex
from cemg.storage.files import StorageError
from cemg_kernels import use_fast_kernels

WORDS = ["red", "lip", "nail", "cream", "soap", "brush", "mint", "oil", "a", "5"]
ALL = MemoryConfig(transition_items=10_000, similar_items=10_000)  # no row is cut
USE = Constants(decay=0.6, text_weight=0.7, repeat_weight=0.4)


def draw(users: int = 40, items: int = 30, seed: int = 0) -> tuple[list[np.ndarray], list[str | None]]:
    """Sequences of 0 to 14 items, some repeated, and texts, some missing."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, items - 1)  # the last two items are never bought
    train = [
        rng.choice(items - 2, size=rng.integers(0, 15), p=popularity / popularity.sum()).astype(np.int32)
        for _ in range(users)
    ]
    texts: list[str | None] = [" ".join(rng.choice(WORDS, 2, replace=False)) for _ in range(items)]
    texts[3] = None
    return train, texts


def rounded(weight: float) -> float:
    return round(weight * 4096) / 4096


def transitions_by_loops(train: list[np.ndarray], num_items: int, use: Constants, window: int) -> np.ndarray:
    total = np.zeros((num_items, num_items))
    for sequence in train:
        for at, later in enumerate(sequence):
            for distance in range(1, min(window, at) + 1):
                weight, earlier = rounded(use.step_decay ** (distance - 1)), sequence[at - distance]
                total[earlier, later] += weight
                total[later, earlier] += rounded(use.backward * weight)
    np.fill_diagonal(total, 0)
    return total


def similarity_by_loops(texts: list[str | None]) -> np.ndarray:
    words = [set(re.findall(r"\w+", (text or "").lower())) for text in texts]
    df = {word: sum(word in each for each in words) for each in words for word in each}
    weight = {word: math.log(len(texts) / n) if n <= 0.2 * len(texts) else 0.0 for word, n in df.items()}
    norm = [math.sqrt(sum(weight[word] ** 2 for word in each)) or 1.0 for each in words]
    cosine = np.array(
        [
            [sum(weight[w] ** 2 for w in a & b) / (norm[i] * norm[j]) for j, b in enumerate(words)]
            for i, a in enumerate(words)
        ]
    )
    np.fill_diagonal(cosine, 0)
    return cosine


def scores_by_loops(
    history: np.ndarray, train: list[np.ndarray], texts: list[str | None], use: Constants
) -> np.ndarray:
    num_items = len(texts)
    counts = np.bincount(np.concatenate(train), minlength=num_items)
    factor = np.maximum(counts, 1.0) ** -use.exponent
    chain = factor[:, None] * transitions_by_loops(train, num_items, use, ALL.window) * factor
    cosine = similarity_by_loops(texts)
    scale = float(np.median(chain.max(1)))
    total = np.zeros(num_items)
    for recency, item in enumerate(history[::-1][: ALL.history_items]):
        total += use.decay**recency * chain[item]
        total += scale * use.text_decay**recency * use.text_weight * cosine[item]
        total[item] += scale * use.text_decay**recency * use.repeat_weight
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [0, 1, 7, 33])
def test_the_scores_equal_the_formula(seed: int, length: int) -> None:
    train, texts = draw(seed=seed)
    memory = build_memory(train, texts, config=ALL, constants=USE)
    history = np.random.default_rng(seed).integers(0, len(texts), length)
    items, scores = memory.scores(history)
    expected = scores_by_loops(history, train, texts, USE)
    assert scores.dtype == np.float64 and (np.diff(items) > 0).all()
    assert set(items[scores > 0]) == set(np.flatnonzero(expected > 1e-12))
    np.testing.assert_allclose(scores, expected[items], rtol=1e-6, atol=1e-9)  # T and C are float32


@given(seed=st.integers(0, 99), cut=st.integers(1, 40), texts=st.booleans(), repeats=st.booleans())
@settings(max_examples=50, deadline=None)
def test_scores_in_cpp_equal_those_in_numpy(seed: int, cut: int, texts: bool, repeats: bool) -> None:
    train, words = draw(seed=seed)
    use = dataclasses.replace(USE, repeat_weight=0.4 if repeats else 0.0, text_weight=0.7 if texts else 0.0)
    config = MemoryConfig(transition_items=cut, similar_items=cut)
    memory = build_memory(train, words, config=config, constants=use)
    history = np.random.default_rng(seed).integers(0, 32, seed % 25)  # some of no item
    fast = memory.scores(history)
    use_fast_kernels(False)
    try:
        items, scores = memory.scores(history)
    finally:
        use_fast_kernels(None)
    assert fast[0].tolist() == items.tolist() and fast[1].tolist() == scores.tolist()  # bit for bit
    assert [part.dtype for part in fast] == [items.dtype, scores.dtype]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(memory))).scores(history)  # after a query
    assert copied[0].tolist() == items.tolist() and copied[1].tolist() == scores.tolist()


def test_histories_of_a_batch_get_the_scores_that_each_gets_alone() -> None:
    train, texts = draw()
    memory = build_memory(train, texts, constants=USE)
    histories = [*train, np.zeros(0, np.int32), np.array([2])] * 4  # more than one pass
    for (items, masses), history in zip(zip(*memory.prior(histories), strict=True), histories, strict=True):
        (alone,), (mass,) = memory.prior([history])
        assert items.tolist() == alone.tolist() and masses.tolist() == mass.tolist()


def same(one: Rows, other: Rows) -> bool:
    """Whether two matrices have the same arrays, bit for bit."""
    parts = [(getattr(one, name), getattr(other, name)) for name in ("starts", "items", "values")]
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in parts)


@given(
    seed=st.integers(0, 99), window=st.sampled_from([1, 3, 10, 50]), pairs=st.sampled_from([1, 60, 4000]),
    backward=st.sampled_from([0.25, 0.5, 1.0]), exponent=st.sampled_from([0.0, 0.3, 1.0]),
    on_disk=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_transitions_in_blocks_and_on_disk_are_those_of_the_loops(
    seed: int, window: int, pairs: int, backward: float, exponent: float, on_disk: bool
) -> None:
    train, texts = draw(users=20, seed=seed)
    use = Constants(backward=backward, exponent=exponent)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "BLOCK_PAIRS", pairs)
        scratch = Path(name) if on_disk else None
        found = counting.count_transitions(train, len(texts), window=window, constants=use, scratch=scratch)
        assert not list(Path(name).iterdir())  # the files have no name, so a killed process leaves none
        expected = transitions_by_loops(train, len(texts), use, window)
        factors = np.maximum(np.bincount(np.concatenate(train), minlength=len(texts)), 1.0) ** -exponent
        for row in range(len(texts)):
            items, values = found.row(row)
            order = [i for i in np.argsort(-expected[row] * factors, kind="stable") if expected[row, i] > 0]
            assert items.tolist() == order and values.tolist() == expected[row, order].tolist()


def test_a_memory_fitted_on_disk_is_the_same_file(tmp_path: Path) -> None:
    data = synthetic_dataset(tmp_path / "data", users=80, items=60)
    (tmp_path / "scratch").mkdir()
    for name, scratch in (("one", None), ("other", tmp_path / "scratch")):
        fit_memory(data, data.split(), config=MemoryConfig(), scratch=scratch).save(tmp_path / name)
    for name in (MEMORY_FILE, TEXTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert not list((tmp_path / "scratch").iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = RowsWriter(2, tmp_path)
    monkeypatch.setattr(rows, "items", SimpleNamespace(write=full))
    with pytest.raises(StorageError, match="disk full"):
        rows.append(np.array([1]), np.array([0]), np.array([1.0]))


def test_rows_without_entries_have_empty_arrays_on_disk(tmp_path: Path) -> None:
    rows = RowsWriter(2, tmp_path)
    rows.append(np.zeros(2, np.int64), np.zeros(0), np.zeros(0))
    assert same(rows.finish(), Rows(np.zeros(3, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)))


@pytest.mark.parametrize("part", [similarity.PART, 64])
def test_the_library_for_large_catalogs_finds_the_same_neighbors(
    part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, texts = draw(items=200)
    texts += [f"{word} {word} rare{i % 7}" for i, word in enumerate(WORDS * 6)]
    index = TextIndex.fit(texts)
    assert index is not None
    exact = index.most_similar(30)
    monkeypatch.setattr(similarity, "MAX_PRODUCTS", 0)
    monkeypatch.setattr(similarity, "LARGE_BLOCK", 100)
    monkeypatch.setattr(similarity, "PART", part)
    monkeypatch.setattr(similarity, "BLOCK", 17)
    large = index.most_similar(30, scratch=tmp_path)
    assert large.starts.tolist() == exact.starts.tolist()
    np.testing.assert_allclose(large.values, exact.values, rtol=1e-6)  # sums of at most three terms
    for row in range(len(texts)):  # the order of cosines that differ in the last bit may differ
        clear = exact.row(row)[1] > exact.row(row)[1][-1:] * (1 + 1e-6)
        assert set(exact.row(row)[0][clear]) <= set(large.row(row)[0])


def test_common_words_find_no_neighbors_in_a_large_catalog_but_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts: list[str | None] = [f"group{i // 4} common{i % 8}" for i in range(400)]
    index = TextIndex.fit(texts)
    assert index is not None
    monkeypatch.setattr(similarity, "MAX_PRODUCTS", 0)
    monkeypatch.setattr(similarity, "PRODUCTS_PER_ITEM", 10)  # 1600 by groups, 20000 by common words
    found = index.most_similar(10)
    cosine = similarity_by_loops(texts)
    for row in range(len(texts)):
        items, values = found.row(row)
        assert set(items) == {i for i in range(row // 4 * 4, row // 4 * 4 + 4) if i != row}
        np.testing.assert_allclose(values, cosine[row, items], rtol=1e-5)  # float32, all words


def test_a_cut_takes_the_best_transitions_of_each_history_item() -> None:
    train, texts = draw(users=200)
    use = Constants(text_weight=0.0)
    full = build_memory(train, texts, config=ALL, constants=use)
    cut = build_memory(train, texts, config=MemoryConfig(transition_items=4), constants=use)
    items, scores = full.scores([5])
    assert len(items) > 4
    best = np.sort(items[largest(scores, 4)])
    assert cut.scores([5])[0].tolist() == best.tolist()


def test_masses_are_powers_of_the_scores_normalized() -> None:
    train, texts = draw()
    memory = build_memory(train, texts, constants=USE)
    history = np.array([1, 4, 2])
    items, scores = memory.scores(history)
    (rows,), (mass,) = memory.prior([history], power=2.0)
    assert rows.tolist() == items.tolist() and mass.dtype == np.float64
    np.testing.assert_allclose(mass, scores**2 / (scores**2).sum(), rtol=1e-12)
    (rows,), (mass,) = memory.prior([history], exclude_history=True, top=5)
    assert len(rows) == 5 and not set(rows) & set(history) and mass.sum() == pytest.approx(1)
    new = ~np.isin(items, history)
    assert set(rows) == set(items[new][largest(scores[new], 5)])


def test_a_history_that_connects_with_nothing_gets_popularity() -> None:
    train, texts = draw()
    memory = build_memory(train, texts, constants=Constants(text_weight=0.0))
    counts = np.bincount(np.concatenate(train), minlength=len(texts))
    for history in ([], [len(texts) - 1], [10**6]):
        assert not memory.knows(history)
        (rows,), (mass,) = memory.prior([history])
        assert rows.tolist() == np.flatnonzero(counts).tolist()
        np.testing.assert_allclose(mass, counts[rows] / counts.sum(), rtol=1e-12)
    assert memory.knows([0])
    order = np.argsort(-counts, kind="stable")[:6]
    assert memory.ranker()([np.zeros(0, np.int32)], 6).tolist() == [order.tolist()]


def test_the_ranker_lists_items_by_score_and_fills_with_minus_one() -> None:
    train, texts = draw()
    memory = build_memory(train, texts, constants=USE)
    history = np.array([1, 2], np.int32)
    items, scores = memory.scores(history)
    assert 0 < len(items) < len(texts)
    listed = memory.ranker()([history], len(texts))[0].tolist()
    assert listed[: len(items)] == sorted(items, key=lambda i: (-scores[items.tolist().index(i)], i))
    assert set(listed[len(items) :]) == {-1}


def test_the_memory_is_evaluated_like_other_rankers_and_learns_from_the_training_part_only() -> None:
    loop = [np.roll(np.arange(8), -u).astype(np.int32) for u in range(8)]  # item i + 1 follows item i
    data = Dataset(
        name="loop", user_ids=list("abcdefgh"), item_ids=list("stuvwxyz"), sequences=loop, titles=[""] * 8,
        texts=[None] * 8, images=[None] * 8, tie_rule="as written",
    )  # fmt: skip
    split = data.split()
    memory = build_memory(split.train, data.texts, item_ids=data.item_ids)
    assert memory.similar is None and int(memory.counts.sum()) == sum(map(len, split.train))
    done = evaluate(memory.ranker(), split, part="test", cutoffs=(1, 2), progress=False)
    assert done.metrics_history_removed["HR@1"] == 1.0


def test_a_saved_memory_is_the_same(tmp_path: Path) -> None:
    train, texts = draw()
    memory = build_memory(train, texts, constants=USE)
    memory.save(tmp_path)
    loaded = Memory.load(tmp_path)
    assert loaded.config == memory.config and loaded.constants == memory.constants
    for history in train:
        for one, other in zip(memory.scores(history), loaded.scores(history), strict=True):
            assert one.tolist() == other.tolist()
    loaded.check_catalog([*range(len(texts)), "added later"])
    with pytest.raises(UserError, match="does not belong to the catalog"):
        loaded.check_catalog(range(1, len(texts) + 1))


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=f"{MEMORY_FILE} is missing"):
        Memory.load(tmp_path)
    train, texts = draw()
    memory = build_memory(train, texts)
    memory.save(tmp_path)
    content = (tmp_path / MEMORY_FILE).read_bytes()
    for damaged in (b"", content[:100], content[:-50], content.replace(b'"catalog', b'"catalig', 1)):
        (tmp_path / MEMORY_FILE).write_bytes(damaged)
        with pytest.raises(DamagedError, match=MEMORY_FILE):
            Memory.load(tmp_path)
    memory.transitions.base.items[3] = len(texts)
    memory.save(tmp_path)
    with pytest.raises(DamagedError, match="is damaged") as caught:
        Memory.load(tmp_path)
    assert caught.value.cause == "transitions refers to an item that does not exist (there are 30)"


@pytest.mark.parametrize(
    "name, value, cause",
    [
        ("items", 10**6, "a text has a word that does not exist"),
        ("items", -1, "a text has a word that does not exist"),
        ("starts", 10**6, "its rows are not consecutive"),
        ("words", 255, "its words are not UTF-8"),
        ("words", 10, "different words and"),
    ],
)
def test_a_damaged_text_index_is_refused(name: str, value: int, cause: str, tmp_path: Path) -> None:
    train, texts = draw()
    build_memory(train, texts).save(tmp_path)
    tensors = load_file(tmp_path / TEXTS_FILE)
    tensors[name][2] = value
    save_file(tensors, tmp_path / TEXTS_FILE)
    with pytest.raises(DamagedError, match=f"{TEXTS_FILE} is damaged") as caught:
        Memory.load(tmp_path).add_items(["red soap"])
    assert cause in str(caught.value.cause)


def test_another_format_is_refused(tmp_path: Path) -> None:
    train, texts = draw()
    build_memory(train, texts).save(tmp_path)
    path = tmp_path / MEMORY_FILE
    path.write_bytes(path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(UserError, match="has format 9; this version reads format 1"):
        Memory.load(tmp_path)


def test_a_memory_without_training_interactions_is_refused() -> None:
    with pytest.raises(UserError, match="there is no training interaction"):
        build_memory([np.zeros(0, np.int32)], ["a"])


def test_settings_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"memory\.window must be at least 1, got 0"):
        MemoryConfig(window=0)


def test_texts_whose_words_are_everywhere_give_no_similarity() -> None:
    train, _ = draw()
    assert build_memory(train, ["the same words"] * 30).similar is None
    assert build_memory(train, [None] * 30).similar is None
    assert build_memory(train, draw()[1], config=MemoryConfig(text="none")).similar is None


def test_ids_of_another_order_have_another_digest() -> None:
    assert ids_digest(["a", "b"]) != ids_digest(["b", "a"]) and ids_digest([1, 2]) == ids_digest(["1", "2"])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(-9, 9)), max_size=60), st.integers(200_001, 2**40)
)
def test_sums_by_key_equal_those_of_a_dictionary(pairs: list[tuple[int, int]], limit: int) -> None:
    expected: dict[int, int] = {}
    for key, value in pairs:
        expected[key] = expected.get(key, 0) + value
    keys, sums = sum_by_key(
        np.array([k for k, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float64), limit
    )
    assert dict(zip(keys.tolist(), sums.tolist(), strict=True)) == expected
    assert keys.tolist() == sorted(expected)


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 35))
def test_the_largest_values_are_those_of_a_sort(values: list[int], top: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top]
    array = np.array(values, dtype=np.float64)
    assert largest(array, top).tolist() == order
    assert best_positions(array, top).tolist() == sorted(order)
