"""Verified access to the files of a run, and how a report says that one of them is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from cemg.data import Dataset
from cemg.errors import DamagedError, UserError
from cemg.evaluation import results_of
from cemg.report.blocks import Block, Text
from cemg.storage.manifest import Manifest, check_origin, verify
from cemg.tokenizer import Catalog, read_items


def manifest_of(run: Path, stage: str) -> Manifest:
    """The manifest of a stage. Raises DamagedError where it is missing, altered or of other inputs."""
    if not (run / stage).is_dir():
        raise DamagedError(f"{run / stage} is missing")
    manifest = Manifest.read(run / stage)
    changed = check_origin(lambda name: run / name, manifest)
    if changed is not None:
        raise DamagedError(f"{run / stage} was not made from the {changed} that is there now")
    return manifest


def file_of(run: Path, stage: str, name: str) -> Path:
    """The path of a file of a finished stage, verified against the manifest."""
    manifest_of(run, stage)
    verify(run / stage, (name,))
    return run / stage / name


def items_of(run: Path) -> dict[str, Tensor]:
    """The tokenizer's tensors of every item: codes, z, attention, present."""
    return read_items(file_of(run, "tokenizer", "items.safetensors"))


def catalog_of(run: Path) -> Catalog:
    """The catalog of a run."""
    for name in Catalog.FILES:
        file_of(run, "catalog", name)
    return Catalog.load(run / "catalog")


def dataset_of(run: Path) -> Dataset:
    """The data that a run was trained on."""
    for name in Dataset.FILES:
        file_of(run, "data", name)
    return Dataset.load(run / "data")


def test_results(run: Path) -> tuple[list[Path], list[str]]:
    """The result files of this generator's test, and what is wrong with other files among them."""
    key = Manifest.read(run / "generator").key if (run / "generator").exists() else ""
    return results_of(run / "results", "*-test.json", generator=key)


def left_out(run: Path, reason: str) -> Text:
    """The line of a report that says why something is not in it, without the run's own path."""
    return Text("Left out: " + " ".join(reason.replace(str(run), "RUN").split()).removesuffix(".") + ".")


def or_left_out(build: Callable[[Path], list[Block]], run: Path) -> list[Block]:
    """The blocks of ``build(run)``, or why they cannot be made: a report does not fail a training."""
    try:
        return build(run)
    except UserError as error:
        return [left_out(run, str(error))]
