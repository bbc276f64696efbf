"""``cemg-eval``: HR and NDCG of a trained run, history kept and removed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from transformers import PreTrainedModel

from cemg import progress
from cemg.baselines import PopularityRanker
from cemg.commands import console as command
from cemg.config import RunConfig
from cemg.data.dataset import Split
from cemg.decoding import Decoder, Normalize, TransformersDecoder
from cemg.errors import UserError
from cemg.evaluation import CUTOFFS, Evaluation, evaluate, hardware, result_table, seeded_sample, write_result
from cemg.evaluation.search import Search, certificate_study, engine_study, exact_study
from cemg.evaluation.search_tables import search_tables
from cemg.generator import Vocabulary
from cemg.pipeline import Pipeline
from cemg.run import Run
from cemg.tokenizer import Catalog

app = typer.Typer(add_completion=False)
STUDY_USERS = 1000  # whom a study examines unless told


@app.command()
def run_evaluation(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    part: Annotated[str, typer.Option(help="test or valid.")] = "test",
    engine: Annotated[str, typer.Option(help="cemg; transformers, the yardstick; or vllm.")] = "cemg",
    beams: Annotated[
        int | None, typer.Option(help="Width of the beam search; the run's own if not given.")
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="A seeded sample of so many users; all, or 1000 for a study.")
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All users, for a study too.")] = False,
    exact: Annotated[bool, typer.Option(help="Score all items: exact metrics, the beam's error.")] = False,
    certified: Annotated[bool, typer.Option(help="The share proven with 10, 20, 50, 100 beams.")] = False,
    compare: Annotated[bool, typer.Option(help="Both engines on the same users, timed.")] = False,
    normalize: Annotated[
        str | None, typer.Option(help="vocab, level or valid, for the studies; the run's own if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    result: Annotated[Path | None, typer.Option(help="Copy the result file there as well.")] = None,
) -> None:
    """Test a trained run on the whole catalog, next to popularity.

    Studies of our own search, on 1,000 seeded users: --exact, --certified and --compare, a table each.

    Example: cemg-eval --run runs/beauty --beams 50
    """
    if part not in ("test", "valid"):
        raise UserError(f"--part must be test or valid, got {part!r}")
    command.check_normalize(normalize)
    if everyone and users is not None:
        raise UserError("--all and --users exclude each other", fix="leave one out")
    for name, count in (("users", users), ("beams", beams)):
        if count is not None and count < 1:
            raise UserError(f"--{name} must be at least 1, got {count}")
    if normalize is not None and not (exact or certified or compare):
        raise UserError(
            f"--normalize {normalize} is for the studies, and none is asked for",
            fix="add --exact, --certified or --compare",
        )
    command.check_result(result)
    command.check_device(device)
    pipeline = Pipeline.open(run, device=device)
    config = pipeline.config
    width = config.decoding.beams if beams is None else beams
    wanted = {"exact": exact, "certificate": certified, "engines": compare}
    studies = [name for name, asked in wanted.items() if asked]
    paths = score(
        pipeline,
        config,
        part=part,
        engine=engine,
        beams=width,
        users=STUDY_USERS if studies and users is None and not everyone else users,
        copy=result,
        studies=studies,
        normalize=normalize,
    )
    out = progress.plain_console()
    if width < max(CUTOFFS):
        progress.console.print(f"lists of {width} items: HR@k and NDCG@k of a larger k count these alone")
    for table in (result_table(paths), *search_tables(json.loads(paths[-1].read_text()))):
        out.print(table)


def score(
    pipeline: Pipeline,
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
    data = pipeline.load_data()
    catalog = pipeline.load_catalog().first(data.num_items)  # without items that were added later
    split = data.split()
    if users is not None and users >= len(split.users):
        users = None  # that is all of them
    rows = None if users is None else seeded_sample(split, users, seed=config.seed)
    model, vocabulary = pipeline.load_generator()
    rank = pipeline.ranker(model, vocabulary, catalog, beams=beams, engine=engine)
    scope = part if rows is None else f"{part}-{len(rows)}-users"  # a sample never replaces the whole
    popular = evaluate(PopularityRanker.fit(split), split, part=part, users=rows)
    first = _write(
        pipeline, config, f"{data.name}-popularity-{scope}", popular, about={"model": "popularity"}
    )
    started = time.monotonic()
    scored = evaluate(rank, split, part=part, users=rows, max_list=beams)
    seconds = {**stage_seconds(pipeline.run), "evaluation": round(time.monotonic() - started, 1)}
    about = {"model": "cemg", "engine": engine, "beams": beams, "stage_seconds": seconds, "notes": data.notes}
    about |= config.to_dict()
    further: dict[str, Any] = {}
    if studies:
        own = normalize or config.decoding.normalize
        search = _search(
            pipeline, model, vocabulary, catalog, split, part=part, rows=rows, beams=beams, normalize=own
        )
        further = {name: STUDIES[name](search) for name in studies} | {"studies_normalize": own}
    own_search = engine == "cemg" and beams == config.decoding.beams
    scope += "" if own_search else f"-{engine}-{beams}-beams"  # nor does another search, or a study
    scope += "".join(f"-{name}" for name in studies) + (f"-{normalize}" if studies and normalize else "")
    second = _write(
        pipeline, config, f"{data.name}-cemg-{scope}", scored, about=about, seconds=seconds, further=further
    )
    if copy is not None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(second, copy)
    return [first, second]


def _search(
    pipeline: Pipeline,
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
        prompter=pipeline.prompter(model, vocabulary, catalog),
        split=split,
        part=part,
        users=rows,
        beams=beams,
        batch_size=pipeline.config.decoding.batch_size,
    )


def _compare(search: Search) -> dict[str, Any]:
    ours = search.decoder
    return engine_study(
        search, TransformersDecoder(ours.model, ours.catalog, ours.code_token_start, ours.normalize)
    )


STUDIES: dict[str, Callable[[Search], Any]] = {
    "exact": exact_study, "certificate": certificate_study, "engines": _compare,
}  # fmt: skip


def _write(
    pipeline: Pipeline,
    config: RunConfig,
    name: str,
    scored: Evaluation,
    *,
    about: dict[str, Any],
    seconds: dict[str, float] | None = None,
    further: Mapping[str, Any] | None = None,
) -> Path:
    path = pipeline.run.folder / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(
        path,
        dataset=pipeline.load_data().name,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        config=about,
        seed=config.seed,
        hardware=hardware(pipeline.device),
        seconds=sum((seconds or {}).values()),
        evaluation=scored,
        further=further or {},
    )
    return path


def stage_seconds(run: Run) -> dict[str, float]:
    """Wall seconds of each finished stage, from its manifest."""
    manifests = {p.parent.name: json.loads(p.read_text()) for p in sorted(run.folder.glob("*/manifest.json"))}
    return {name: manifest["seconds"] for name, manifest in manifests.items() if "seconds" in manifest}


def main() -> None:
    """Entry point of ``cemg-eval``."""
    command.run(app)
