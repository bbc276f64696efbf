"""Reading a finished run: its settings and stages, verified. No trainer is imported here.

A run is a folder of stages (data, features, graph, memory, tokenizer, catalog, generator, gate), written by
``cemg-train``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from cemg.config import RunConfig, config_text, generator_of, load_config, with_earlier
from cemg.data import Dataset
from cemg.dense import DENSE_FILES, DenseRanker
from cemg.errors import DamagedError, UserError
from cemg.generator import Prompter, Vocabulary, build_backbone, load_weights
from cemg.generator.item_softmax import ItemSoftmax
from cemg.generator.item_tokens import add_item_embedding, with_item_tokens
from cemg.memory import MEMORY_FILE, TEXTS_FILE, Memory
from cemg.mixture import DENSE, GATE_FILE, MEMORY, SOFTMAX, DenseSource, Gate, MemorySource, Source
from cemg.progress import console
from cemg.storage import files
from cemg.storage.manifest import CONFIG, STAGES, Manifest, check_origin, remedy, stages_of, verify
from cemg.storage.read import read_json, read_tensors
from cemg.storage.removed import read_removed
from cemg.storage.run import PENDING, Run
from cemg.tokenizer import CONTENT, MODALITIES, Catalog, Tokenizer
from cemg_kernels.constrained.softmax import Normalize

ADDED_TITLES = "added_titles.json"  # in the catalog's folder, by item id
ADDED_TEXTS = "added_texts.json"  # the same; versions before it have titles only


class RunArtifacts:
    """The stages of a run, read on demand and verified with the hashes in their manifests."""

    def __init__(self, run: Run, config: RunConfig, *, device: str = "cpu", verify: bool = True) -> None:
        self.run, self.config, self.device, self.verify = run, config.seeded(), device, verify
        self.opened: dict[str, tuple[str, str | None]] = {}  # key and contents of each stage when opened
        if torch.device(device).type == "cuda" and torch.device(device).index is not None:
            torch.cuda.set_device(device)  # kernels take the current one

    @classmethod
    def open(cls, folder: Path | str, *, device: str = "cpu", verify: bool = True) -> Self:
        """Open a finished run.

        Args:
            folder: The folder of the run.
            device: Models are loaded to this device.
            verify: Whether each file is compared with its hash when it is read.

        Raises:
            UserError: The run is not finished.
            DamagedError: A part of it is damaged or belongs to another run.
        """
        folder = Path(folder)
        run = Run.existing(folder)
        if not run.finished():
            settings_file(folder)  # raises DamagedError if the settings are damaged
            raise UserError(
                f"the training of {folder} is not finished", fix=f"cemg-train --run {quote(str(folder))}"
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
        """Raise UserError if a training has replaced a stage since the run was opened.

        Stages read now would not match those read before. Adding items to the catalog does not count.
        """
        if self.opened and _stages(self.run.folder) != self.opened:
            raise UserError(
                f"{self.run.folder} was retrained while it was open",
                cause="the stages on disk do not match those that were read before",
                fix="open the run again",
            )

    def file(self, stage: str, name: str) -> Path:
        """The path of a file of a finished stage, verified unless ``verify`` is False.

        Raises:
            DamagedError: The file or the manifest of the stage is missing or was changed.
        """
        folder = self.run.path(stage)
        if self.verify:
            verify(folder, (name,))
        return folder / name

    def has_file(self, stage: str, name: str) -> bool:
        """Whether a stage has a file of that name. Raises DamagedError if the file was added later."""
        exists = os.path.lexists(self.run.path(stage) / name)
        if not self.verify:
            return exists
        listed = name in Manifest.read(self.run.path(stage)).files
        return bool(self.file(stage, name)) if exists or listed else False

    def load_data(self) -> Dataset:
        for name in Dataset.FILES:
            self.file("data", name)
        data = Dataset.load(self.run.path("data"))
        self.check_unchanged()
        return data

    def load_features(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features e_v, e_t, e_c after PCA and LightGCN, and which items have them, per modality."""
        tensors: dict[str, Tensor] = {}
        for stage, names in (("features", CONTENT), ("graph", ("collab",))):
            spec: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {}
            for name in names:
                spec |= {name: (torch.float32, ("N", name)), f"{name}_present": (torch.bool, ("N",))}
            tensors |= read_tensors(self.file(stage, f"{stage}.safetensors"), spec)
        return {k: tensors[k] for k in MODALITIES}, {k: tensors[f"{k}_present"] for k in MODALITIES}

    def has_memory(self) -> bool:
        """Whether the run has an item memory. Runs that earlier versions trained have none."""
        return self.run.path("memory").is_dir()

    def load_memory(self, catalog: Catalog | None = None) -> Memory:
        """The item memory of the run, by memory map.

        Args:
            catalog: A catalog of the run, if it is loaded already. The memory has its items, and not those
                that were added to the run after it.

        Raises:
            UserError: The run has no memory, or it was built for another catalog.
            DamagedError: The file of the memory is damaged.
        """
        folder = self.run.path("memory")
        if not self.has_memory():
            raise UserError(
                f"{self.run.folder} has no item memory",
                cause="an earlier version trained it, or its folder was deleted",
                fix=f"build it, and keep all other stages: cemg-train --run {quote(str(self.run.folder))}",
            )  # fmt: skip
        self.file("memory", MEMORY_FILE)
        self.has_file("memory", TEXTS_FILE)  # verified; it is read when the first item is added
        memory = Memory.load(folder, fix=remedy(folder))
        ids = (self.load_catalog() if catalog is None else catalog).item_ids
        memory.check_catalog(ids, run=self.run.folder)
        self.check_unchanged()
        return memory.first(len(ids))

    def extended_memory(self, catalog: Catalog, texts: Sequence[str | None] = ()) -> Memory | None:
        """The memory with items for all of a catalog; None if the run has no memory.

        Args:
            catalog: The catalog of the run, or that catalog with further items.
            texts: Texts of the last items. Items before them that the memory does not have get the text they
                were added with; those that an earlier version added get their title.
        """
        if not self.has_memory():
            return None
        known = catalog.first(len(catalog) - len(texts))
        memory = self.load_memory(known)
        written = {**self.added_titles(), **self.added_texts()}
        missing = known.item_ids[memory.num_items :]
        memory.add_items([*(written.get(str(item)) for item in missing), *texts])
        memory.record_ids(catalog.item_ids)
        return memory

    def has_gate(self) -> bool:
        """Whether the run has a gate. Those of earlier versions and those without other experts have none."""
        return self.config.mixes and self.run.path("gate").is_dir()

    def load_gate(self) -> Gate:
        """The weights of the generator and the other experts.

        Raises:
            UserError: The run has no gate, or no memory, or the gate was fitted with another memory.
            DamagedError: The file of the gate is damaged.
        """
        folder, name = self.run.path("gate"), quote(str(self.run.folder))
        if not self.has_gate():
            raise UserError(
                f"{self.run.folder} has no gate",
                cause="an earlier version trained it, or its folder was deleted" if self.config.mixes
                else "its settings leave the generator without another expert (gate.memory=false)",
                fix=f"fit it, and keep all other stages: cemg-train --run {name}"
                + ("" if self.config.mixes else " --set gate.memory=true"),
            )  # fmt: skip
        if not self.has_memory():
            raise UserError(
                f"the gate of {self.run.folder} needs the item memory, which is missing",
                fix=f"build it, and keep all other stages: cemg-train --run {name}",
            )
        gate = Gate.load(self.file("gate", GATE_FILE), fix=remedy(folder))
        if gate.memory != Manifest.read(self.run.path("memory")).contents:
            raise UserError(
                f"the gate of {self.run.folder} was fitted with another item memory", fix=remedy(folder)
            )
        return gate

    def sources(
        self, gate: Gate, memory: Memory, *, items: int | None = None, softmax: DenseSource | None = None
    ) -> list[Source]:
        """The experts beside the generator, in the order of the gate.

        With ``items``, the item softmax knows only that many rows, for a search without the items that were
        added later. The memory has the items of the catalog that it was loaded for. ``softmax``: see
        `item_softmax`; None loads it.
        """
        sources: list[Source] = []
        if MEMORY in gate.sources:
            sources.append(MemorySource(memory))
        if DENSE in gate.sources:
            for name in DENSE_FILES:
                self.file("gate", name)
            dense = DenseRanker.load(self.run.path("gate"))
            sources.append(DenseSource(dense, items=dense.model.items.num_embeddings))
        if SOFTMAX in gate.sources:
            sources.append(replace(softmax or self.item_softmax(), limit=items))
        return sources

    def item_softmax(
        self, model: PreTrainedModel | None = None, prompter: Prompter | None = None
    ) -> DenseSource:
        """The item softmax of the generator, for a run with ``generator.item_loss``.

        ``model`` and ``prompter`` are those of a catalog with further items; None loads them.
        """
        if model is None or prompter is None:
            model, vocabulary = self.load_generator()
            prompter = self.prompter(model, vocabulary, self.load_catalog())
        return DenseSource(ItemSoftmax(model, prompter), name=SOFTMAX)

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

    def added_texts(self) -> dict[str, str]:
        """Texts of the items that were added to the catalog, by item id."""
        if not self.has_file("catalog", ADDED_TEXTS):
            return {}
        return read_json(self.file("catalog", ADDED_TEXTS), dict[str, str])

    def titles(self, data: Dataset | None = None) -> dict[int | str, str]:
        """Titles by item id, also of added items. ``data`` are those of the run; None reads them."""
        data = self.load_data() if data is None else data
        known: dict[int | str, str] = dict(zip(data.item_ids, data.titles, strict=True))
        return known | self.added_titles()

    def removed_items(self) -> list[str | int]:
        """Ids of the items that ``cemg-catalog remove`` removed."""
        return read_removed(self.run.folder)

    def load_tokenizer(self) -> Tokenizer:
        for name in Tokenizer.FILES:
            self.file("tokenizer", name)
        tokenizer = Tokenizer.load(self.run.path("tokenizer"))
        self.check_unchanged()
        return tokenizer

    def load_generator(self) -> tuple[PreTrainedModel, Vocabulary]:
        """The trained model (float32, on the device, in evaluation mode) and its vocabulary, for searches.

        Raises:
            UserError: The generator was trained on another catalog.
        """
        catalog = self.load_catalog()
        model, vocabulary = self.served(*self.load_trained(catalog), catalog)
        model.to(torch.device(self.device))  # type: ignore[arg-type]  # transformers wraps Module.to
        return model.eval(), vocabulary

    def load_trained(self, catalog: Catalog | None = None) -> tuple[PreTrainedModel, Vocabulary]:
        """The model as it was trained, on the CPU, and its vocabulary; ``served`` prepares it for searches.

        ``catalog`` is that of the run; None reads it.

        Raises:
            UserError: The generator was trained on another catalog.
        """
        if not self.run.path("generator").is_dir():
            raise UserError(
                f"{self.run.folder} has no trained generator",
                fix=f"cemg-train --run {quote(str(self.run.folder))}",
            )
        path = self.file("generator", "weights.safetensors")
        catalog = self.load_catalog() if catalog is None else catalog
        trained = self._check_catalog(catalog)
        torch.manual_seed(self.config.seed)
        model, vocabulary = self._backbone(catalog.first(trained.items or len(catalog)))
        self._check_vocabulary(vocabulary)
        load_weights(model, path)
        self.check_unchanged()
        return model.eval(), vocabulary

    def served(
        self, model: PreTrainedModel, vocabulary: Vocabulary, catalog: Catalog
    ) -> tuple[PreTrainedModel, Vocabulary]:
        """A model as searches use it: with a token of each item of ``catalog``, if the run has them."""
        if not vocabulary.items:
            return model, vocabulary
        with_tokens = with_item_tokens(model, vocabulary.tokens(catalog.codes))
        return with_tokens, replace(vocabulary, items=len(catalog))

    def normalize(self, asked: Normalize | None = None) -> Normalize:
        """``asked``, or the normalization of the run.

        Raises UserError for "vocab" if items have tokens, whose logits are never trained.
        """
        if asked == "vocab" and self.config.generator.item_tokens:
            raise UserError(
                "normalize=vocab has no meaning in this run",
                cause="it has generator.item_tokens: the softmax would run over tokens of items",
                fix="normalize=valid",
            )
        return asked or self.config.decoding.normalize

    def _check_catalog(self, catalog: Catalog) -> Vocabulary:
        """The vocabulary of the training. Raises UserError if the catalog does not fit it."""
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
                cause="it has shared semantic IDs, a token map, or levels of different sizes",
                fix="use it with cemg.decoding.Decoder",
            )
        return trained

    def _check_vocabulary(self, vocabulary: Vocabulary) -> None:
        path = self.file("generator", "vocabulary.json")
        trained = read_json(path, Vocabulary)
        if trained != vocabulary:
            raise DamagedError(
                f"{path} belongs to another generator", cause=f"it has {trained}, not {vocabulary}",
                fix=remedy(self.run.path("generator")),
            )  # fmt: skip

    def _backbone(self, catalog: Catalog) -> tuple[PreTrainedModel, Vocabulary]:
        config = self.config.generator
        model, vocabulary = build_backbone(
            self.config.backbone, catalog.levels, catalog.codebook_size, history_items=config.history_items
        )
        if not config.item_tokens:
            return model, vocabulary
        add_item_embedding(model, len(catalog))
        return model, replace(vocabulary, items=len(catalog))

    def prompter(self, model: PreTrainedModel, vocabulary: Vocabulary, catalog: Catalog) -> Prompter:
        """The prompt builder of this run."""
        return Prompter(
            vocabulary, catalog.codes, history_items=self.config.generator.history_items,
            seq2seq=model.config.is_encoder_decoder,
        )  # fmt: skip


def _stages(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Key and content digest of each finished stage of a run."""
    return {name: (made.key, made.contents) for name, made in stages_of(folder).items()}


def settings_file(folder: Path, *, rebuild: bool = False) -> Path | None:
    """The file with the settings that a run continues with; None for a new run.

    Args:
        folder: The folder of the run.
        rebuild: Whether damaged settings are restored from those that the stages were built with.

    Raises:
        DamagedError: The file is missing or damaged. The fix restores it.
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
    """Raise DamagedError if the settings of a run name another generator than its stages have."""
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
            f"pass its data and settings: cemg-train --run {quote(str(run.folder))} --data DATA --config FILE"
        )
        raise DamagedError(error.message, cause=error.cause, fix=fix) from error
    if not rebuild:
        fix = f"restore the settings of the training: cemg-train --run {quote(str(run.folder))} --rebuild"
        raise DamagedError(error.message, cause=error.cause, fix=fix) from error
    message = f"{error.message}: restored from the settings that the stages of {run.folder} were built with"
    console.print(message, highlight=False, soft_wrap=True, markup=False)
    files.write_text(run.folder / PENDING, config_text(settings))
    return run.folder / PENDING


def own_settings(run: Run) -> RunConfig:
    """The settings of a finished run. Raises DamagedError; its fix restores them."""
    try:
        return load_config(run.path(CONFIG), of_run=True)
    except DamagedError as error:
        _restored(run, error, rebuild=False)
        raise


def recorded_settings(run: Run) -> RunConfig | None:
    """The settings in the manifest of the last stage of a run; None if no manifest has them."""
    for name in reversed(STAGES):
        try:
            settings = Manifest.read(run.path(name)).settings
            if settings is not None:
                return TypeAdapter(RunConfig).validate_python(with_earlier(settings))
        except (UserError, ValidationError):
            continue
    return None
