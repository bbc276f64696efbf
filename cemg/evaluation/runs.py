"""Evaluates a run: popularity, the run's own search, and the studies of it, as result files."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel

from cemg.artifacts import RunArtifacts
from cemg.config import RunConfig
from cemg.data.dataset import Split
from cemg.decoding import Decoder, Normalize, TransformersDecoder
from cemg.evaluation import (
    CUTOFFS,
    Evaluation,
    PopularityRanker,
    evaluate,
    evaluate_lists,
    hardware,
    seeded_sample,
    write_result,
)
from cemg.evaluation.lists import read_lists
from cemg.evaluation.ranker import beam_ranker
from cemg.evaluation.results import EXCLUDED
from cemg.evaluation.search import Search, certificate_study, engine_study, exact_study
from cemg.generator import Vocabulary
from cemg.progress import console
from cemg.storage import files
from cemg.storage.manifest import Manifest, stages_of
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
    """Evaluate popularity and the run; the result files written, popularity's first.

    ``studies`` of the run's search, by their names in the result file: "exact", "certificate", "engines";
    ``normalize`` is theirs alone, in place of the run's own.
    """
    data = artifacts.load_data()
    catalog = artifacts.load_catalog().first(data.num_items)  # without items that were added later
    split = data.split()
    if users is not None and users >= len(split.users):
        users = None  # that is all of them
    rows = None if users is None else seeded_sample(split, users, seed=config.seed)
    model, vocabulary = artifacts.load_generator()
    removed, notes = _removed(artifacts, catalog, studies)
    rank = beam_ranker(artifacts, model, vocabulary, catalog, beams=beams, engine=engine, removed=removed)
    scope = part if rows is None else f"{part}-{len(rows)}-users"  # a sample never replaces the whole
    popular = evaluate(PopularityRanker.fit(split), split, part=part, users=rows)
    first = _write(
        artifacts, config, f"{data.name}-popularity-{scope}", popular, about={"model": "popularity"}
    )
    started = time.monotonic()
    scored = evaluate(rank, split, part=part, users=rows, max_list=beams)
    further: dict[str, Any] = {}
    if engine == "cemg":
        served = beam_ranker(
            artifacts, model, vocabulary, catalog, beams=beams, exclude_history=True, removed=removed
        )
        further[EXCLUDED] = evaluate(served, split, part=part, users=rows, max_list=beams).metrics
    seconds = {**stage_seconds(artifacts.run), "evaluation": round(time.monotonic() - started, 1)}
    about = {"model": "cemg", "engine": engine, "beams": beams, "stage_seconds": seconds}
    about |= {"notes": [*data.notes, *notes], **config.to_dict()}
    if studies:
        own = normalize or config.decoding.normalize
        search = _search(
            artifacts, model, vocabulary, catalog, split, part=part, rows=rows, beams=beams, normalize=own
        )
        further |= {name: STUDIES[name](search) for name in studies} | {"studies_normalize": own}
    own_search = engine == "cemg" and beams == config.decoding.beams
    scope += "" if own_search else f"-{engine}-{beams}-beams"  # nor does another search, or a study
    scope += "".join(f"-{name}" for name in studies) + (f"-{normalize}" if studies and normalize else "")
    further["beside"] = first.name
    second = _write(
        artifacts, config, f"{data.name}-cemg-{scope}", scored, about=about, seconds=seconds, further=further
    )
    if copy is not None:
        files.copy_file(second, copy)
    return [first, second]


def _removed(
    artifacts: RunArtifacts, catalog: Catalog, studies: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Catalog rows that ``cemg-catalog remove`` took out, and notes on them, which are printed too."""
    item_ids: list[int | str] = [*catalog.item_ids]
    row_of = {item: row for row, item in enumerate(item_ids)}
    rows = [row_of[item] for item in artifacts.removed_items() if item in row_of]
    if not rows:
        return [], []
    notes = [f"{len(rows)} of {len(catalog)} items are removed: they are not listed and count as misses"]
    if studies:
        notes.append("the studies search the removed items too")
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return rows, notes


def score_file(
    artifacts: RunArtifacts, config: RunConfig, file: Path, *, part: str, copy: Path | None = None
) -> list[Path]:
    """Evaluate popularity and given lists (see ``read_lists``); the result files written, popularity's
    first."""
    data = artifacts.load_data()
    split = data.split()
    catalog = artifacts.load_catalog()
    lists, notes = read_lists(file, data, split, catalog=catalog.item_ids)
    scored = evaluate_lists(lists, split, part=part, others=len(catalog))
    popular = evaluate(PopularityRanker.fit(split), split, part=part)
    first = _write(
        artifacts, config, f"{data.name}-popularity-{part}", popular, about={"model": "popularity"}
    )
    about = {"model": "recommendations", "file": file.name, "notes": notes}
    if lists.shape[1] < max(CUTOFFS):
        notes = [*notes, f"lists of {lists.shape[1]} items: HR@k and NDCG@k of a larger k count these alone"]
    for note in notes:
        console.print(f"note: {note}")
    stem = file.stem.removesuffix(f"-{part}")
    name = f"{data.name}-recommendations{'' if stem == part else f'-{stem}'}-{part}"
    second = _write(artifacts, config, name, scored, about=about, further={"beside": first.name})
    if copy is not None:
        files.copy_file(second, copy)
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
    """The run's search by our engine, for the studies."""
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
    ours = search.decoder
    return engine_study(search, TransformersDecoder(ours.model, ours.catalog, ours.tokens, ours.normalize))


STUDIES: dict[str, Callable[[Search], Any]] = {
    "exact": exact_study, "certificate": certificate_study, "engines": _compare,
}  # fmt: skip


def _write(
    artifacts: RunArtifacts,
    config: RunConfig,
    name: str,
    scored: Evaluation,
    *,
    about: dict[str, Any],
    seconds: dict[str, float] | None = None,
    further: Mapping[str, Any] | None = None,
) -> Path:
    path = artifacts.run.folder / "results" / f"{name}.json"
    write_result(
        path,
        dataset=artifacts.load_data().name,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        config=about,
        seed=config.seed,
        hardware=hardware(artifacts.device),
        seconds=sum((seconds or {}).values()),
        evaluation=scored,
        further={**(further or {}), "generator_key": Manifest.read(artifacts.run.path("generator")).key},
    )
    return path


def stage_seconds(run: Run) -> dict[str, float]:
    """Wall seconds of each finished stage, from its manifest."""
    return {name: manifest.seconds for name, manifest in stages_of(run.folder).items()}
