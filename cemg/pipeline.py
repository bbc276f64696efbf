"""The stages of a run, from raw data to a trained generator and its test (DESIGN §1)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg import files
from cemg.artifacts import read_json, read_tensors
from cemg.changes import IMAGES, content_digest, image_digests
from cemg.config import DataConfig, RunConfig, generator_of
from cemg.data import Dataset, read_dataset, synthetic_dataset
from cemg.data.readers import ColumnNames
from cemg.decoding import Decoder, TransformersDecoder, VllmDecoder
from cemg.errors import DamagedError, UserError
from cemg.evaluation import Rank, evaluate, seeded_sample
from cemg.features import PCA, FeatureCache, Features, encode_images, encode_texts
from cemg.generator import (
    Prompter,
    Vocabulary,
    build_backbone,
    load_weights,
    start_from_codebooks,
    train_generator,
    weights_of,
)
from cemg.graph import train_lightgcn
from cemg.manifest import CONFIG, STAGES, Manifest, read_clock, remedy, stages_of, verify, write_clock
from cemg.preflight import check_before_training
from cemg.progress import StageLog, console
from cemg.removed import read_removed
from cemg.run import Guard, Run
from cemg.tokenizer import CONTENT, MODALITIES, Catalog, Tokenizer, make_unique, read_items, train_tokenizer
from cemg.transition import Transition, own_settings, settings_file
from cemg_kernels import ItemFilter, RequestFilter

ADDED_TITLES = "added_titles.json"  # in the catalog's folder, by item id


class Pipeline:
    """All stages of one run. ``train`` makes or reuses each; the properties read what is there."""

    def __init__(
        self, run: Run, config: RunConfig, *, device: str = "cpu", cache: Path | None = None,
        verify: bool = True,
    ) -> None:  # fmt: skip
        self.run, self.asked, self.config, self.device = run, config, config.seeded(), device
        self.verify = verify
        self.opened: dict[str, tuple[str, str | None]] = {}  # of a run that is read: its stages, by name
        self.transition: Transition | None = None  # of a training
        self.images: list[Path | None] | None = None  # where the pictures are now; the data may name others
        self.cache = FeatureCache(cache if cache is not None else run.folder / "cache")
        if torch.device(device).type == "cuda" and torch.device(device).index is not None:
            torch.cuda.set_device(device)  # kernels, and accelerate, take the current one

    @classmethod
    def open(cls, folder: Path, *, device: str = "cpu", verify: bool = True) -> Pipeline:
        """The pipeline of a run that ``cemg-train`` wrote, with the configuration that made it.

        Each file is compared with its hash where it is opened; ``verify`` False reads it as it is.
        Raises UserError where the run is not finished, and where its parts are damaged or of other runs.
        """
        run = Run.existing(folder)
        if not run.finished():
            settings_file(folder)  # raises where it is damaged
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
        pipeline = cls(run, config, device=device, verify=verify)
        pipeline.opened = opened
        pipeline.check_unchanged()
        return pipeline

    def check_unchanged(self) -> None:
        """UserError where a training has replaced a stage since the run was opened: what is read now does
        not belong to what was read before. Items that were added to the catalog change nothing."""
        if self.opened and _stages(self.run.folder) != self.opened:
            raise UserError(
                f"{self.run.folder} was trained anew while it was opened",
                cause="what was read before belongs to other stages",
                fix="open it again",
            )

    def train(self, *, agree: Callable[[list[str], bool], None] | None = None, rebuild: bool = False) -> None:
        """Data, features, graph, tokenizer, catalog, generator, in this order.

        The configuration is written first, and a further call continues with it; a run that is finished
        keeps its own stages and configuration until the last new stage is there. ``agree`` and ``rebuild``:
        see `Transition`.
        """
        self.transition = Transition(self.run, self.asked, agree=agree, rebuild=rebuild)
        self.transition.begin()
        try:
            for stage in STAGES:
                getattr(self, stage)()
        except Exception as error:
            # the same settings are tried again after a full disk; a checkpoint shows that they work
            transient = isinstance(error, OSError | MemoryError | files.StorageError)
            trained = not isinstance(error, UserError) and self.run.trains()
            if not transient and not trained:
                self.transition.withdraw()
            raise
        self.transition.commit()

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
        if source.path:
            data = _read_source(source)
        else:
            console.print("no data was named: this run uses the SYNTHETIC set", highlight=False)
            world = self.run.folder / "synthetic"
            data = synthetic_dataset(
                world, users=source.synthetic_users, items=source.synthetic_items, seed=self.config.seed
            )
        if not len(data.split().users):
            raise UserError(
                f"{data.name} has no user to test on: nobody has three interactions or more",
                fix="cemg-data stats tells how long the histories are",
            )
        check_before_training(self.config, data, self.run)
        return data

    def features(self) -> None:
        config = self.config
        parts = {"text": asdict(config.text), "image": asdict(config.image), "pca": asdict(config.pca)}
        parts["pca"]["seed"] = config.seed
        self._stage("features", parts, self._build_features, inputs=("data",))

    def graph(self) -> None:
        self._stage("graph", asdict(self.config.graph), self._build_graph, inputs=("data",))

    def tokenizer(self) -> None:
        config = asdict(self.config.tokenizer) | {
            "without": [k for k in self.config.without if k in MODALITIES]
        }
        self._stage("tokenizer", config, self._build_tokenizer, inputs=("features", "graph"))

    def catalog(self) -> None:
        config = {"unique": self.config.tokenizer.unique}
        self._stage("catalog", config, self._build_catalog, inputs=("data", "tokenizer"))

    def generator(self) -> None:
        parts = {name: asdict(getattr(self.config, name)) for name in ("backbone", "generator", "decoding")}
        for part, name in (
            ("generator", "checkpoint_seconds"),
            ("decoding", "beams"),
            ("decoding", "batch_size"),
        ):
            del parts[part][name]  # which changes no weight
        catalog = self.load_catalog().first(self.load_data().num_items)
        config = parts | {
            "dtype": self.config.dtype,
            "seed": self.config.seed,
            "catalog_sha256": catalog.digest(),  # made anew it may have other codes, on a GPU
        }
        self._stage("generator", config, self._build_generator, inputs=("data", "catalog"))

    # ---- how each is built

    def _build_features(self, folder: Path) -> None:
        data = self.load_data()
        if self.images is not None:
            data = dataclasses.replace(data, images=self.images)
        text = encode_texts(data.texts, config=self.config.text, device=self.device, cache=self.cache)
        image = self._encode_images(data)
        tensors: dict[str, Tensor] = {}
        for name, features in (("text", text), ("image", image)):
            tensors |= self._project(name, features, folder)
        files.save_tensors(tensors, folder / "features.safetensors")
        files.write_json(
            folder / "missing.json", {"text": _missing(text, data), "image": _missing(image, data)}
        )

    def _encode_images(self, data: Dataset) -> Features:
        if not any(data.images):  # no picture, no backbone: none is loaded, nor downloaded
            return Features(torch.zeros(data.num_items, 1), torch.zeros(data.num_items, dtype=torch.bool))
        return encode_images(data.images, config=self.config.image, device=self.device, cache=self.cache)

    def _project(self, name: str, features: Features, folder: Path) -> dict[str, Tensor]:
        """PCA of one modality, where there is enough of it to fit one."""
        rows = int(features.present.sum())
        dim = min(self.config.pca.dim, rows, features.width)
        first = features.values[features.present][:1]
        alike = rows > 1 and bool((features.values[features.present] == first).all())
        if alike:
            console.print(f"{name}: all {rows} items have the same one, so it is left out", highlight=False)
        if rows < 2 or alike:
            values = torch.zeros(len(features.present), 1)
            return {name: values, f"{name}_present": torch.zeros_like(features.present)}
        if dim < self.config.pca.dim:
            console.print(
                f"{name}: {rows} items × {features.width} features, so PCA keeps {dim}", highlight=False
            )
        fitted = PCA.fit(features, dim=dim, seed=self.config.seed).without_noise()
        pca = dataclasses.replace(fitted, whiten=self.config.pca.whiten)
        pca.save(folder / f"pca_{name}.safetensors")
        kept = float(pca.explained_variance_ratio.sum())
        console.print(
            f"{name}: {rows} of {len(features.present)} items, PCA keeps {kept:.1%} of the variance",
            highlight=False,
        )
        return {name: pca.transform(features.values, features.present), f"{name}_present": features.present}

    def _build_graph(self, folder: Path) -> None:
        data = self.load_data()
        with StageLog(folder) as log:
            made = train_lightgcn(
                data.split().train, data.num_items, config=self.config.graph, device=self.device, log=log
            )
        files.save_tensors(
            {"collab": made.values, "collab_present": made.present}, folder / "graph.safetensors"
        )

    def _build_tokenizer(self, folder: Path) -> None:
        values, present = self.load_features()
        without = tuple(k for k in self.config.without if k in MODALITIES)
        with StageLog(folder) as log:
            made = train_tokenizer(
                values, present, config=self.config.tokenizer, without=without, device=self.device, log=log
            )
        made.save(folder)
        items = made.features(values, present)
        codes, z = made.tokenize(items)
        tensors = {"codes": codes, "z": z, "attention": made.attention(items), "present": items.present}
        files.save_tensors(tensors, folder / "items.safetensors")

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
            f"catalog: {unique.colliding_before} of {len(unique.codes)} items collided, none does now; "
            f"{unique.changed_share:.2%} of the codes were changed", highlight=False,
        )  # fmt: skip

    def _build_generator(self, folder: Path) -> None:
        try:
            trained = read_clock(folder) is not None
        except DamagedError as error:
            console.print(f"generator: trained again, for {error.message}", highlight=False, soft_wrap=True)
            trained = False
        if not trained:
            self._train_generator(folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # five times the weights

    def _train_generator(self, folder: Path) -> None:
        data = self.load_data()
        catalog = self.load_catalog().first(data.num_items)  # without items that were added later
        torch.manual_seed(self.config.seed)
        model, vocabulary = self._backbone(catalog)
        if self.config.backbone.codebook_init:
            codebooks = self.load_tokenizer().model.codebooks.detach()
            start_from_codebooks(model, vocabulary, codebooks)
        prompter = self.prompter(model, vocabulary, catalog)
        split = data.split()
        sample = seeded_sample(split, self.config.decoding.validation_users, seed=self.config.seed)

        def validate(trained: PreTrainedModel) -> float:
            rank = self.ranker(trained, vocabulary, catalog, beams=self.config.decoding.validation_beams)
            beams = self.config.decoding.validation_beams
            done = evaluate(
                rank, split, part="valid", users=sample, max_list=beams, progress=False, batch_size=128
            )
            return done.metrics["NDCG@10"]

        self.ranker(model, vocabulary, catalog, beams=1)  # refuses what cannot be decoded before it trains
        resumes = (folder / "checkpoints" / "checkpoint.safetensors").is_file()
        with StageLog(folder, resumes=resumes) as log:
            progress = train_generator(
                model, vocabulary, prompter, split.train, catalog.trie, validate=validate,
                config=self.config.generator, folder=folder / "checkpoints", device=self.device,
                dtype=self.config.dtype, log=log, identity=self.run.keys.get("generator", ""),
            )  # fmt: skip
        files.save_tensors(weights_of(model), folder / "weights.safetensors")
        files.write_json(folder / "vocabulary.json", vocabulary.to_dict())
        best = {
            "best_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "validation_ndcg10": progress.best,
        }
        files.write_json(folder / "training.json", best)
        write_clock(folder, progress.seconds)

    # ---- what is there

    def file(self, stage: str, name: str) -> Path:
        """The path of a file of a finished stage, verified unless the pipeline was opened otherwise.

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

    def ranker(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        catalog: Catalog,
        *,
        beams: int,
        engine: str = "cemg",
        exclude_history: bool = False,
        removed: Sequence[int] = (),
    ) -> Rank:
        """Histories to ranked catalog rows through beam search; lists of ``beams`` at most.

        ``exclude_history`` keeps each history's items out of the search, as in ``Recommender.recommend``; of
        engine "cemg" alone. ``removed``: catalog rows that are never listed.
        """
        prompter = self.prompter(model, vocabulary, catalog)
        decoder = make_decoder(
            engine, model, catalog, vocabulary.code_token_start, self.config.decoding.normalize
        )
        size = self.config.decoding.batch_size
        offered = None
        if removed and isinstance(decoder, Decoder):
            kept = torch.ones(len(catalog), dtype=torch.bool)
            kept[list(removed)] = False
            offered = ItemFilter.from_mask(catalog.trie, kept).to(decoder.trie.device)

        def rank(histories: list[np.ndarray], top: int) -> Tensor:
            model.eval()
            parts = [histories[i : i + size] for i in range(0, len(histories), size)]
            return torch.cat([search(part) for part in parts])[:, :top]

        def search(part: list[np.ndarray]) -> Tensor:
            prompts, width = prompter.batch(part), min(beams, len(catalog))
            if not isinstance(decoder, Decoder):
                items = decoder.decode(*prompts, width).items.cpu()
                gone = torch.isin(items, torch.tensor([*removed], dtype=torch.int64))
                return items.masked_fill(gone, -1)  # which holds no place
            if not exclude_history:
                return decoder.decode(*prompts, width, filter=offered).items
            own = RequestFilter.excluding(decoder.trie, [history.tolist() for history in part])
            return decoder.decode(*prompts, width, filter=own if offered is None else own & offered).items

        return rank

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


def make_decoder(
    engine: str, model: PreTrainedModel, catalog: Catalog, code_token_start: int, normalize: Any
) -> Decoder | TransformersDecoder | VllmDecoder:
    """The decoder of that name: "cemg", "transformers", the yardstick, or "vllm"."""
    if engine == "cemg":
        return Decoder(model, catalog, code_token_start, normalize)
    if engine == "transformers":
        return TransformersDecoder(model, catalog, code_token_start, normalize)
    if engine == "vllm":
        return VllmDecoder(model, catalog, code_token_start, normalize)
    raise UserError(f"engine {engine!r} is not there", fix="one of cemg, transformers, vllm")


def _read_source(source: DataConfig) -> Dataset:
    """The interactions and items that the configuration names; what the reader has to say is printed."""
    data = read_dataset(
        Path(source.path),
        format=source.format,
        name=source.name or None,
        items=Path(source.items) if source.items else None,
        images=Path(source.images) if source.images else None,
        columns=ColumnNames.parse(source.columns) if source.columns else None,
        separator=source.separator,
        encoding=source.encoding,
        min_count=source.min_count,
        min_rating=source.min_rating,
        ties=source.ties,
        duplicates=source.duplicates,
        drop_duplicates=source.drop_duplicates,
    )
    for note in data.notes:
        console.print(f"data: {note}", highlight=False)
    return data


def _missing(features: Features, data: Dataset) -> dict[str, str]:
    """Item id to the reason why it has not this modality."""
    rows = torch.nonzero(~features.present).flatten().tolist()
    return {data.item_ids[r]: features.reasons.get(r, "none given") for r in rows}
