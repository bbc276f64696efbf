"""The stages of a run, from raw data to a trained generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.artifacts import RunArtifacts
from cemg.config import DataConfig, RunConfig, keyed
from cemg.data import Dataset, read_dataset, synthetic_dataset
from cemg.data.readers import ColumnNames
from cemg.distributed import ALONE, World
from cemg.errors import DamagedError, UserError
from cemg.evaluation import evaluate
from cemg.evaluation.ranker import beam_ranker
from cemg.evaluation.selection import checkpoint_selection
from cemg.features import PCA, FeatureCache, Features, encode_images, encode_texts
from cemg.features.shards import FeatureWork
from cemg.generator import Vocabulary, start_from_codebooks, weights_of
from cemg.generator.item_softmax import ItemSoftmax
from cemg.generator.training import Progress, train_generator
from cemg.graph.lightgcn import train_lightgcn
from cemg.memory.build import fit_memory
from cemg.pipeline.changes import IMAGES, content_digest, image_digests
from cemg.pipeline.gate import dense_digest, fit_run
from cemg.pipeline.preflight import check_before_training
from cemg.pipeline.transition import Transition
from cemg.progress import StageLog, console
from cemg.storage import files
from cemg.storage.checkpoint import CHECKPOINTS, FILE, Checkpoint
from cemg.storage.manifest import STAGES, read_clock, write_clock
from cemg.storage.run import Guard, Run
from cemg.tokenizer import MODALITIES, Catalog, make_unique, read_items
from cemg.tokenizer.training import train_tokenizer


class Pipeline(RunArtifacts):
    """All stages of one run: ``train`` builds or reuses each of them, in order."""

    def __init__(
        self, run: Run, config: RunConfig, *, device: str = "cpu", cache: Path | None = None,
        verify: bool = True, data: Dataset | None = None, world: World = ALONE,
    ) -> None:  # fmt: skip
        """``world``: the processes that train. This is the pipeline of the main one."""
        super().__init__(run, config, device=device, verify=verify)
        self.world = world
        self.asked = config
        self.given = data  # the data set that the configuration names, if it was read before
        self.transition: Transition | None = None  # of a training
        self.images: list[Path | None] | None = (
            None  # current paths of the pictures; the data may name others
        )
        self.cache = FeatureCache(cache if cache is not None else run.folder / "cache")

    def train(self, *, agree: Callable[[list[str], bool], None] | None = None, rebuild: bool = False) -> None:
        """Build or reuse all stages, in the order of STAGES.

        An interrupted training continues with the next call. A finished run keeps its stages and its
        configuration until all new stages are complete. ``agree`` and ``rebuild``: see `Transition`.
        """
        self.transition = Transition(self.run, self.asked, agree=agree, rebuild=rebuild)
        self.transition.begin()
        try:
            for stage in STAGES:
                getattr(self, stage)()
        except Exception as error:
            # keep the settings after a full disk, or if a checkpoint shows that they work
            transient = isinstance(error, OSError | MemoryError | files.StorageError)
            trained = not isinstance(error, UserError) and self.run.trains()
            if not transient and not trained:
                self.transition.withdraw()
            raise
        self.transition.commit()
        self._add_missing_items()

    def _add_missing_items(self) -> None:
        """Add the items that only the catalog has to the memory: one that was built again lacks them."""
        artifacts = RunArtifacts.open(self.run.folder, verify=self.verify)
        catalog = artifacts.load_catalog()
        if artifacts.load_memory(catalog).num_items == len(catalog):
            return
        memory = artifacts.extended_memory(catalog)
        assert memory is not None
        with self.run.revised("memory") as folder:
            memory.save(folder / "memory")

    def _stage(
        self, name: str, config: Mapping[str, Any], build: Callable[[Path], None], *,
        inputs: tuple[str, ...] = (), guard: Guard | None = None,
    ) -> None:  # fmt: skip
        if guard is None and self.transition is not None:
            guard = self.transition.guard
        self.run.stage(name, config, build, inputs=inputs, settings=self.asked.to_dict(), guard=guard)

    # ---- stages

    def data(self) -> None:
        data = self._read_data()
        self.images = data.images
        digests = image_digests(data.images, self.run.folder)

        def build(folder: Path) -> None:
            data.save(folder)
            files.write_json(folder / IMAGES, digests)

        guard = None if self.transition is None else self.transition.data_guard(data, digests)
        self._stage("data", {"content": content_digest(data, digests)}, build, guard=guard)

    def _read_data(self) -> Dataset:
        source = self.config.data
        if self.given is not None:
            data = self.given
        elif source.path:
            data = read_source(source)
        else:
            console.print("no --data was given: this run uses the SYNTHETIC data set", highlight=False)
            world = self.run.folder / "synthetic"
            data = synthetic_dataset(
                world, users=source.synthetic_users, items=source.synthetic_items, seed=self.config.seed
            )
        split = data.split()
        if not len(split.users) or not len(split.valid):
            cause = "every user has fewer than three interactions"
            if data.cuts is not None:
                cause = "no user has interactions on both sides of a cut in time"
            raise UserError(
                f"{data.name} has no user to test on: {cause}",
                fix="check the lengths of the histories: cemg-data stats",
            )
        check_before_training(self.config, data, self.run)
        return data

    def features(self) -> None:
        config = self.config
        parts = {name: keyed(config, name) for name in ("text", "image", "pca")}
        parts["pca"]["seed"] = config.seed
        self._stage("features", parts, self._build_features, inputs=("data",))

    def graph(self) -> None:
        self._stage("graph", keyed(self.config, "graph"), self._build_graph, inputs=("data",))

    def memory(self) -> None:
        self._stage("memory", keyed(self.config, "memory"), self._build_memory, inputs=("data",))

    def tokenizer(self) -> None:
        config = keyed(self.config, "tokenizer") | {
            "without": [k for k in self.config.without if k in MODALITIES]
        }
        self._stage("tokenizer", config, self._build_tokenizer, inputs=("features", "graph"))

    def catalog(self) -> None:
        config = {"unique": self.config.tokenizer.unique}
        self._stage("catalog", config, self._build_catalog, inputs=("data", "tokenizer"))

    def generator(self) -> None:
        parts = {name: keyed(self.config, name) for name in ("backbone", "generator", "decoding")}
        for part, name in (
            ("generator", "checkpoint_seconds"),
            ("decoding", "beams"),
            ("decoding", "batch_size"),
            ("generator", "gradient_checkpointing"),
        ):
            parts[part].pop(name, None)  # does not change the weights
        catalog = self.load_catalog().first(self.load_data().num_items)
        config = parts | {
            "dtype": self.config.dtype,
            "seed": self.config.seed,
            "catalog_sha256": catalog.digest(),  # on a GPU, a rebuilt catalog may have other codes
        }
        self._stage("generator", config, self._build_generator, inputs=("data", "catalog"))

    def gate(self) -> None:
        dense = self.config.gate.dense
        config = keyed(self.config, "gate") | {"seed": self.config.seed, "dense": dense_digest(dense)}
        self._stage("gate", config, self._build_gate, inputs=("data", "memory", "generator"))

    def feature_work(self) -> FeatureWork:
        """The texts and images of the data, for the features stage, to be encoded in parts."""
        self.given = self._read_data()
        config = self.config
        return FeatureWork(
            self.given.texts, self.given.images, text=config.text, image=config.image, device=self.device
        )

    # ---- how each is built

    def _build_features(self, folder: Path) -> None:
        data = self.load_data()
        if self.images is not None:
            data = dataclasses.replace(data, images=self.images)
        text = encode_texts(
            data.texts, config=self.config.text, device=self.device, cache=self.cache, scratch=folder
        )
        image = self._encode_images(data, folder)
        tensors: dict[str, Tensor] = {}
        for name, features in (("text", text), ("image", image)):
            tensors |= self._project(name, features, folder)
        files.save_tensors(tensors, folder / "features.safetensors")
        files.write_json(
            folder / "missing.json", {"text": _missing(text, data), "image": _missing(image, data)}
        )

    def _encode_images(self, data: Dataset, scratch: Path) -> Features:
        if not any(data.images):  # then no backbone is loaded or downloaded
            return Features(torch.zeros(data.num_items, 1), torch.zeros(data.num_items, dtype=torch.bool))
        return encode_images(
            data.images, config=self.config.image, device=self.device, cache=self.cache, scratch=scratch
        )

    def _project(self, name: str, features: Features, folder: Path) -> dict[str, Tensor]:
        """PCA of one modality; zeros if fewer than two different items have it."""
        rows = int(features.present.sum())
        dim = min(self.config.pca.dim, rows, features.width)
        identical = rows > 1 and not features.differ()
        if identical:
            console.print(
                f"{name}: the features of all {rows} items are identical, so they are not used",
                highlight=False,
            )
        if rows < 2 or identical:
            values = torch.zeros(len(features.present), 1)
            return {name: values, f"{name}_present": torch.zeros_like(features.present)}
        if dim < self.config.pca.dim:
            console.print(
                f"{name}: PCA keeps {dim} dimensions of {rows} items × {features.width} features",
                highlight=False,
            )
        fitted = PCA.fit(features, dim=dim, seed=self.config.seed).without_noise()
        pca = dataclasses.replace(fitted, whiten=self.config.pca.whiten)
        pca.save(folder / f"pca_{name}.safetensors")
        explained = float(pca.explained_variance_ratio.sum())
        console.print(
            f"{name}: {rows} of {len(features.present)} items, PCA keeps {explained:.1%} of the variance",
            highlight=False,
        )
        values = pca.transform(features.values, features.present, scratch=folder)
        return {name: values, f"{name}_present": features.present}

    def _checkpoint(self, stage: str, folder: Path) -> Checkpoint:
        """The checkpoint of the training of a stage, in the folder of the unfinished stage."""
        identity, seconds = self.run.keys.get(stage, ""), self.config.generator.checkpoint_seconds
        return Checkpoint(folder / CHECKPOINTS, stage=stage, identity=identity, seconds=seconds)

    def _build_graph(self, folder: Path) -> None:
        data = self.load_data()
        checkpoint = self._checkpoint("graph", folder)
        with StageLog(folder, resumes=checkpoint.exists()) as log:
            made = self.world.call(
                train_lightgcn, data.split().train, data.num_items, config=self.config.graph,
                device=self.device, own={"log": log, "checkpoint": checkpoint},
            )  # fmt: skip
        files.save_tensors(
            {"collab": made.values, "collab_present": made.present}, folder / "graph.safetensors"
        )

    def _build_memory(self, folder: Path) -> None:
        data = self.load_data()
        with StageLog(folder) as log:
            made = fit_memory(data, data.split(), config=self.config.memory, log=log, scratch=folder)
        made.save(folder)

    def _build_gate(self, folder: Path) -> None:
        fit_run(self, folder)

    def _build_tokenizer(self, folder: Path) -> None:
        values, present = self.load_features()
        without = tuple(k for k in self.config.without if k in MODALITIES)
        checkpoint = self._checkpoint("tokenizer", folder)
        with StageLog(folder, resumes=checkpoint.exists()) as log:
            made = self.world.call(
                train_tokenizer, values, present, config=self.config.tokenizer, without=without,
                device=self.device, own={"log": log, "checkpoint": checkpoint},
            )  # fmt: skip
        made.save(folder)
        files.save_tensors(made.encode(values, present), folder / "items.safetensors")

    def _build_catalog(self, folder: Path) -> None:
        items = read_items(self.file("tokenizer", "items.safetensors"))
        codebooks = self.load_tokenizer().model.codebooks.detach()
        unique = make_unique(items["codes"], items["z"], codebooks, method=self.config.tokenizer.unique)
        Catalog.from_codes(unique.codes, self.config.tokenizer.codebook_size, self.load_data().item_ids).save(
            folder
        )
        figures = {
            "items": len(unique.codes), "colliding_before": unique.colliding_before, "colliding_after": 0,
            "changed_codes_share": unique.changed_share, "moved_items": unique.moved_items,
        }  # fmt: skip
        files.write_json(folder / "uniqueness.json", figures)
        console.print(
            f"catalog: {unique.colliding_before} of {len(unique.codes)} items had colliding codes; all are "
            f"unique now ({unique.changed_share:.2%} of the codes were changed)", highlight=False,
        )  # fmt: skip

    def _build_generator(self, folder: Path) -> None:
        try:
            trained = read_clock(folder) is not None
        except DamagedError as error:
            console.print(
                f"generator: trained again, because {error.message}", highlight=False, soft_wrap=True
            )
            trained = False
        if not trained:
            self._train_generator(folder)

    def _train_generator(self, folder: Path) -> None:
        data = self.load_data()
        catalog = self.load_catalog().first(data.num_items)  # without items that cemg-catalog added later
        torch.manual_seed(self.config.seed)
        model, vocabulary = self._backbone(catalog)
        if self.config.backbone.codebook_init:
            codebooks = self.load_tokenizer().model.codebooks.detach()
            start_from_codebooks(model, vocabulary, codebooks)
        split = data.split()
        selection = checkpoint_selection(split, self.config)
        beams = self.config.decoding.validation_beams

        evaluated = partial(
            evaluate, split=split, part="valid", users=selection.users, progress=False, batch_size=128
        )

        def validate(trained: PreTrainedModel) -> float:
            """NDCG@10 of the search; with an item loss, the mean with that of the item softmax."""
            served, tokens = self.served(trained, vocabulary, catalog)
            search = beam_ranker(
                self, served, tokens, catalog, beams=beams, exclude_history=selection.history == "excluded"
            )
            score = selection.metrics(evaluated(search, max_list=beams))["NDCG@10"]
            if not self.config.generator.item_loss:
                return score
            softmax = ItemSoftmax(served, self.prompter(served, tokens, catalog))
            whole = evaluated(lambda histories, top: softmax.prior(histories, top)[0].cpu())
            return (score + selection.metrics(whole, complete=True)["NDCG@10"]) / 2

        beam_ranker(
            self, *self.served(model, vocabulary, catalog), catalog, beams=1
        )  # refuses what cannot be decoded before it trains
        resumes = (folder / CHECKPOINTS / FILE).is_file()
        with StageLog(folder, resumes=resumes) as log:
            own = {
                "validate": validate,
                "folder": folder / CHECKPOINTS,
                "log": log,
                "identity": self.run.keys.get("generator", ""),
                "made": (model, vocabulary, catalog),
            }
            progress = self.world.call(
                train_with_settings, self.config, catalog.codes, catalog.codebook_sizes, split.train,
                device=self.device, own=own,
            )  # fmt: skip
        files.save_tensors(weights_of(model), folder / "weights.safetensors")
        files.write_json(folder / "vocabulary.json", vocabulary.to_dict())
        best: dict[str, Any] = {
            "best_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "validation_ndcg10": progress.best,
        }
        if progress.stopped:
            best["stopped"] = "the budget of training time was spent"
        files.write_json(folder / "training.json", best)
        write_clock(folder, progress.seconds)


def train_with_settings(
    config: RunConfig, codes: Tensor, sizes: Sequence[int], train: Sequence[np.ndarray], *, device: str,
    world: World, made: tuple[PreTrainedModel, Vocabulary, Catalog] | None = None,
    validate: Callable[[PreTrainedModel], float] | None = None, folder: Path = Path(), **own: Any,
) -> Progress:  # fmt: skip
    """`train_generator` with the settings of a run, in any process: only the main one has the run.

    Args:
        config: The settings, with the run's seed.
        codes: [N, L] the semantic IDs.
        sizes: Codes per level.
        train: Training items (catalog rows) of each user.
        device: "cpu" or a CUDA device.
        world: All processes.
        made: Model, vocabulary and catalog, which the main process has already.
        validate: Of the main process; so are ``folder`` and ``own``, which has ``log`` and ``identity``.
    """
    artifacts = RunArtifacts(Run(folder), config, device=device)
    if made is None:
        catalog = Catalog.from_codes(codes, sizes)
        torch.manual_seed(config.seed)
        made = *artifacts._backbone(catalog), catalog
    model, vocabulary, catalog = made
    return train_generator(
        model, vocabulary, artifacts.prompter(*made), train, catalog.trie, validate=validate or _not_called,
        config=config.generator, folder=folder, device=device, dtype=config.dtype, world=world, **own,
    )  # fmt: skip


def _not_called(model: PreTrainedModel) -> float:
    raise AssertionError("only the main process validates")


def read_source(source: DataConfig) -> Dataset:
    """The data set that the configuration names. Notes of the reader are printed."""
    data = read_dataset(
        Path(source.path),
        format=source.format,
        name=source.name or None,
        items=Path(source.items) if source.items else None,
        images=Path(source.images) if source.images else None,
        times=Path(source.times) if source.times else None,
        texts=source.texts,
        columns=ColumnNames.parse(source.columns) if source.columns else None,
        separator=source.separator,
        encoding=source.encoding,
        min_count=source.min_count,
        min_rating=source.min_rating,
        ties=source.ties,
        split=source.split,
        duplicates=source.duplicates,
        drop_duplicates=source.drop_duplicates,
    )
    for note in data.notes:
        console.print(f"data: {note}", highlight=False)
    return data


def _missing(features: Features, data: Dataset) -> dict[str, str]:
    """Items without this modality: id to reason."""
    rows = torch.nonzero(~features.present).flatten().tolist()
    return {data.item_ids[r]: features.reasons.get(r, "none given") for r in rows}
