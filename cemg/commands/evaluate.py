"""``cemg-eval``: HR and NDCG of a trained run, and studies of the beam search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cemg import progress
from cemg.commands import console as command
from cemg.errors import UserError

app = command.command_line()
STUDY_USERS = 1000  # default number of users of a study


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-eval --run runs/beauty",
        "cemg-eval --run runs/beauty --exact --certified --compare --users 500",
        "cemg-eval --run runs/beauty --recommendations lists.parquet",
    ),
)
def run_evaluation(
    run: command.RunOption,
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help="Ranker: cemg (the generator), or memory (the item memory alone)."),
    ] = "cemg",
    part: Annotated[
        str, typer.Option(metavar="PART", help="Held-out items to predict: test or valid.")
    ] = "test",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Mix the item memory into the search: off, constant (one weight), or gate (a weight per "
            "history). Default: the generator alone and, if the run has one, the gate.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Decoder: cemg, vllm, transformers (slow, for comparison), or free (without the trie: beams "
            "that are not an item are dropped).",
        ),
    ] = "cemg",
    beams: Annotated[int | None, typer.Option(help="Number of beams. Default: the run's setting.")] = None,
    users: Annotated[
        int | None,
        typer.Option(help="Evaluate this many randomly drawn users. Default: all, or 1000 for a study."),
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Evaluate all users, also in a study.")] = False,
    exact: Annotated[
        bool,
        typer.Option(
            help="Study: score every item; print exact metrics and how far the beam lists are off.",
            show_default=False,
        ),
    ] = False,
    certified: Annotated[
        bool,
        typer.Option(
            help="Study: share of results proven to be the best with 10, 20, 50 and 100 beams.",
            show_default=False,
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            help="Study: compare lists, scores and speed with transformers on the same users.",
            show_default=False,
        ),
    ] = False,
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Codes in the log-softmax of a study: vocab, level or valid. Default: the run's setting.",
        ),
    ] = None,
    device: command.DeviceOption = "cpu",
    recommendations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Evaluate the lists in this file: a Parquet or CSV table with the columns user, item and "
            "rank.",
        ),
    ] = None,
    result: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also copy the result file to this path.")
    ] = None,
    no_verify: command.NoVerifyOption = False,
    version: command.VersionOption = False,
) -> None:
    """Compute HR and NDCG of a trained run over the whole catalog, beside a popularity baseline.

    The studies --exact, --certified and --compare examine the beam search on 1,000 randomly drawn users and
    print one table each.
    """
    from cemg.artifacts import RunArtifacts
    from cemg.evaluation import CUTOFFS, read_result, result_table
    from cemg.evaluation.runs import score, score_file, score_memory, score_mixture
    from cemg.evaluation.search_tables import search_tables

    requested = {"exact": exact, "certificate": certified, "engines": compare}
    studies = [name for name, is_requested in requested.items() if is_requested]
    _check_options(
        part=part, everyone=everyone, users=users, beams=beams, normalize=normalize,
        recommendations=recommendations, studies=studies,
    )  # fmt: skip
    _check_model(model, engine=engine, beams=beams, recommendations=recommendations, studies=studies)
    _check_memory(memory, model=model, engine=engine, recommendations=recommendations, studies=studies)
    command.check_result(result)
    command.check_device(device)
    artifacts = RunArtifacts.open(run, device=device, verify=not no_verify)
    config, out = artifacts.config, progress.plain_console()
    if recommendations is not None:
        progress.print_table(
            result_table(score_file(artifacts, config, recommendations, part=part, copy=result)), out
        )
        return
    if model == "memory":
        progress.print_table(
            result_table(score_memory(artifacts, config, part=part, users=users, copy=result)), out
        )
        return
    command.warn_of_normalize(config, normalize)
    width = config.decoding.beams if beams is None else beams
    mixes = memory in ("constant", "gate")
    paths = []
    if not mixes:
        paths = score(
            artifacts,
            config,
            part=part,
            engine=engine,
            beams=width,
            users=STUDY_USERS if studies and users is None and not everyone else users,
            copy=result,
            studies=studies,
            normalize=normalize,
        )
    if mixes or (memory is None and engine == "cemg" and not studies and artifacts.has_gate()):
        mixed = score_mixture(
            artifacts, config, part=part, beams=width, weights=memory or "gate", users=users, copy=result,
            popularity=paths[0] if paths else None,
        )  # fmt: skip
        paths = [*paths, *mixed[1:]] if paths else mixed
    if width < max(CUTOFFS):
        progress.console.print(
            f"each list has {width} items, so HR@k and NDCG@k with a larger k count only these"
        )
    for table in (result_table(paths), *(search_tables(read_result(paths[-1])) if studies else ())):
        progress.print_table(table, out)


def _check_options(
    *, part: str, everyone: bool, users: int | None, beams: int | None, normalize: str | None,
    recommendations: Path | None, studies: list[str],
) -> None:  # fmt: skip
    """Raise UserError for an invalid value, and for options that exclude each other."""
    if part not in ("test", "valid"):
        raise UserError(f"--part must be test or valid, got {part!r}")
    command.check_normalize(normalize)
    if everyone and users is not None:
        raise UserError("--all and --users exclude each other", fix="leave one of them out")
    for name, count in (("users", users), ("beams", beams)):
        if count is not None and count < 1:
            raise UserError(f"--{name} must be at least 1, got {count}")
    if normalize is not None and not studies:
        raise UserError(
            f"--normalize {normalize} applies to the studies only, and no study is selected",
            fix="add --exact, --certified or --compare",
        )
    if recommendations is not None and (studies or users is not None):
        raise UserError(
            "--recommendations cannot be combined with --users, --exact, --certified or --compare",
            fix="leave these options out",
        )


def _check_memory(
    memory: str | None, *, model: str, engine: str, recommendations: Path | None, studies: list[str]
) -> None:
    """Raise UserError for unknown weights of the memory, and for options without a mixture."""
    command.check_memory(memory)
    if memory in ("constant", "gate") and (
        engine != "cemg" or model != "cemg" or recommendations is not None or studies
    ):
        raise UserError(
            f"--memory {memory} cannot be combined with --engine, --model, --recommendations, --exact, "
            "--certified or --compare",
            fix="leave these options out",
        )


def _check_model(
    model: str, *, engine: str, beams: int | None, recommendations: Path | None, studies: list[str]
) -> None:
    """Raise UserError for an unknown ranker, and for options of the search beside another ranker."""
    if model not in ("cemg", "memory"):
        raise UserError(f"unknown model {model!r}", fix="use --model cemg or --model memory")
    if model == "memory" and (engine != "cemg" or beams is not None or recommendations or studies):
        raise UserError(
            "--model memory cannot be combined with --engine, --beams, --recommendations, --exact, "
            "--certified or --compare",
            cause="the memory ranks without a search", fix="leave these options out",
        )  # fmt: skip


def main() -> None:
    """Run ``cemg-eval`` on the command line's arguments."""
    command.run(app)
