"""The synthetic dataset: each planted signal matters, and the seed determines everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cemg.data import Dataset, synthetic_dataset
from cemg.data.synthetic import CLUSTERS, KINDS, LONGEST, SHORTEST, TOPICS, plant, planted_clusters
from cemg.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return synthetic_dataset(folder)


@pytest.fixture(scope="module")
def world():
    return plant(users=1200, items=400, seed=0)


def hit_rate(scores: np.ndarray, data: Dataset, top: int = 10) -> float:
    """Share of test targets among the ``top`` best items a user does not own yet."""
    split = data.split()
    scores = scores.copy()
    for row, history in zip(scores, split.histories("test"), strict=True):
        row[history] = -np.inf
    of_target = np.take_along_axis(scores, split.test[:, None].astype(np.int64), axis=1)
    return float(((scores > of_target).sum(axis=1) < top).mean())


def test_an_oracle_hits_more_than_half_and_popularity_less_than_fifteen_percent(data, world):
    split = data.split()
    popularity = np.repeat(split.train_counts(data.num_items)[None].astype(float), data.num_users, axis=0)
    chance = 10 / data.num_items
    assert hit_rate(world.scores(split.valid), data) > 0.5
    assert 2 * chance < hit_rate(popularity, data) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_that_ignores_one_signal_loses_ten_points(data, world, kind):
    last = data.split().valid
    assert hit_rate(world.scores(last, blind_to=kind), data) < hit_rate(world.scores(last), data) - 0.1


def test_an_oracle_that_ignores_the_order_loses_ten_points(data, world):
    assert hit_rate(world.scores(None), data) < hit_rate(world.scores(data.split().valid), data) - 0.1


def test_a_learned_model_of_order_and_taste_doubles_the_popularity_baseline(data, world):
    # Counts of cluster -> next cluster per kind, and of clusters per user, without knowledge of the rule.
    split = data.split()
    scores = np.zeros((data.num_users, data.num_items))
    for kind in range(3):
        cluster = world.clusters[:, kind]
        taste = np.stack([np.bincount(cluster[h], minlength=CLUSTERS) + 0.2 for h in split.histories("test")])
        scores += 2 * np.log(taste)[:, cluster]
    counts = split.train_counts(data.num_items)
    popularity = np.repeat(counts[None].astype(float), data.num_users, axis=0)
    assert hit_rate(scores + np.log(counts + 1), data) > 2 * hit_rate(popularity, data)


def test_the_dataset_depends_on_the_seed_only(tmp_path):
    first, again, other = (
        synthetic_dataset(tmp_path / name, users=30, items=60, seed=seed)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert all(np.array_equal(x, y) for x, y in zip(first.sequences, again.sequences, strict=True))
    assert first.texts == again.texts and first.texts != other.texts
    drawn = [path.name for path in first.images if path]
    assert all(
        (tmp_path / "a/images" / n).read_bytes() == (tmp_path / "b/images" / n).read_bytes() for n in drawn
    )
    assert not all(np.array_equal(x, y) for x, y in zip(first.sequences, other.sequences, strict=True))


def test_histories_have_six_to_twenty_five_different_items(data):
    lengths = [len(s) for s in data.sequences]
    assert min(lengths) == SHORTEST and max(lengths) == LONGEST
    assert all(len(set(s)) == len(s) for s in data.sequences)


def test_some_texts_and_pictures_are_missing_and_every_picture_opens(data):
    without_text = sum(text is None for text in data.texts)
    without_image = sum(path is None for path in data.images)
    assert 2 <= without_text <= 28 and 2 <= without_image <= 28  # 12 expected, standard deviation 3.4
    for path in filter(None, data.images):
        with Image.open(path) as image:
            image.load()
            assert image.mode == "RGB" and 64 <= min(image.size) <= max(image.size) <= 96


def test_the_planted_labels_are_written_and_the_kinds_are_independent(data, folder, world):
    labels = planted_clusters(folder)
    assert labels.columns == ["item", *KINDS] and labels.height == data.num_items
    assert np.array_equal(labels.select(KINDS).to_numpy(), world.clusters)
    for kind in KINDS:
        assert labels[kind].value_counts()["count"].min() >= data.num_items // CLUSTERS
    agreement = (labels["visual"] == labels["textual"]).mean()
    assert abs(agreement - 1 / CLUSTERS) < 0.08  # four standard deviations: 4 * sqrt(1/6 * 5/6 / 400) = 0.075


def test_a_text_reveals_its_textual_cluster_and_no_colour(data, world):
    for text, topic in zip(data.texts, world.clusters[:, 1], strict=True):
        if text is not None:
            assert [name for name, *_ in TOPICS if f"from the {name} shelf" in text] == [TOPICS[topic][0]]
            assert not {"red", "blue", "green", "orange", "purple", "black"} & set(text.lower().split())


def test_the_mean_colour_of_a_picture_reveals_its_visual_cluster(data, world):
    # Nearest cluster mean on the darkest pixels' colour: chance is 1/6.
    rows = [i for i, path in enumerate(data.images) if path]
    colours = np.stack([_dark_colour(data.images[i]) for i in rows])
    labels = world.clusters[rows, 0]
    means = np.stack([colours[labels == c].mean(axis=0) for c in range(CLUSTERS)])
    nearest = ((colours[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.95


def _dark_colour(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path), dtype=float).reshape(-1, 3)
    return pixels[pixels.min(axis=1) < 170].mean(axis=0)


def test_the_dataset_is_marked_as_synthetic_also_after_saving(data, tmp_path):
    data.save(tmp_path)
    loaded = Dataset.load(tmp_path)
    assert loaded.name == "synthetic" and loaded.synthetic and "synthetic" in loaded.notes[0]
    assert loaded.split().fingerprint == data.split().fingerprint


def test_too_few_items_for_a_history_are_refused(tmp_path):
    with pytest.raises(UserError, match="50 items, got 10 and 49"):
        synthetic_dataset(tmp_path, users=10, items=49)


def test_missing_labels_are_refused_with_the_file(tmp_path):
    with pytest.raises(UserError, match=r"planted\.parquet is missing"):
        planted_clusters(tmp_path)


def test_the_default_dataset_says_which_clusters_were_planted(tmp_path):
    data = synthetic_dataset(tmp_path)
    assert planted_clusters(tmp_path).height == data.num_items
