"""``cemg-train``: all stages of a run, resumable, then the test."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cemg.commands import console as command
from cemg.commands.sources import (
    ColumnsOption,
    DropDuplicatesOption,
    EncodingOption,
    ImagesOption,
    InteractionsOption,
    ItemsOption,
    SeparatorOption,
    one_source,
)
from cemg.errors import UserError
from cemg.progress import console, printable

if TYPE_CHECKING:
    from cemg.config import RunConfig
    from cemg.pipeline import Pipeline

app = command.command_line()
SYNTHETIC = (  # small enough for two CPU cores and a few minutes
    "pca.dim=64",
    "tokenizer.codebook_size=32", "tokenizer.levels=3", "tokenizer.dim=64", "tokenizer.epochs=200",
    "graph.epochs=60", "graph.batch_size=1024", "backbone.layers=2", "backbone.dim=64", "generator.epochs=30",
    "generator.batch_size=16", "generator.learning_rate=2.0e-3", "generator.validate_every=3",
    "decoding.validation_users=500",
)  # fmt: skip


@app.command(cls=command.Command)
def train(
    run: Annotated[Path, typer.Option(help="Folder of the run; the same folder resumes or reuses.")] = Path(
        "runs/synthetic"
    ),
    data: Annotated[
        str,
        typer.Option(help="Folder or file that cemg-data reads. None: the run's own, or the synthetic set."),
    ] = "",
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    images: ImagesOption = None,
    columns: ColumnsOption = "",
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    drop_duplicates: DropDuplicatesOption = False,
    preset: Annotated[
        str, typer.Option(help="Settings for a catalog size: small, medium or large; paper: its encoders.")
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with settings, which replace those of the preset; or beauty, ml-100k."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what a finished run was trained with, without asking.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build damaged stages again, and restore damaged settings.")
    ] = False,
    set: Annotated[
        list[str] | None, typer.Option(help="One setting, e.g. --set generator.epochs=10; repeatable.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Ablation: collab, image, text or llm; repeatable. --set 'without=[]' ends it."),
    ] = None,
    fast_kernels: Annotated[
        bool | None,
        typer.Option(
            help="Fast backends, or the plain PyTorch references. Default: $CEMG_FAST_KERNELS, else fast.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, or bfloat16 (mixed precision).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every stage.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached features; runs may share one.")] = None,
    result: Annotated[Path | None, typer.Option(help="Copy the result file there as well.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which stages would be built or reused, and why.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings, explained, as a --config file.")
    ] = False,
    version: command.VersionOption = False,
) -> None:
    """Train CEMG from raw data to a tested generator; without arguments on the synthetic set.

    An existing run continues with its own settings where neither --data nor --config is given. What a
    finished run was trained with is replaced only with --force, or where you agree.

    Example: cemg-train --data data/beauty --run runs/beauty --set generator.epochs=40
    """
    from cemg.pipeline import Pipeline
    from cemg.run import Run
    from cemg.settings import config_file, explained
    from cemg_kernels import use_fast_kernels

    command.check_device(device)
    use_fast_kernels(fast_kernels)
    command.check_result(result)
    source = one_source(Path(data) if data else None, interactions, option="--data")
    files = {
        "items": items,
        "images": images,
        "columns": columns,
        "separator": separator,
        "encoding": encoding,
    }
    written: dict[str, Any] = {name: str(value) for name, value in files.items() if value}
    written |= {"drop_duplicates": True} if drop_duplicates else {}
    data = str(source) if source else ""
    top = {
        "source": written,
        "without": tuple(without) if without else None,
        "dtype": dtype,
        "seed": seed,
        "preset": preset,
    }
    config = config_file(config) if config is not None else None
    chosen = _config(run, data, config, list(set or []), rebuild=rebuild, **top)
    if print_config:
        print(explained(chosen), end="")
        return
    if dry_run:
        _print_plan(run, chosen, device=device)
        return
    console.print(_kernels(device))
    folder = Run(run)
    with folder.locked():
        command.say_if_interrupted(
            f"finished stages and the last checkpoint are kept; cemg-train --run {quote(str(run))} continues"
        )
        pipeline = Pipeline(folder, chosen, device=device, cache=cache)
        pipeline.train(agree=None if force else partial(_agree, run), rebuild=rebuild)
        _test(pipeline, chosen, copy=result)


def _config(
    run: Path, data: str, config: Path | None, settings: list[str], *, rebuild: bool, **top: Any
) -> RunConfig:
    """What the command names; where it names no data, the run's own; the synthetic set for a new run."""
    from cemg.config import load_config
    from cemg.manifest import CONFIG
    from cemg.run import PENDING
    from cemg.transition import settings_file

    if data:
        return load_config(config, settings, data_path=data, **top)
    own = settings_file(run, rebuild=rebuild)
    if own is not None and config is None and not top["preset"]:
        console.print(f"{run} continues with its own settings, {own}", highlight=False)
        if own.name == PENDING and (run / CONFIG).is_file():
            console.print(f"delete {own} to go back to those of {run / CONFIG}", highlight=False)
        return load_config(own, settings, **top)
    if config is None and not top["preset"] and not any(s.startswith("data.path=") for s in settings):
        _check_spelling(run)
        console.print(f"{run} is new and no --data is given: training on the SYNTHETIC set", highlight=False)
        return load_config(None, [*SYNTHETIC, *settings], **top)
    chosen = load_config(config, settings, **top)
    if own is not None and not chosen.data.path:
        return dataclasses.replace(chosen, data=load_config(own, source=top["source"]).data)
    return chosen


def _check_spelling(run: Path) -> None:
    """UserError for a new run without data whose name is nearly that of an existing one: a typo, perhaps."""
    from cemg.run import nearest_run

    near = nearest_run(run)
    if near is not None:
        raise UserError(
            f"there is no run {run}, and no --data is given for a new one",
            cause=f"there is {near}",
            fix=f"cemg-train --run {near}; for the synthetic set in a new run: --set data.path=",
        )


def _print_plan(run: Path, config: RunConfig, *, device: str) -> None:
    from cemg.plan import REUSED, plan
    from cemg.run import Run

    verdicts = plan(run, config, device=device)
    for stage, verdict in verdicts.items():
        print(f"{stage:<10} {printable(verdict)}")
    if Run(run).finished() and {*verdicts.values()} != {REUSED}:
        console.print(f"{run} is trained: to replace what it holds needs --force")


def _agree(run: Path, changes: list[str], damaged: bool) -> None:
    """Ask on a terminal whether what a run holds may be replaced. UserError if not, or without one."""
    from cemg.run import Run
    from cemg.transition import DISCARDED, REMOVED

    shown = [*changes[:12], *([f"and {len(changes) - 12} more"] if len(changes) > 12 else [])]
    trained = "is trained" if Run(run).finished() else "is partly trained"
    what = f"{run} is damaged" if damaged else f"{run} {trained}, and this would train it anew"
    interrupted = any(change.startswith(DISCARDED) for change in changes)
    if interrupted:
        what = f"{run} has an interrupted retraining, and this would discard it"
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        for line in (what, *(f"  {change}" for change in shown)):
            console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
        if typer.confirm("Build it again?" if damaged else "Replace it?", err=True):
            return
    fix = f"--force replaces it; another --run keeps it; without a change: cemg-train --run {quote(str(run))}"
    if interrupted:
        fix = f"continue it: cemg-train --run {quote(str(run))}; discard it: the same command with --force"
    if damaged:
        forced = " --force" if any(REMOVED in change for change in changes) else ""
        fix = (
            f"restore it from a copy, or build it again: cemg-train --run {quote(str(run))} --rebuild{forced}"
        )
    raise UserError(what, cause="; ".join(shown), fix=fix)


def _kernels(device: str) -> str:
    """How many operations run on which backend, in one line."""
    from cemg_kernels import backends

    counts = Counter(choice.backend for choice in backends(device).values())
    named = ", ".join(f"{backend} {count}" for backend, count in counts.most_common())
    return f"kernels by backend: {named} (cemg-doctor --device {device} lists them)"


def _test(pipeline: Pipeline, config: RunConfig, *, copy: Path | None) -> None:
    from cemg.commands.ending import say_result
    from cemg.report import write_report
    from cemg.scoring import score
    from cemg_kernels.runtime.ranges import named_range

    with named_range("stage: test"):
        paths = score(pipeline, config, part="test", engine="cemg", beams=config.decoding.beams, copy=copy)
    with named_range("stage: report"):
        write_report(pipeline.run.folder)
    say_result(pipeline, paths)


def main() -> None:
    """Entry point of ``cemg-train``."""
    command.run(app)
