"""``cemg-train``: build all stages of a run, resuming where it stopped, then test the model."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cemg.commands import console as command
from cemg.commands.shards import (
    FEATURES,
    FeatureShardOption,
    RayOption,
    load_features,
    read_shard,
    write_features,
)
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
    from cemg.data import Dataset
    from cemg.pipeline import Pipeline

app = command.command_line()
SYNTHETIC = (  # settings small enough for a minute or two on two idle CPU cores
    "pca.dim=64",
    "tokenizer.codebook_size=32", "tokenizer.levels=3", "tokenizer.dim=64", "tokenizer.epochs=200",
    "graph.epochs=60", "graph.batch_size=1024", "backbone.layers=2", "backbone.dim=64", "generator.epochs=30",
    "generator.batch_size=16", "generator.learning_rate=2.0e-3", "generator.validate_every=3",
    "decoding.validation_users=500",
)  # fmt: skip


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-train --run runs/demo",
        "cemg-train --data data/beauty --config beauty --run runs/beauty --set generator.epochs=40",
        "cemg-train --interactions orders.csv --columns user=uid,item=sku,timestamp=ts --preset small "
        "--run runs/shop",
    ),
)
def train(
    run: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The run. In an existing run, finished stages are reused.")
    ] = Path("runs/synthetic"),
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Folder or file in any format of cemg-data. Default: the run's data, or the synthetic set "
            "for a new run.",
        ),
    ] = "",
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    images: ImagesOption = None,
    columns: ColumnsOption = "",
    separator: SeparatorOption = "",
    encoding: EncodingOption = "",
    drop_duplicates: DropDuplicatesOption = False,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Settings for a catalog size: small, medium or large; or paper, for the paper's encoders. "
            "Default without --config: chosen by the number of items.",
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file of settings, applied after --preset; or an included one: beauty, ml-100k, "
            "tiger, letter.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Retrain a finished run with changed settings without asking.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Rebuild damaged stages, and restore a damaged config.yaml.")
    ] = False,
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Change one setting, e.g. --set generator.epochs=10. Repeatable."
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Ablation: leave out collab, image, text or llm. Repeatable. Reset: --set 'without=[]'.",
        ),
    ] = None,
    fast_kernels: Annotated[
        bool | None,
        typer.Option(
            help="Use fast kernels, or plain PyTorch references. Default: fast, unless CEMG_FAST_KERNELS=0.",
            show_default=False,
        ),
    ] = None,
    device: command.DeviceOption = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32 (the default), or bfloat16 for faster mixed precision; without native support "
            "for it, float32 is used.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of all stages. Default: 0.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for cached text and image features; runs can share it."),
    ] = None,
    shard: FeatureShardOption = "",
    join: Annotated[
        bool, typer.Option("--join", help="Train with the features that --shard 1/N to N/N computed.")
    ] = False,
    ray: RayOption = "",
    result: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also copy the result file to this path.")
    ] = None,
    no_test: Annotated[
        bool, typer.Option("--no-test", help="Only train: cemg-eval --run RUN tests the model later.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print which stages would be built or reused, and why."),
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", help="Only print all settings with explanations, as a file for --config."
        ),
    ] = False,
    version: command.VersionOption = False,
) -> None:
    """Train a recommender from raw data, and test it. Without options, train on the synthetic set.

    After an interruption, the same command continues. An existing run keeps its own settings unless --data,
    --config or --preset is given. A finished run is replaced only with --force, or after you confirm.
    """
    from cemg.distributed import World
    from cemg_kernels import use_fast_kernels

    command.check_device(device)
    use_fast_kernels(fast_kernels)
    command.check_result(result)
    if no_test and result is not None:
        raise UserError("--no-test has no result that --result could copy", fix="leave out one of them")
    one_shard = read_shard(shard, join=join, ray=ray, device=device)
    world = World.join(device)
    if not world.main:
        command.set_interrupt_message("")  # the main process prints it
        world.serve()
        return
    from cemg.artifacts import settings_file
    from cemg.pipeline import Pipeline
    from cemg.pipeline.preflight import check_world
    from cemg.settings import config_file, explained
    from cemg.storage.run import Run

    source = one_source(Path(data) if data else None, interactions, option="--data")
    files = {
        "items": items,
        "images": images,
        "columns": columns,
        "separator": separator,
        "encoding": encoding,
    }
    source_settings: dict[str, Any] = {name: str(value) for name, value in files.items() if value}
    source_settings |= {"drop_duplicates": True} if drop_duplicates else {}
    options = {
        "source": source_settings,
        "without": tuple(without) if without else None,
        "dtype": dtype,
        "seed": seed,
        "preset": preset,
    }
    file = config_file(config) if config is not None else None
    overrides = list(set or [])
    with world:
        chosen = _config(
            run, str(source or ""), file, overrides, rebuild=rebuild, only_print=print_config, **options
        )
        if print_config:
            print(explained(chosen), end="")
            return
        known = None
        if file is None and not preset and chosen.data.path and (source or settings_file(run) is None):
            chosen, known = _sized(run, chosen, str(source or ""), overrides, **options)
        if dry_run:
            _print_plan(run, chosen, device=device, data=known)
            return
        folder = Run(run)
        if one_shard:
            pipeline = Pipeline(folder, chosen, device=device, cache=cache, data=known)
            write_features(pipeline.feature_work(), run / FEATURES, shard=one_shard, ray=ray)
            return
        check_world(chosen, world)
        console.print(_kernels(device))
        with folder.locked():
            continued = f"cemg-train --run {quote(str(run))} continues"
            command.set_interrupt_message(f"finished stages and the last checkpoint are kept; {continued}")
            pipeline = Pipeline(folder, chosen, device=device, cache=cache, data=known, world=world)
            if join or ray:
                load_features(pipeline.feature_work(), run / FEATURES, pipeline.cache, ray=ray)
            pipeline.train(agree=None if force else partial(_agree, run), rebuild=rebuild)
            if no_test:
                console.print(f"trained, not tested: cemg-eval --run {quote(str(run))}", soft_wrap=True)
            else:
                _test(pipeline, chosen, copy=result)


def _config(
    run: Path,
    data: str,
    config: Path | None,
    settings: list[str],
    *,
    rebuild: bool,
    only_print: bool,
    **options: Any,
) -> RunConfig:
    """Return the settings that the command names.

    If it names neither data nor settings, an existing run keeps its own, and a new run is the synthetic one.
    ``only_print`` returns the defaults instead of the settings of the synthetic set.
    """
    from cemg.artifacts import settings_file
    from cemg.config import load_config
    from cemg.storage.manifest import CONFIG
    from cemg.storage.run import PENDING

    if data:
        return load_config(config, settings, data_path=data, **options)
    run_file = settings_file(run, rebuild=rebuild)
    if run_file is not None and config is None and not options["preset"]:
        console.print(f"{run} continues with its own settings, {run_file}", highlight=False)
        if run_file.name == PENDING and (run / CONFIG).is_file():
            console.print(f"delete {run_file} to return to the settings in {run / CONFIG}", highlight=False)
        return load_config(run_file, settings, **options)
    if config is None and not options["preset"] and not any(s.startswith("data.path=") for s in settings):
        if only_print:
            return load_config(None, settings, **options)
        _check_spelling(run)
        console.print(f"{run} is new and no --data is given: training on the SYNTHETIC set", highlight=False)
        return load_config(None, [*SYNTHETIC, *settings], **options)
    chosen = load_config(config, settings, **options)
    if run_file is not None and not chosen.data.path:
        return dataclasses.replace(chosen, data=load_config(run_file, source=options["source"]).data)
    return chosen


def _sized(
    run: Path, config: RunConfig, data: str, settings: list[str], **options: Any
) -> tuple[RunConfig, Dataset]:
    """Return the settings with the preset for the number of items, and the data set, which is read for it.

    A run that was trained with exactly these settings before keeps them. A pre-trained model has a size.
    """
    from cemg.artifacts import settings_file
    from cemg.config import load_config
    from cemg.pipeline.changes import settings_changed
    from cemg.pipeline.pipeline import read_source
    from cemg.settings import preset_for

    dataset = read_source(config.data)
    with suppress(UserError):
        own = settings_file(run)
        if own is not None and not settings_changed(load_config(own, of_run=True), config):
            return config, dataset
    if config.backbone.pretrained:
        return config, dataset
    name = preset_for(dataset.num_items)
    console.print(f"{dataset.num_items:,} items: --preset {name}", highlight=False)
    return load_config(None, settings, data_path=data, **(options | {"preset": name})), dataset


def _check_spelling(run: Path) -> None:
    """Raise UserError if a new run without data is named almost like an existing one, probably by a typo."""
    from cemg.storage.run import nearest_run

    nearest = nearest_run(run)
    if nearest is not None:
        raise UserError(
            f"there is no run {run}, and a new run needs --data",
            cause=f"there is a run {nearest}",
            fix=f"cemg-train --run {quote(str(nearest))}; or, for a new run on the synthetic set, "
            f"cemg-train --run {quote(str(run))} --set data.path=",
        )


def _print_plan(run: Path, config: RunConfig, *, device: str, data: Dataset | None) -> None:
    from cemg.pipeline.dry_run import MISSING, REUSED, plan
    from cemg.storage.run import Run

    verdicts = plan(run, config, device=device, data=data)
    for stage, verdict in verdicts.items():
        print(f"{stage:<10} {printable(verdict)}")
    asked = {verdict for stage, verdict in verdicts.items() if stage != "gate"}  # it needs no consent
    if Run(run).finished() and not asked <= {REUSED, MISSING}:
        console.print(f"{run} is already trained: --force is needed to retrain it")


def _agree(run: Path, changes: list[str], damaged: bool) -> None:
    """Ask on a terminal whether the run may be replaced.

    Raises:
        UserError: The answer is no, or there is no terminal to ask on.
    """
    from cemg.pipeline.transition import DISCARDED, REMOVED
    from cemg.storage.run import Run

    shown = [*changes[:12], *([f"and {len(changes) - 12} more"] if len(changes) > 12 else [])]
    interrupted = any(change.startswith(DISCARDED) for change in changes)
    command_line = f"cemg-train --run {quote(str(run))}"
    if damaged:
        problem = f"{run} is damaged"
        forced = " --force" if any(REMOVED in change for change in changes) else ""
        fix = f"restore it from a copy, or rebuild it: {command_line} --rebuild{forced}"
    elif interrupted:
        problem = f"{run} has an interrupted retraining, and this command would discard it"
        fix = f"to continue it: {command_line}; to discard it: repeat your command with --force"
    else:
        state = "trained" if Run(run).finished() else "partly trained"
        problem = f"{run} is already {state}, and this command would retrain it"
        fix = f"to replace it: add --force; to keep it: use another --run, or change nothing: {command_line}"
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        for line in (problem, *(f"  {change}" for change in shown)):
            console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
        if typer.confirm("Rebuild it?" if damaged else "Replace it?", err=True):
            return
    raise UserError(problem, cause="; ".join(shown), fix=fix)


def _kernels(device: str) -> str:
    """Return one line that says how many operations each backend runs."""
    from cemg_kernels import backends

    counts = Counter(choice.backend for choice in backends(device).values())
    summary = ", ".join(f"{backend} {count}" for backend, count in counts.most_common())
    return f"kernels by backend: {summary} (cemg-doctor --device {device} lists them)"


def _test(pipeline: Pipeline, config: RunConfig, *, copy: Path | None) -> None:
    from cemg.commands.summary import print_summary
    from cemg.evaluation.runs import score, score_mixture
    from cemg.report import write_report
    from cemg_kernels.runtime.ranges import named_range

    with named_range("stage: test"):
        beams = config.decoding.beams
        mixes = pipeline.has_gate()
        alone = None if mixes else copy
        paths = score(pipeline, config, part="test", engine="cemg", beams=beams, copy=alone)
        if mixes:
            mixed = score_mixture(pipeline, config, part="test", beams=beams, weights="gate", copy=copy)
            paths += mixed[1:]  # popularity once
    with named_range("stage: report"):
        page = write_report(pipeline.run.folder, device=pipeline.device)
    print_summary(pipeline, paths, page)


def main() -> None:
    """Run ``cemg-train`` on the command line's arguments."""
    command.run(app)


if __name__ == "__main__":  # accelerate launch -m cemg.commands.train
    main()
