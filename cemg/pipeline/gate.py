"""Fitting the gate of a run on validation users that did not select its generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np

from cemg.artifacts import RunArtifacts
from cemg.dense import DENSE_FILES, DenseRanker
from cemg.evaluation.mixture import find_candidates, open_mixture
from cemg.evaluation.selection import Selection, checkpoint_selection
from cemg.mixture import DenseSource, Gate, MemorySource, Source
from cemg.mixture.fitting import default_gate, fit_gate
from cemg.progress import console
from cemg.storage import files
from cemg.storage.manifest import Manifest
from cemg.storage.read import file_digest

FEWEST = 50  # targets that a fit needs


def dense_digest(dense: str) -> str:
    """sha256 of the weights of the dense model in a folder; empty if there is none."""
    return file_digest(Path(dense) / DENSE_FILES[1], fix=_fix(dense)) if dense else ""


def fit_run(artifacts: RunArtifacts, folder: Path) -> None:
    """Fit the weights of the generator and of the other experts of a run, and write them.

    Prints their validation metrics. The files of the dense model are copied, so that the run is complete.
    Without other experts there is nothing to fit or to write.
    """
    if not artifacts.config.mixes:
        return
    sources: list[Source] = []
    items = artifacts.load_data().num_items  # without those that were added later
    if artifacts.config.gate.memory:
        sources.append(MemorySource(artifacts.load_memory(artifacts.load_catalog().first(items))))
    if artifacts.config.gate.dense:
        sources.append(_dense_source(artifacts, folder))
    if artifacts.config.generator.item_loss:
        sources.append(replace(artifacts.item_softmax(), limit=items))
    _fit(artifacts, sources).save(folder)


def _dense_source(artifacts: RunArtifacts, folder: Path) -> DenseSource:
    """Copy the dense model of the settings to ``folder`` and open it there."""
    dense = Path(artifacts.config.gate.dense)
    model = DenseRanker.load(dense)
    model.check_data(dense, artifacts.load_data().split())
    if not model.targets:
        console.print(f"note: {dense} does not say which data it was trained on", highlight=False)
    for name in DENSE_FILES:
        files.copy_file(dense / name, folder / name)
    return DenseSource(model)


def _fix(dense: str) -> str:
    command = "python -m cemg.baselines --data DATA --model bsarec"
    return f"train it on the data of the run: {command} --run {quote(dense)} --out results/bsarec.json"


def _fit(artifacts: RunArtifacts, sources: Sequence[Source]) -> Gate:
    data = artifacts.load_data()
    split, config = data.split(), artifacts.config
    catalog = artifacts.load_catalog().first(data.num_items)
    names = [source.name for source in sources]
    memory = Manifest.read(artifacts.run.path("memory")).contents or ""
    selection = checkpoint_selection(split, config)
    repeats = selection.history == "kept"
    users = gate_users(selection, config.gate.users, seed=config.seed)
    histories, targets = split.histories("valid"), split.targets("valid")
    found = find_candidates(
        open_mixture(artifacts, *artifacts.load_generator(), catalog, sources, split),
        [histories[user] for user in users],
        targets[users],
        beams=config.gate.beams,
        exclude_history=not repeats,
    )
    if found is None or len(found.target) < FEWEST:
        few = 0 if found is None else len(found.target)
        console.print(
            f"gate: {few} validation targets were found, too few for a fit: all experts weigh the same",
            highlight=False,
        )
        return replace(default_gate(names, memory=memory), repeats=repeats)
    gate = replace(fit_gate(found, names, memory=memory), repeats=repeats)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in gate.fit["ndcg10"].items())
    console.print(f"gate: NDCG@10 of {len(users):,} validation users: {figures}", highlight=False)
    return gate


def gate_users(selection: Selection, count: int, *, seed: int) -> np.ndarray:
    """Draw the users that fit the gate, ascending, from those that did not select the checkpoint.

    Runs of earlier versions may have used every user for the checkpoint; then all may fit the gate too.
    """
    users = selection.others
    if not len(users):
        users = selection.users
        note = "the gate is fitted on the users that selected the checkpoint, because there are no others"
        console.print(f"note: {note}", highlight=False)
    return np.sort(np.random.default_rng([seed, 1]).permutation(users)[:count])
