"""``cemg-train``: all stages of a run, resumable, then the test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from cemg.commands import console as command
from cemg.commands.evaluate import score
from cemg.config import RunConfig, load_config
from cemg.evaluation import result_table
from cemg.pipeline import Pipeline
from cemg.progress import console
from cemg.report import write_report
from cemg.run import Run
from cemg_kernels import backends, use_fast_kernels

app = typer.Typer(add_completion=False)
SYNTHETIC = (  # small enough for two CPU cores and a few minutes; encoders that the package index has
    "text.model=minilm", "text.pooling=mean", "image.backbone=efficientnet-lite0", "pca.dim=64",
    "tokenizer.codebook_size=32", "tokenizer.levels=3", "tokenizer.dim=64", "tokenizer.epochs=200",
    "graph.epochs=60", "graph.batch_size=1024", "backbone.layers=2", "backbone.dim=64", "generator.epochs=30",
    "generator.batch_size=16", "generator.learning_rate=2.0e-3", "generator.validate_every=3",
    "decoding.validation_users=500",
)  # fmt: skip


@app.command()
def train(
    run: Annotated[Path, typer.Option(help="Folder of the run; the same folder resumes or reuses.")] = Path(
        "runs/synthetic"
    ),
    data: Annotated[
        str, typer.Option(help="Folder or file that cemg-data reads. None: the synthetic set.")
    ] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file with the settings of the stages.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="One setting, e.g. --set generator.epochs=10; repeatable.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Ablation: collab, image, text or llm; repeatable.")
    ] = None,
    fast_kernels: Annotated[
        bool, typer.Option(help="Fast backends, or the plain PyTorch references.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (mixed precision).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every stage.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached features; runs may share one.")] = None,
    result: Annotated[Path | None, typer.Option(help="Copy the result file there as well.")] = None,
) -> None:
    """Train CEMG from raw data to a tested generator; without arguments on the synthetic set.

    Example: cemg-train --data data/beauty --run runs/beauty --set generator.epochs=40
    """
    command.check_device(device)
    use_fast_kernels(fast_kernels)
    for op, choice in backends(device).items():
        console.print(f"{op}: {choice.backend} ({choice.why})", highlight=False)
    settings = _settings(data, config, list(set or []))
    top = {"without": tuple(without) if without else None, "dtype": dtype, "seed": seed}
    chosen = load_config(config, settings, **top)
    folder = Run(run)
    with folder.locked():
        (run / "config.yaml").write_text(yaml.safe_dump(chosen.to_dict(), sort_keys=False))
        pipeline = Pipeline(folder, chosen, device=device, cache=cache)
        pipeline.train()
        _test(pipeline, chosen, copy=result)


def _settings(data: str, config: Path | None, settings: list[str]) -> list[str]:
    if data:
        return [f"data.path={data}", *settings]
    named = config is not None or any(s.startswith("data.path=") for s in settings)
    return settings if named else [*SYNTHETIC, *settings]


def _test(pipeline: Pipeline, config: RunConfig, *, copy: Path | None) -> None:
    paths = score(pipeline, config, part="test", engine="cemg", beams=config.decoding.beams, copy=copy)
    write_report(pipeline.run.folder)
    console.print(f"report: {pipeline.run.folder / 'report'}", highlight=False)
    console.print(result_table(paths))


def main() -> None:
    """Entry point of ``cemg-train``."""
    command.run(app)
