"""The gate: weights of the experts, the averaged prior, popularity for empty histories, and its file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cemg.dense import DenseConfig, DenseRanker, SequenceEncoder
from cemg.errors import DamagedError
from cemg.mixture import GATE_FILE, DenseSource, Experts, Gate, Masses
from cemg.mixture.fitting import default_gate
from cemg.mixture.gate import MAX_WEIGHT, averaged, feature_names, features_of

COUNTS = np.array([9, 0, 3, 1, 6])


@dataclasses.dataclass
class Fixed:
    """A source with the same items for every history but empty ones."""

    name: str
    items: list[int]
    mass: list[float]

    def __call__(self, histories: Sequence[np.ndarray], *, exclude_history: bool) -> list[Masses]:
        items, mass = np.array(self.items, dtype=np.int64), np.array(self.mass)
        nothing = Masses(np.zeros(0, np.int64), np.zeros(0))
        found = []
        for history in histories:
            new = np.isin(items, history, invert=True) if exclude_history else np.ones(len(items), dtype=bool)
            found.append(Masses(items[new], mass[new]) if len(history) else nothing)
        return found


ONE, TWO = Fixed("memory", [0, 2], [0.75, 0.25]), Fixed("dense", [2, 4], [0.5, 0.5])


def gate_of(constant: list[float], powers: list[float]) -> Gate:
    gate = default_gate(["memory", "dense"][: len(powers)], memory="digest")
    bias = np.log(np.maximum(constant, 1e-30)).tolist()
    return dataclasses.replace(gate, constant=constant, bias=bias, powers=powers)


def test_the_prior_is_the_average_of_the_sources_and_its_weight_is_that_of_all_of_them():
    gate = gate_of([0.5, 0.3, 0.2], [1.0, 2.0])
    mixed = Experts(gate, [ONE, TWO], COUNTS).prior([[3, 1]], constant=True)
    assert mixed.items[0].tolist() == [0, 2, 4]
    np.testing.assert_allclose(mixed.mass[0], [0.3 * 0.75, 0.3 * 0.25 + 0.2 * 0.5, 0.2 * 0.5])
    np.testing.assert_allclose(mixed.weight, [0.5])
    by_gate = Experts(gate, [ONE, TWO], COUNTS).prior([[3, 1]])  # its slopes are 0
    np.testing.assert_allclose(by_gate.mass[0], mixed.mass[0])
    np.testing.assert_allclose(by_gate.weight, mixed.weight)


def test_fractions_say_which_source_the_mass_of_an_item_is_from():
    gate = gate_of([0.5, 0.3, 0.2], [1.0, 2.0])
    mixed = Experts(gate, [ONE, TWO], COUNTS).prior([[3, 1], []], constant=True)
    found = mixed.fractions(0, np.array([2, 0, 1, 4]))
    both = 0.3 * 0.25 + 0.2 * 0.5
    np.testing.assert_allclose(found["memory"], [0.3 * 0.25 / both, 1, 0, 0])
    np.testing.assert_allclose(found["dense"], [0.2 * 0.5 / both, 0, 0, 1])
    np.testing.assert_allclose(mixed.fractions(1, np.array([0, 1]))["popularity"], [1, 0])
    assert [part.shape for part in mixed.fractions(0, np.zeros(0, np.int64)).values()] == [(0,), (0,)]


def test_a_power_sharpens_the_masses_and_keeps_their_sum():
    masses = Masses(np.array([1, 2]), np.array([0.6, 0.2]))
    np.testing.assert_allclose(masses.sharpened(2.0), [0.9, 0.1])
    np.testing.assert_allclose(masses.sharpened(1.0), [0.75, 0.25])
    items, mass = averaged([masses], [2.0], [0.5])
    assert items.tolist() == [1, 2] and mass.sum() == pytest.approx(0.5)


def test_a_source_that_says_nothing_has_no_weight_and_the_others_share_it():
    gate = gate_of([0.5, 0.3, 0.2], [1.0, 1.0])
    present = np.array([[True, True], [False, True], [False, False]])
    weights = gate.constant_weights(present)
    np.testing.assert_allclose(weights, [[0.5, 0.3, 0.2], [5 / 7, 0, 2 / 7], [1, 0, 0]])
    features = np.zeros((3, len(feature_names(gate.sources))))
    np.testing.assert_allclose(gate.weights(features, present), weights)
    only = dataclasses.replace(gate, constant=[0.0, 1.0, 0.0]).constant_weights(present)
    assert only.tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]


def test_an_empty_history_gets_popularity_and_the_generator_ranks_only_the_rest():
    mixed = Experts(gate_of([0.5, 0.5], [1.0]), [ONE], COUNTS).prior([[], [3]])
    assert mixed.items[0].tolist() == [0, 2, 3, 4] and mixed.mass[0].tolist() == [9, 3, 1, 6]
    assert mixed.weight[0] == MAX_WEIGHT < 1 and mixed.weight[1] == pytest.approx(0.5)


def test_the_generator_ranks_the_rest_also_where_its_weight_is_0():
    assert Experts(gate_of([0.0, 1.0], [1.0]), [ONE], COUNTS).prior([[3]]).weight.tolist() == [MAX_WEIGHT]


def test_items_of_the_history_have_mass_only_where_users_return_to_items():
    gate = gate_of([0.5, 0.5], [1.0])
    for repeats, exclude, items in ((True, False, [0, 2]), (True, True, [2]), (False, False, [2])):
        experts = Experts(dataclasses.replace(gate, repeats=repeats), [ONE], COUNTS)
        assert experts.prior([[0]], exclude_history=exclude).items[0].tolist() == items


def test_features_follow_the_confidence_of_a_source_and_the_history_and_need_no_target():
    sure = Masses(np.array([0, 1]), np.array([0.99, 0.01]))
    unsure = Masses(np.arange(4), np.full(4, 0.25))
    histories = [np.array([0, 4]), np.array([1, 2, 3])]
    features = features_of(histories, [[sure, unsure]], COUNTS)
    assert features.shape == (2, 6) and np.isfinite(features).all()
    largest, entropy, items, length, rare, newest = features.T
    assert largest[0] > largest[1] and entropy[0] < entropy[1] and items[0] < items[1]
    np.testing.assert_allclose(length, np.log([3, 4]))
    np.testing.assert_allclose(rare, [0, 1])  # items 1, 2 and 3 have five training events or fewer
    np.testing.assert_allclose(newest, np.log([7, 2]))


def test_a_gate_is_read_as_it_was_written(tmp_path: Path):
    gate = dataclasses.replace(gate_of([0.4, 0.6], [1.6]), fit={"users": 3})
    gate.save(str(tmp_path))
    loaded = Gate.load(str(tmp_path / GATE_FILE))
    assert dataclasses.replace(loaded, sha256=None) == gate


def test_a_damaged_gate_is_refused_by_name(tmp_path: Path):
    gate_of([0.4, 0.6], [1.6]).save(tmp_path)
    path = tmp_path / GATE_FILE
    record = json.loads(path.read_text())
    for content in ("", "{}", json.dumps(record | {"constant": [0.9, 0.1]})):
        path.write_text(content)
        with pytest.raises(DamagedError, match=GATE_FILE):
            Gate.load(path)
    dataclasses.replace(gate_of([0.4, 0.6], [1.6]), bias=[0.0]).save(tmp_path)
    with pytest.raises(DamagedError, match=GATE_FILE) as caught:
        Gate.load(path)
    assert caught.value.cause == "its numbers do not fit its sources"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"format": 2}, "format 2"),
        ({"sources": ["other"]}, "its sources are"),
        ({"powers": []}, "too few powers"),
        ({"powers": [-3.0]}, "not positive"),
        ({"constant": [-1.0, 2.0]}, "a weight is negative"),
        ({"scales": [0.0] * len(feature_names(["memory"]))}, "not positive"),
    ],
)
def test_a_signed_gate_that_cannot_weigh_experts_is_refused(tmp_path: Path, change, cause):
    dataclasses.replace(default_gate(["memory"], memory="digest"), **change).save(tmp_path)
    with pytest.raises(DamagedError, match="cannot be used") as caught:
        Gate.load(tmp_path / GATE_FILE)
    assert caught.value.cause is not None and cause in caught.value.cause


def test_a_dense_model_leaves_out_items_that_it_was_not_trained_on():
    config = DenseConfig()
    source = DenseSource(DenseRanker(SequenceEncoder(6, config).eval(), config), items=6)
    known, added, only_added = source(
        [np.array([3, 1]), np.array([3, 6, 1]), np.array([6, 7])], exclude_history=False
    )
    assert known.items.tolist() == added.items.tolist() and np.array_equal(known.mass, added.mass)
    assert len(only_added.items) == 0
