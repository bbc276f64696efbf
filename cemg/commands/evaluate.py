"""``cemg-eval``: HR and NDCG of a trained run, history kept and removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cemg import progress
from cemg.commands import console as command
from cemg.errors import UserError

app = command.command_line()
STUDY_USERS = 1000  # whom a study examines unless told


@app.command(cls=command.Command)
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
    recommendations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Evaluate these lists instead: a Parquet or CSV table with columns user, item and rank.",
        ),
    ] = None,
    result: Annotated[Path | None, typer.Option(help="Copy the result file there as well.")] = None,
    no_verify: command.NoVerifyOption = False,
    version: command.VersionOption = False,
) -> None:
    """Test a trained run on the whole catalog, next to popularity.

    Studies of our own search, on 1,000 seeded users: --exact, --certified and --compare, a table each.

    Example: cemg-eval --run runs/beauty --beams 50
    """
    from cemg.evaluation import CUTOFFS, read_result, result_table
    from cemg.evaluation.search_tables import search_tables
    from cemg.pipeline import Pipeline
    from cemg.scoring import score, score_file

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
    if recommendations is not None and (exact or certified or compare or users is not None):
        raise UserError("--recommendations does not go with --users, --exact, --certified or --compare")
    pipeline = Pipeline.open(run, device=device, verify=not no_verify)
    config = pipeline.config
    if recommendations is not None:
        paths = score_file(pipeline, config, recommendations, part=part, copy=result)
        progress.plain_console().print(result_table(paths))
        return
    command.warn_of_normalize(config, normalize)
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
    for table in (result_table(paths), *search_tables(read_result(paths[-1]))):
        out.print(table)


def main() -> None:
    """Entry point of ``cemg-eval``."""
    command.run(app)
