"""Evaluates a run and writes result files: popularity, the search of the run, and studies of the search."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.artifacts import RunArtifacts
from cemg.config import RunConfig
from cemg.data.dataset import Split
from cemg.decoding import Decoder, Normalize, TransformersDecoder
from cemg.evaluation import (
    CUTOFFS,
    Evaluation,
    PopularityRanker,
    Rank,
    evaluate,
    evaluate_lists,
    hardware,
    paired_differences,
    ranks_of,
    read_result,
    seeded_sample,
    write_result,
)
from cemg.evaluation.lists import read_lists
from cemg.evaluation.mixture import mixture_ranker, open_mixture
from cemg.evaluation.ranker import beam_ranker
from cemg.evaluation.results import EXCLUDED, KEPT, REMOVED
from cemg.evaluation.search import Search, certificate_study, engine_study, exact_study
from cemg.generator import Vocabulary
from cemg.mixture import MEMORY
from cemg.progress import console
from cemg.storage import files
from cemg.storage.manifest import Manifest, stages_of
from cemg.storage.read import read_json
from cemg.storage.run import Run
from cemg.tokenizer import Catalog


def score(
    artifacts: RunArtifacts,
    config: RunConfig,
    *,
    part: str,
    engine: str,
    beams: int,
    users: int | None = None,
    copy: Path | None = None,
    studies: Sequence[str] = (),
    normalize: str | None = None,
) -> list[Path]:
    """Evaluate popularity and the search of a run.

    Args:
        artifacts: The run.
        config: Its settings, which the result files record.
        part: "valid" or "test".
        engine: "cemg", "transformers", "vllm", or "free" for a search without the trie.
        beams: Beams per user.
        users: Evaluate a sample of this size; None means all users.
        copy: Copy the result file of the run there as well.
        studies: Studies of the search: "exact", "certificate", "engines".
        normalize: The normalization of the studies, if it is not that of the run.

    Returns:
        The paths of the result files, that of popularity first.
    """
    data = artifacts.load_data()
    catalog = artifacts.load_catalog().first(data.num_items)  # without items that were added later
    split = data.split()
    rows, scope = _sample(split, part, users, config)
    model, vocabulary = artifacts.load_generator()
    removed, notes = _removed(artifacts, catalog, studies)
    rank = beam_ranker(artifacts, model, vocabulary, catalog, beams=beams, engine=engine, removed=removed)
    first = _popularity(artifacts, config, split, part=part, rows=rows, scope=scope)
    started, lists = time.monotonic(), _ListLengths(rank)
    evaluation = evaluate(lists, split, part=part, users=rows, max_list=beams)
    excluded, further = None, dict[str, Any]()
    if engine == "cemg":
        excluding = beam_ranker(
            artifacts, model, vocabulary, catalog, beams=beams, exclude_history=True, removed=removed
        )
        excluded = evaluate(excluding, split, part=part, users=rows, max_list=beams)
    seconds = {**stage_seconds(artifacts.run), "evaluation": round(time.monotonic() - started, 1)}
    about = {"model": "cemg", "engine": engine, "beams": beams, "stage_seconds": seconds}
    about |= {"notes": [*data.notes, *notes], **config.to_dict(), **_stopped(artifacts)}
    if engine == "free":
        about["share_of_beams_that_are_items"] = round(lists.share, 4)
    if studies:
        studied = artifacts.normalize(cast(Normalize | None, normalize))
        search = _search(
            artifacts, model, vocabulary, catalog, split, part=part, rows=rows, beams=beams, normalize=studied
        )
        further |= {name: STUDIES[name](search) for name in studies} | {"studies_normalize": studied}
    default_search = engine == "cemg" and beams == config.decoding.beams
    name = f"{data.name}-cemg-{scope}" + ("" if default_search else f"-{engine}-{beams}-beams")
    name += _studies_suffix(studies, normalize)
    further["beside"] = first.name
    second = _write(
        artifacts, config, name, evaluation, about=about, excluded=excluded, seconds=seconds, further=further,
        copy=copy,
    )  # fmt: skip
    return [first, second]


class _ListLengths:
    """A ranker that also records which share of its lists, of ``top`` items each, is filled."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.filled, self.total = rank, 0, 0

    def __call__(self, histories: list[np.ndarray], top: int) -> Tensor:
        lists = self.rank(histories, top)
        self.filled, self.total = self.filled + int((lists >= 0).sum()), self.total + lists.numel()
        return lists

    @property
    def share(self) -> float:
        return self.filled / max(self.total, 1)


def _stopped(artifacts: RunArtifacts) -> dict[str, str]:
    """Why the training of the generator ended before its last epoch; empty if no budget stopped it."""
    if not artifacts.has_file("generator", "training.json"):
        return {}
    about = read_json(artifacts.file("generator", "training.json"), dict[str, int | float | str])
    return {"stopped": str(about["stopped"])} if "stopped" in about else {}


def score_memory(
    artifacts: RunArtifacts,
    config: RunConfig,
    *,
    part: str,
    users: int | None = None,
    copy: Path | None = None,
    popularity: Path | None = None,
) -> list[Path]:
    """Evaluate popularity and the item memory of a run, alone; the arguments are those of ``score``.

    ``popularity`` is the result file of popularity, if it was written before.

    Returns:
        The paths of the result files, that of popularity first.

    Raises:
        UserError: The run has no memory.
    """
    data = artifacts.load_data()
    catalog = artifacts.load_catalog().first(data.num_items)
    split = data.split()
    rows, scope = _sample(split, part, users, config)
    memory = artifacts.load_memory(catalog)
    removed, notes = _removed(artifacts, catalog, ())
    rank, hidden = memory.ranker(), torch.tensor(removed, dtype=torch.int64)

    def rank_present(histories: list[np.ndarray], top: int) -> Tensor:
        lists = rank(histories, top)
        return lists.masked_fill(torch.isin(lists, hidden), -1)

    first = popularity or _popularity(artifacts, config, split, part=part, rows=rows, scope=scope)
    started = time.monotonic()
    evaluation = evaluate(rank_present, split, part=part, users=rows)
    seconds = {"memory": Manifest.read(artifacts.run.path("memory")).seconds}
    seconds["evaluation"] = round(time.monotonic() - started, 1)
    about = {"model": "memory", "constants": dataclasses.asdict(memory.constants), "stage_seconds": seconds}
    about |= {"notes": [*data.notes, *notes], **config.to_dict()}
    second = _write(
        artifacts, config, f"{data.name}-memory-{scope}", evaluation, about=about, seconds=seconds,
        further={"beside": first.name}, copy=copy,
    )  # fmt: skip
    return [first, second]


def _sample(split: Split, part: str, users: int | None, config: RunConfig) -> tuple[np.ndarray | None, str]:
    """The users to evaluate, None for all, and the end of file names, which differs for a sample."""
    if users is None or users >= len(split.users):
        return None, part
    rows = seeded_sample(split, users, seed=config.seed)
    return rows, f"{part}-{len(rows)}-users"


def _popularity(
    artifacts: RunArtifacts,
    config: RunConfig,
    split: Split,
    *,
    part: str,
    rows: np.ndarray | None,
    scope: str,
) -> Path:
    """Evaluate popularity, without the items that were removed from the run."""
    removed = _removed_rows(artifacts, artifacts.load_data().item_ids)
    found = evaluate(PopularityRanker.fit(split).without(removed), split, part=part, users=rows)
    name = f"{artifacts.load_data().name}-popularity-{scope}"
    return _write(artifacts, config, name, found, about={"model": "popularity"})


def _studies_suffix(studies: Sequence[str], normalize: str | None) -> str:
    """Name the studies in the name of a result file, so that it does not replace that of the evaluation."""
    return "".join(f"-{part}" for part in (*studies, *([normalize] if studies and normalize else [])))


def _removed(
    artifacts: RunArtifacts, catalog: Catalog, studies: Sequence[str], *, quiet: bool = False
) -> tuple[list[int], list[str]]:
    """Return the rows of removed items, and notes on them, which are printed unless ``quiet``."""
    rows = _removed_rows(artifacts, catalog.item_ids)
    if not rows:
        return [], []
    notes = [f"{len(rows)} of {len(catalog)} items are removed: they are not listed and count as misses"]
    if studies:
        notes.append("the studies include the removed items")
    for note in () if quiet else notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return rows, notes


def _removed_rows(artifacts: RunArtifacts, item_ids: Sequence[str | int]) -> list[int]:
    """Return the rows of removed items among ``item_ids``."""
    row_of = {item: row for row, item in enumerate(item_ids)}
    return [row_of[item] for item in artifacts.removed_items() if item in row_of]


def score_mixture(
    artifacts: RunArtifacts,
    config: RunConfig,
    *,
    part: str,
    beams: int,
    weights: str,
    users: int | None = None,
    copy: Path | None = None,
    popularity: Path | None = None,
) -> list[Path]:
    """Evaluate popularity, the item memory alone, and the search by the mixture of a run.

    The result file of the mixture also has the metrics of the memory alone, and the paired difference.

    Args:
        artifacts: The run.
        config: Its settings, which the result files record.
        part: "valid" or "test".
        beams: Beams per user.
        weights: "gate" for weights per history, or "constant".
        users: Evaluate a sample of this size; None means all users.
        copy: Copy the result file of the mixture there as well.
        popularity: The result file of popularity, if it was written before.

    Returns:
        The paths of the result files: popularity, memory, mixture.

    Raises:
        UserError: The run has no memory or no gate.
    """
    gate = artifacts.load_gate()
    paths = score_memory(artifacts, config, part=part, users=users, popularity=popularity)
    alone = read_result(paths[-1])
    data = artifacts.load_data()
    catalog = artifacts.load_catalog().first(data.num_items)
    split = data.split()
    rows, scope = _sample(split, part, users, config)
    removed, notes = _removed(artifacts, catalog, (), quiet=True)
    sources = artifacts.sources(gate, artifacts.load_memory(catalog), items=data.num_items)
    mixture = open_mixture(artifacts, *artifacts.load_generator(), catalog, sources, split)
    started = time.monotonic()
    kept, excluded = (
        evaluate(
            mixture_ranker(
                mixture, gate, beams=beams, constant=weights == "constant", exclude_history=exclude,
                removed=removed,
            ),
            split, part=part, users=rows, max_list=beams,
        )
        for exclude in (False, True)
    )  # fmt: skip
    seconds = {**stage_seconds(artifacts.run), "evaluation": round(time.monotonic() - started, 1)}
    about = {"model": "cemg", "mixture": weights, "engine": "cemg", "beams": beams, "stage_seconds": seconds}
    about |= {
        "experts": ["generator", *gate.sources],
        "gate_fit": gate.fit,
        "notes": [*data.notes, *notes],
        **config.to_dict(),
        **_stopped(artifacts),
    }
    experts = "" if MEMORY in gate.sources else "-without-memory"
    name = f"{data.name}-cemg-{weights}{experts}-{scope}"
    name += "" if beams == config.decoding.beams else f"-{beams}-beams"
    path = _write(
        artifacts, config, name, kept, about=about, excluded=excluded, seconds=seconds,
        copy=copy, further={
            "beside": paths[0].name,
            "compared": _compared(kept, excluded, alone, paths[-1].name, repeats=gate.repeats),
        },
    )  # fmt: skip
    return [*paths, path]


def _compared(
    kept: Evaluation, excluded: Evaluation, memory: Mapping[str, Any], file: str, *, repeats: bool
) -> dict[str, Any]:
    """The metrics of the memory alone, and the paired differences of the mixture to it.

    The memory ranks the same with the history excluded as with it removed from the list. Where users do not
    return to items (``repeats``), it lists no item of the history in the mixture, so it is compared without
    them: else the differences would flatter the mixture.
    """
    ranks = ranks_of(memory)
    pairs = {
        KEPT: (kept.by_user(kept.ranks), ranks[KEPT if repeats else REMOVED]),
        REMOVED: (kept.by_user(kept.ranks_history_removed), ranks[REMOVED]),
        EXCLUDED: (excluded.by_user(excluded.ranks), ranks[REMOVED]),
    }
    differences = {key: paired_differences(*pair) for key, pair in pairs.items()}
    metrics = {key: memory[key] for key in (KEPT, REMOVED)}
    model = "memory" if repeats else "memory without history"
    return {"model": model, "file": file, **metrics, "differences": differences}


def score_file(
    artifacts: RunArtifacts, config: RunConfig, file: Path, *, part: str, copy: Path | None = None
) -> list[Path]:
    """Evaluate popularity and the lists in a file (see ``read_lists``).

    Returns:
        The paths of the result files, that of popularity first.
    """
    data = artifacts.load_data()
    split = data.split()
    catalog = artifacts.load_catalog()
    lists, notes = read_lists(file, data, split, catalog=catalog.item_ids)
    evaluation = evaluate_lists(lists, split, part=part, others=len(catalog))
    first = _popularity(artifacts, config, split, part=part, rows=None, scope=part)
    about = {"model": "recommendations", "file": file.name, "notes": notes}
    if lists.shape[1] < max(CUTOFFS):
        notes = [*notes, f"lists of {lists.shape[1]} items: HR@k and NDCG@k of a larger k cover only these"]
    for note in notes:
        console.print(f"note: {note}")
    stem = file.stem.removesuffix(f"-{part}")
    name = f"{data.name}-recommendations{'' if stem == part else f'-{stem}'}-{part}"
    further = {"beside": first.name}
    second = _write(artifacts, config, name, evaluation, about=about, further=further, copy=copy)
    return [first, second]


def _search(
    artifacts: RunArtifacts,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    catalog: Catalog,
    split: Split,
    *,
    part: str,
    rows: np.ndarray | None,
    beams: int,
    normalize: str,
) -> Search:
    """Build the search of a run, by engine "cemg", for the studies."""
    return Search(
        decoder=Decoder(model, catalog, vocabulary.code_token_start, cast(Normalize, normalize)),
        prompter=artifacts.prompter(model, vocabulary, catalog),
        split=split,
        part=part,
        users=rows,
        beams=beams,
        batch_size=artifacts.config.decoding.batch_size,
    )


def _compare(search: Search) -> dict[str, Any]:
    engine = search.decoder
    reference = TransformersDecoder(engine.model, engine.catalog, engine.tokens, engine.normalize)
    return engine_study(search, reference)


STUDIES: dict[str, Callable[[Search], Any]] = {
    "exact": exact_study, "certificate": certificate_study, "engines": _compare,
}  # fmt: skip


def _write(
    artifacts: RunArtifacts,
    config: RunConfig,
    name: str,
    evaluation: Evaluation,
    *,
    about: dict[str, Any],
    excluded: Evaluation | None = None,
    seconds: dict[str, float] | None = None,
    further: Mapping[str, Any] | None = None,
    copy: Path | None = None,
) -> Path:
    """Write a result file, and a copy of it to ``copy``."""
    path = artifacts.run.folder / "results" / f"{name}.json"
    write_result(
        path,
        dataset=artifacts.load_data().name,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        config=about,
        seed=config.seed,
        hardware=hardware(artifacts.device),
        seconds=sum((seconds or {}).values()),
        evaluation=evaluation,
        excluded=excluded,
        further={**(further or {}), "generator_key": Manifest.read(artifacts.run.path("generator")).key},
    )
    if copy is not None:
        files.copy_file(path, copy)
    return path


def stage_seconds(run: Run) -> dict[str, float]:
    """Return the wall-clock seconds of each finished stage, from its manifest."""
    return {name: manifest.seconds for name, manifest in stages_of(run.folder).items()}
