"""Searches with other experts: candidates of a fit, and the mixture as a ranker."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cemg.artifacts import RunArtifacts
from cemg.decoding import score_all
from cemg.evaluation.mixture import Mixture, find_candidates, mixture_ranker, open_mixture
from cemg.evaluation.ranker import beam_ranker
from cemg.mixture import Gate, MemorySource
from cemg.mixture.fitting import POWERS, default_gate


@pytest.fixture(scope="module")
def artifacts(tiny_run) -> RunArtifacts:
    return RunArtifacts.open(tiny_run)


@pytest.fixture(scope="module")
def mixture(artifacts) -> Mixture:
    split = artifacts.load_data().split()
    sources = [MemorySource(artifacts.load_memory())]
    return open_mixture(artifacts, *artifacts.load_generator(), artifacts.load_catalog(), sources, split)


def gate_of(weight: float, power: float = 1.3) -> Gate:
    gate = default_gate(["memory"], memory="digest")
    return dataclasses.replace(gate, constant=[1 - weight, weight], powers=[power])


@pytest.mark.parametrize("exclude", [False, True])
def test_candidates_have_the_probabilities_of_both_experts(artifacts, mixture, exclude):
    """The generator's share is what a float32 score leaves of the mixture: 1e-6 of it, at scores below 8."""
    split = artifacts.load_data().split()
    histories, targets = split.histories("valid"), split.targets("valid")
    source, power, found = mixture.sources[0], POWERS[1], 0
    for history, target in zip(histories, targets, strict=True):
        if exclude and target in history:
            continue
        one = find_candidates(mixture, [history], np.array([target]), beams=10, exclude_history=exclude)
        if one is None:
            continue
        masses = source([history], exclude_history=exclude)[0]
        mass = float(masses.sharpened(power)[masses.items == target].sum())
        generator, memory = one.experts([power])[0, one.target[0]].double().exp().tolist()
        assert memory == pytest.approx(mass, rel=1e-4)
        expected = float(score_all(mixture.decoder, *mixture.prompter.batch([history]))[0, target].exp())
        assert generator == pytest.approx(expected, rel=1e-4, abs=4e-6 * (expected + mass))
        found += 1
    assert found > 10


@pytest.mark.parametrize("exclude", [False, True])
def test_a_weight_of_zero_ranks_as_the_generator_does(artifacts, mixture, exclude):
    histories = artifacts.load_data().split().histories("test")
    alone = beam_ranker(
        artifacts, *artifacts.load_generator(), artifacts.load_catalog(), beams=10, exclude_history=exclude
    )
    mixed = mixture_ranker(mixture, gate_of(0.0), beams=10, constant=True, exclude_history=exclude)
    assert torch.equal(mixed(histories, 10), alone(histories, 10))


def test_a_weight_of_one_ranks_as_the_memory_does(artifacts, mixture):
    histories = artifacts.load_data().split().histories("test")
    mixed = mixture_ranker(mixture, gate_of(1.0), beams=50, constant=True)(histories, 10)  # 50 items
    memory = artifacts.load_memory()
    for row, history in zip(mixed.tolist(), histories, strict=True):
        items, scores = memory.scores(history)
        score_of = dict(zip(items.tolist(), scores.tolist(), strict=True))
        best = sorted(scores.tolist(), reverse=True)[: len([item for item in row if item >= 0])]
        np.testing.assert_allclose([score_of[item] for item in row if item >= 0], best, rtol=1e-5)


def test_the_mixture_never_lists_a_removed_item_or_an_excluded_history(artifacts, mixture):
    histories = artifacts.load_data().split().histories("test")
    first = mixture_ranker(mixture, gate_of(0.5), beams=10)(histories, 10)
    gone = first[:, 0].unique().tolist()
    options = {"beams": 10, "exclude_history": True, "removed": gone}
    found = mixture_ranker(mixture, gate_of(0.5), **options)(histories, 10)
    assert int((found >= 0).sum()) > 5 * len(histories)
    for row, history in zip(found.tolist(), histories, strict=True):
        assert not {*gone, *history.tolist()} & set(row)
