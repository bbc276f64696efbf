"""A finished run: its settings and stages, read and verified. Nothing here trains.

A run is a folder of stages (data, features, graph, tokenizer, catalog, generator) that ``cemg-train`` wrote.
"""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from cemg.config import RunConfig, config_text, generator_of, load_config
from cemg.data import Dataset
from cemg.errors import DamagedError, UserError
from cemg.generator import Prompter, Vocabulary, build_backbone, load_weights
from cemg.progress import console
from cemg.storage import files
from cemg.storage.manifest import CONFIG, STAGES, Manifest, check_origin, remedy, stages_of, verify
from cemg.storage.read import read_json, read_tensors
from cemg.storage.removed import read_removed
from cemg.storage.run import PENDING, Run
from cemg.tokenizer import CONTENT, MODALITIES, Catalog, Tokenizer

ADDED_TITLES = "added_titles.json"  # in the catalog's folder, by item id


class RunArtifacts:
    """What the stages of a run hold, read on demand and compared with the hashes in their manifests."""

    def __init__(self, run: Run, config: RunConfig, *, device: str = "cpu", verify: bool = True) -> None:
        self.run, self.config, self.device, self.verify = run, config.seeded(), device, verify
        self.opened: dict[str, tuple[str, str | None]] = {}  # key and contents of each stage when opened
        if torch.device(device).type == "cuda" and torch.device(device).index is not None:
            torch.cuda.set_device(device)  # kernels, and accelerate, take the current one

    @classmethod
    def open(cls, folder: Path, *, device: str = "cpu", verify: bool = True) -> Self:
        """The artifacts of a finished run, with the configuration that made it.

        Each file is compared with its hash where it is opened; ``verify`` False reads it as it is.
        Raises UserError where the run is not finished, and where its parts are damaged or of other runs.
        """
        run = Run.existing(folder)
        if not run.finished():
            settings_file(folder)  # raises DamagedError if the settings are damaged
            raise UserError(
                f"the training of {folder} has not ended", fix=f"cemg-train --run {quote(str(folder))}"
            )
        opened = _stages(folder) if verify else {}
        path = run.path(CONFIG)
        config, generator = own_settings(run), generator_of(path)
        if verify:
            run.check_whole()
            if generator not in (None, Manifest.read(run.path("generator")).key):
                cause = f"{path} names another generator than {run.path('generator')}"
                fix = remedy(run.path("generator"))
                raise DamagedError(f"{path} belongs to another run", cause=cause, fix=fix)
        artifacts = cls(run, config, device=device, verify=verify)
        artifacts.opened = opened
        artifacts.check_unchanged()
        return artifacts

    def check_unchanged(self) -> None:
        """UserError where a training has replaced a stage since the run was opened: what is read now does
        not belong to what was read before. Items that were added to the catalog change nothing."""
        if self.opened and _stages(self.run.folder) != self.opened:
            raise UserError(
                f"{self.run.folder} was trained anew while it was opened",
                cause="what was read before belongs to other stages",
                fix="open it again",
            )

    def file(self, stage: str, name: str) -> Path:
        """The path of a file of a finished stage, verified unless ``verify`` is False.

        Raises DamagedError where the file, or the stage's manifest, is missing or not what was written.
        """
        folder = self.run.path(stage)
        if self.verify:
            verify(folder, (name,))
        return folder / name

    def has_file(self, stage: str, name: str) -> bool:
        """Whether a stage was written with a file of that name. DamagedError where it came there since."""
        there = os.path.lexists(self.run.path(stage) / name)
        if not self.verify:
            return there
        listed = name in Manifest.read(self.run.path(stage)).files
        return bool(self.file(stage, name)) if there or listed else False

    def load_data(self) -> Dataset:
        for name in Dataset.FILES:
            self.file("data", name)
        data = Dataset.load(self.run.path("data"))
        self.check_unchanged()
        return data

    def load_features(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Raw e_v, e_t, e_c after PCA and LightGCN, and which items have them, by modality."""
        tensors: dict[str, Tensor] = {}
        for stage, names in (("features", CONTENT), ("graph", ("collab",))):
            spec: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {}
            for name in names:
                spec |= {name: (torch.float32, ("N", name)), f"{name}_present": (torch.bool, ("N",))}
            tensors |= read_tensors(self.file(stage, f"{stage}.safetensors"), spec)
        return {k: tensors[k] for k in MODALITIES}, {k: tensors[f"{k}_present"] for k in MODALITIES}

    def load_catalog(self) -> Catalog:
        for name in Catalog.FILES:
            self.file("catalog", name)
        catalog = Catalog.load(self.run.path("catalog"))
        self.check_unchanged()
        return catalog

    def added_titles(self) -> dict[str, str]:
        """Titles of the items that were added to the catalog, by item id."""
        if not self.has_file("catalog", ADDED_TITLES):
            return {}
        return read_json(self.file("catalog", ADDED_TITLES), dict[str, str])

    def titles(self) -> dict[int | str, str]:
        """Titles by item id, those of added items included."""
        data = self.load_data()
        known: dict[int | str, str] = dict(zip(data.item_ids, data.titles, strict=True))
        return known | self.added_titles()

    def removed_items(self) -> list[str | int]:
        """Ids of the items that ``cemg-catalog remove`` took out."""
        return read_removed(self.run.folder)

    def load_tokenizer(self) -> Tokenizer:
        for name in Tokenizer.FILES:
            self.file("tokenizer", name)
        tokenizer = Tokenizer.load(self.run.path("tokenizer"))
        self.check_unchanged()
        return tokenizer

    def load_generator(self) -> tuple[PreTrainedModel, Vocabulary]:
        """The trained model on the device, float32, in evaluation mode; UserError for another catalog's."""
        if not self.run.path("generator").is_dir():
            raise UserError(
                f"{self.run.folder} has no trained generator",
                fix=f"cemg-train --run {quote(str(self.run.folder))}",
            )
        path = self.file("generator", "weights.safetensors")
        catalog = self.load_catalog()
        self._check_catalog(catalog)
        torch.manual_seed(self.config.seed)
        model, vocabulary = self._backbone(catalog)
        self._check_vocabulary(vocabulary)
        load_weights(model, path)
        self.check_unchanged()
        model.to(torch.device(self.device))  # type: ignore[arg-type]  # transformers wraps torch's own
        return model.eval(), vocabulary

    def _check_catalog(self, catalog: Catalog) -> None:
        trained = read_json(self.file("generator", "vocabulary.json"), Vocabulary)
        shape = trained.levels, trained.codebook_size
        if shape != (catalog.levels, catalog.codebook_size):
            raise UserError(
                "this catalog does not belong to the generator",
                cause=f"{self.run.path('generator')} was trained on {shape[0]} levels of {shape[1]} codes; "
                f"{self.run.path('catalog')} has {catalog.levels} levels of {catalog.codebook_size}",
                fix=f"train a generator on that catalog: cemg-train --run {quote(str(self.run.folder))}",
            )
        uneven = min(catalog.codebook_sizes) < catalog.codebook_size
        if catalog.shared is not None or catalog.tokens is not None or uneven:
            raise UserError(
                f"{self.run.path('catalog')} is not the catalog of a run",
                cause="it has shared semantic IDs, a token map or another number of codes on a level",
                fix="pass it to cemg.decoding.Decoder, which serves such catalogs",
            )

    def _check_vocabulary(self, vocabulary: Vocabulary) -> None:
        path = self.file("generator", "vocabulary.json")
        trained = read_json(path, Vocabulary)
        if trained != vocabulary:
            raise DamagedError(
                f"{path} belongs to another generator", cause=f"it is {trained}, not {vocabulary}",
                fix=remedy(self.run.path("generator")),
            )  # fmt: skip

    def _backbone(self, catalog: Catalog) -> tuple[PreTrainedModel, Vocabulary]:
        history = self.config.generator.history_items
        return build_backbone(
            self.config.backbone, catalog.levels, catalog.codebook_size, history_items=history
        )

    def prompter(self, model: PreTrainedModel, vocabulary: Vocabulary, catalog: Catalog) -> Prompter:
        """Builds this run's prompts."""
        return Prompter(
            vocabulary, catalog.codes, history_items=self.config.generator.history_items,
            seq2seq=model.config.is_encoder_decoder,
        )  # fmt: skip


def _stages(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Key and contents of each finished stage of a run."""
    return {name: (made.key, made.contents) for name, made in stages_of(folder).items()}


def settings_file(folder: Path, *, rebuild: bool = False) -> Path | None:
    """The file with the settings that a run continues with; None for a new run.

    A missing or damaged file raises DamagedError, with what restores it. ``rebuild`` restores the settings
    that the stages were built with.
    """
    run = Run(folder)
    for path in (folder / PENDING, run.path(CONFIG)):
        if path.exists() or path.is_symlink():
            try:
                load_config(path, of_run=True)
                if path.name == CONFIG:
                    check_generator(run)
                return path
            except DamagedError as error:
                return _restored(run, error, rebuild=rebuild)
    if not run.started():
        return None
    return _restored(run, DamagedError(f"{folder} has stages but no {CONFIG}"), rebuild=rebuild)


def check_generator(run: Run) -> None:
    """DamagedError where a run's settings name another generator than the one that belongs to its stages."""
    path, stage = run.path(CONFIG), run.path("generator")
    named = generator_of(path)
    manifest = Manifest.read(stage) if named is not None and stage.is_dir() else None
    if manifest is not None and named != manifest.key and check_origin(run.path, manifest) is None:
        cause = f"it names another generator than {stage}"
        raise DamagedError(f"{path} belongs to another run", cause=cause, fix=remedy(stage))


def _restored(run: Run, error: DamagedError, *, rebuild: bool) -> Path:
    settings = recorded_settings(run)
    if settings is None:
        fix = (
            f"name its data and settings: cemg-train --run {quote(str(run.folder))} --data DATA --config FILE"
        )
        raise DamagedError(error.message, cause=error.cause, fix=fix) from error
    if not rebuild:
        fix = f"restore those that it was trained with: cemg-train --run {quote(str(run.folder))} --rebuild"
        raise DamagedError(error.message, cause=error.cause, fix=fix) from error
    said = f"{error.message}: restored from what the stages of {run.folder} were built with"
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    files.write_text(run.folder / PENDING, config_text(settings))
    return run.folder / PENDING


def own_settings(run: Run) -> RunConfig:
    """The settings of a finished run. Raises DamagedError, with what restores them."""
    try:
        return load_config(run.path(CONFIG), of_run=True)
    except DamagedError as error:
        _restored(run, error, rebuild=False)
        raise


def recorded_settings(run: Run) -> RunConfig | None:
    """The settings in the manifest of a run's last stage; None where no manifest has them."""
    for name in reversed(STAGES):
        try:
            settings = Manifest.read(run.path(name)).settings
            if settings is not None:
                return TypeAdapter(RunConfig).validate_python(settings)
        except (UserError, ValidationError):
            continue
    return None
