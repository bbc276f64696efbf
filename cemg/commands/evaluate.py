"""``cemg-eval``: HR and NDCG of a trained run, history kept and removed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cemg.baselines import PopularityRanker
from cemg.commands import console as command
from cemg.config import RunConfig
from cemg.errors import UserError
from cemg.evaluation import Evaluation, evaluate, hardware, result_table, seeded_sample, write_result
from cemg.pipeline import Pipeline
from cemg.progress import console
from cemg.run import Run

app = typer.Typer(add_completion=False)


@app.command()
def run_evaluation(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    part: Annotated[str, typer.Option(help="test or valid.")] = "test",
    engine: Annotated[str, typer.Option(help="cemg, or transformers, the yardstick.")] = "cemg",
    beams: Annotated[
        int | None, typer.Option(help="Width of the beam search; the run's own if not given.")
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="A seeded sample of so many users; all if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    result: Annotated[Path | None, typer.Option(help="Copy the result file there as well.")] = None,
) -> None:
    """Test a trained run on the whole catalog, next to popularity.

    Example: cemg-eval --run runs/beauty --beams 50
    """
    if part not in ("test", "valid"):
        raise UserError(f"--part must be test or valid, got {part!r}")
    pipeline = Pipeline.open(run, device=device)
    config = pipeline.config
    paths = score(
        pipeline,
        config,
        part=part,
        engine=engine,
        beams=beams or config.decoding.beams,
        users=users,
        copy=result,
    )
    console.print(result_table(paths))


def score(
    pipeline: Pipeline,
    config: RunConfig,
    *,
    part: str,
    engine: str,
    beams: int,
    users: int | None = None,
    copy: Path | None = None,
) -> list[Path]:
    """Evaluate popularity and the run; the result files written, popularity's first."""
    data = pipeline.load_data()
    catalog = pipeline.load_catalog().first(data.num_items)  # without items that were added later
    split = data.split()
    rows = None if users is None else seeded_sample(split, users, seed=config.seed)
    model, vocabulary = pipeline.load_generator()
    rank = pipeline.ranker(model, vocabulary, catalog, beams=beams, engine=engine)
    popular = evaluate(PopularityRanker.fit(split), split, part=part, users=rows)
    first = _write(pipeline, config, f"{data.name}-popularity-{part}", popular, about={"model": "popularity"})
    started = time.monotonic()
    scored = evaluate(rank, split, part=part, users=rows, max_list=beams)
    seconds = {**stage_seconds(pipeline.run), "evaluation": round(time.monotonic() - started, 1)}
    about = {"model": "cemg", "engine": engine, "beams": beams, "stage_seconds": seconds, "notes": data.notes}
    about |= config.to_dict()
    second = _write(pipeline, config, f"{data.name}-cemg-{part}", scored, about=about, seconds=seconds)
    if copy is not None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(second, copy)
    return [first, second]


def _write(
    pipeline: Pipeline,
    config: RunConfig,
    name: str,
    scored: Evaluation,
    *,
    about: dict[str, Any],
    seconds: dict[str, float] | None = None,
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
    )
    return path


def stage_seconds(run: Run) -> dict[str, float]:
    """Wall seconds of each finished stage, from its manifest."""
    manifests = {p.parent.name: json.loads(p.read_text()) for p in sorted(run.folder.glob("*/manifest.json"))}
    return {name: manifest["seconds"] for name, manifest in manifests.items() if "seconds" in manifest}


def main() -> None:
    """Entry point of ``cemg-eval``."""
    command.run(app)
