"""The typed configuration of all stages, read from YAML files and ``section.name=value`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from cemg import settings
from cemg.data.readers import ColumnNames, check_encoding
from cemg.decoding.beams import MAX_BEAMS
from cemg.errors import DamagedError, UserError
from cemg.features import ImageConfig, TextConfig
from cemg.generator import BackboneConfig, GeneratorConfig
from cemg.graph import GraphConfig
from cemg.memory import MemoryConfig
from cemg.mixture.config import GateConfig
from cemg.storage.read import check_file, digest, read_text
from cemg.tokenizer import TokenizerConfig
from cemg_kernels.constrained.softmax import Normalize

MAX_YAML = 100_000  # limit for the characters of a configuration file, and for its values
WITHOUT = ("collab", "image", "text", "llm")
# What earlier versions did in place of settings that they did not have. Files that they wrote get these
# values, and the keys of stages leave them out, so that runs of these versions stay valid.
EARLIER: dict[str, dict[str, Any]] = {
    "decoding": {"validation_history": "earlier"},
    "generator": {
        "item_tokens": False,
        "item_loss": 0.0,
        "temperature": 1.0,
        "budget_hours": 0.0,
        "accumulation_steps": 1,
        "gradient_checkpointing": False,
    },
    "gate": {"memory": True},
    "backbone": {"tied": True},
    "tokenizer": {"fusion": "guided", "collab_loss": 0.0, "diversity_kind": "entropy", "clusters": 10},
}
_ABSENT = object()
ADDED_SECTIONS = ("memory", "gate")  # the settings of runs that earlier versions trained do not have them
SIGNATURE = re.compile(
    r"# cemg-train wrote these settings: sha256 ([0-9a-f]{64}), generator ([0-9a-f]{64}|none)"
)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The dataset: files, format, filters and order."""

    path: str = ""
    """Folder or file of the dataset, in any format of cemg-data; empty: the synthetic set."""
    format: str = "auto"
    """Format of the dataset; auto detects it. cemg-data stats --help lists the formats."""
    images: str = ""
    """Folder of images named by item id."""
    name: str = ""
    """Name of the dataset in result files."""
    items: str = ""
    """Items file; empty: the one found next to the interactions."""
    times: str = ""
    """File of times for the sequence format: its lines with a number in place of each item."""
    texts: Literal["all", "titles"] = "all"
    """Text of an item: all that the source has, or its title alone."""
    columns: str = ""
    """Column names of csv and parquet files: user=uid,item=sku,timestamp=ts,text=title+description."""
    separator: str = ""
    """Field separator of csv files; empty: the most frequent one in the first line."""
    encoding: str = ""
    """Encoding of text files; empty: UTF-8, or the one of the byte order mark."""
    min_count: int | None = None
    """Fewest interactions of a user or item that is kept; null: 5, or 0 for the sequence format."""
    min_rating: float | None = None
    """Interactions with a lower rating are dropped; null: none."""
    drop_duplicates: bool = False
    """Whether rows that exactly repeat another row are dropped."""
    duplicates: Literal["keep", "first", "last"] = "keep"
    """Which interactions are kept if a user has the same item several times; keep: all."""
    split: Literal["leave-one-out", "time"] = "leave-one-out"
    """Test targets: the last item of each user, or the first one after a time that is the same for all."""
    ties: Literal["source", "shuffle"] = "source"
    """Order of a user's interactions with equal timestamps."""
    synthetic_users: int = 1200
    """Number of users of the synthetic set."""
    synthetic_items: int = 400
    """Number of items of the synthetic set."""

    def __post_init__(self) -> None:
        for name in ("format", "images", "items", "times", "columns", "separator", "encoding"):
            if not self.path and getattr(self, name) not in ("", "auto"):
                raise UserError(
                    f"data.{name}={getattr(self, name)} has no effect on the synthetic set",
                    fix="name a dataset: --interactions FILE, or --data PATH",
                )
        if not self.path and self.split != "leave-one-out":
            raise UserError(
                f"data.split={self.split} has no effect on the synthetic set, which has no times",
                fix="name a dataset: --interactions FILE, or --data PATH",
            )
        if self.columns:
            ColumnNames.parse(self.columns)
        check_encoding(self.encoding)


@dataclass(frozen=True, slots=True)
class PcaConfig:
    """PCA of the text features and of the image features."""

    dim: int = 128
    """Number of components kept per modality."""
    whiten: bool = False
    """Whether the components are scaled to unit variance."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"pca.dim must be at least 1, got {self.dim}")


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """Beam search, in the test and in the validations during training."""

    beams: int = 50
    """Number of beams in the test."""
    validation_beams: int = 20
    """Number of beams in validations."""
    validation_users: int = 5000
    """Number of users in a validation, drawn with the seed; at most half of them."""
    validation_history: Literal["auto", "kept", "removed", "excluded", "earlier"] = "auto"
    """History when checkpoints are compared; auto: kept if users return, or excluded; earlier: all users."""
    batch_size: int = 64
    """Number of histories decoded at once."""
    normalize: Normalize = "vocab"
    """Codes in the log-softmax: vocab (the whole vocabulary), level, or valid (those of real items)."""

    def __post_init__(self) -> None:
        for name in ("beams", "validation_beams", "validation_users", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"decoding.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("beams", "validation_beams"):
            width = getattr(self, name)
            if width > MAX_BEAMS:
                raise UserError(f"decoding.{name} must be within 1 … {MAX_BEAMS:,}, got {width:,}")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text encoder."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """The image encoder."""
    pca: PcaConfig = field(default_factory=PcaConfig)
    """PCA of text and image features."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """Collaborative embeddings, by LightGCN."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The item memory: transitions between items, and text similarity."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Fusion and RQ-VAE, which turn features into semantic IDs."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The language model that generates semantic IDs."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Training of the generator."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beam search."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The mixture of the generator with the item memory and other experts."""
    without: tuple[str, ...] = ()
    """Parts left out for an ablation: any of collab, image, text and llm."""
    seed: int = 0
    """Random seed of all stages."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of training: float32, or bfloat16 for mixed precision where it is native."""

    def __post_init__(self) -> None:
        _check_finite(self)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}", fix="--seed 0")
        for name in self.without:
            if name not in WITHOUT:
                raise UserError(f"--without {name}: unknown part", fix=f"use one of {', '.join(WITHOUT)}")
        for name in ("graph", "tokenizer", "generator"):
            stage_seed = getattr(self, name).seed
            if stage_seed not in (0, self.seed):
                raise UserError(f"{name}.seed={stage_seed} has no effect: all stages use the run's seed",
                                fix=f"--seed {stage_seed}")  # fmt: skip
        if self.generator.loss == "valid" and self.decoding.normalize != "valid":
            raise UserError(
                f"generator.loss=valid needs decoding.normalize=valid, not {self.decoding.normalize}",
                cause="the logits of codes that continue no item are never trained",
                fix="--set decoding.normalize=valid, or --set generator.loss=vocab",
            )

        if self.generator.item_tokens and self.decoding.normalize == "vocab":
            raise UserError(
                "generator.item_tokens cannot be combined with decoding.normalize=vocab",
                cause="the softmax would run over the tokens of items, whose logits are never trained",
                fix="--set decoding.normalize=valid --set generator.loss=valid",
            )
        if self.generator.item_tokens and self.backbone.pretrained and self.backbone.kind != "scratch":
            raise UserError(
                "generator.item_tokens needs a model with random weights",
                cause=f"backbone.pretrained={self.backbone.pretrained}",
                fix="--set generator.item_tokens=false, or --set backbone.kind=scratch",
            )
        if self.tokenizer.collab_loss and self.graph.dim != self.tokenizer.latent:
            raise UserError(
                "tokenizer.collab_loss needs collaborative embeddings of the width of the quantized vector",
                cause=f"graph.dim={self.graph.dim}, tokenizer.latent={self.tokenizer.latent}",
                fix=f"--set graph.dim={self.tokenizer.latent}, or --set tokenizer.collab_loss=0",
            )

    @property
    def mixes(self) -> bool:
        """Whether the generator has another expert: the item memory, its item softmax or a dense model."""
        return bool(self.gate.memory or self.gate.dense or self.generator.item_loss)

    def to_dict(self) -> dict[str, Any]:
        """Convert the settings to dicts, lists and scalars, as written to YAML and JSON."""
        tree: dict[str, Any] = TypeAdapter(RunConfig).dump_python(self, mode="json")
        return tree

    def seeded(self) -> RunConfig:
        """Return a copy in which every stage has the run's seed.

        ``without=llm`` selects its backbone, a small decoder trained from scratch.
        """
        parts = {
            name: dataclasses.replace(getattr(self, name), seed=self.seed)
            for name in ("graph", "tokenizer", "generator")
        }
        if "llm" in self.without:
            parts["backbone"] = dataclasses.replace(
                self.backbone,
                kind="scratch",
                pretrained="",
                gguf_file="",
                instruction="",
                layers=6,
                lora_rank=0,
            )
        return dataclasses.replace(self, **parts)


def _check_finite(config: Any, prefix: str = "") -> None:
    """Raise UserError for a number, here or in a section, that is not finite."""
    for part in dataclasses.fields(config):
        name, value = f"{prefix}{part.name}", getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value}")


def config_text(config: RunConfig, *, generator: str | None = None) -> str:
    """Format the settings of a run as YAML, with their sha256 in the first line.

    Args:
        config: The settings.
        generator: Key of the generator that was trained with them; None before that.
    """
    tree = config.to_dict()
    sha = digest([_parse(yaml.safe_dump(tree)), generator])
    head = f"# cemg-train wrote these settings: sha256 {sha}, generator {generator or 'none'}\n"
    return head + yaml.safe_dump(tree, sort_keys=False)


def generator_of(path: Path) -> str | None:
    """Return the key of the generator trained with the settings in ``path``; None if not recorded."""
    match = SIGNATURE.match(read_text(path))
    return match[2] if match and match[2] != "none" else None


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    data_path: str = "",
    preset: str = "",
    source: Mapping[str, Any] | None = None,
    of_run: bool = False,
    **top: Any,
) -> RunConfig:
    """Build a configuration. Later sources override earlier ones.

    The order is: defaults, ``preset``, the file at ``path``, ``top``, ``source`` and ``data_path``,
    ``overrides``.

    Args:
        path: YAML file of settings.
        overrides: Strings of the form ``section.name=value``.
        data_path: Value of ``data.path``.
        preset: Name of a preset.
        source: Values of `DataConfig`.
        of_run: Whether the file belongs to a run, so that all sections must be present.
        top: Values of `RunConfig`; None values are ignored.

    Raises:
        UserError: A setting is unknown or invalid. The error names the file or override, the setting and the
            expected value.
    """
    tree = _read(path, of_run=of_run) if path is not None else {}
    tree = settings.merged(settings.preset(preset), tree) if preset else tree
    tree |= {name: value for name, value in top.items() if value is not None}
    data = dict(source or {}) | ({"path": data_path} if data_path else {})
    if data:
        if not isinstance(tree.setdefault("data", {}), dict):
            raise UserError(f"data is not a section in {path}", cause=f"it is {tree['data']!r}")
        tree["data"] |= data
    for override in overrides:
        _override(tree, override)
    try:
        return TypeAdapter(RunConfig).validate_python(_checked_names(tree, RunConfig, path))
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(first.get("ctx", {}).get("error"), UserError):
            raise first["ctx"]["error"] from None
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: {first['msg']}, got {first['input']!r:.200}",
            cause="command line"
            if where in {o.partition("=")[0] for o in overrides} or not path
            else str(path),
        ) from None


def _read(path: Path, *, of_run: bool) -> dict[str, Any]:
    check_file(path, fix="restore it from a copy" if of_run else "name a file that exists")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML + 1)
        tree = _parse(text) or {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not UTF-8 text", cause=str(error)) from error
    except yaml.YAMLError as error:
        raise DamagedError(f"{path} is not valid YAML", cause=_first_line(error)) from error
    if not isinstance(tree, dict):
        raise DamagedError(f"{path} must contain sections such as `generator:`, got {type(tree).__name__}")
    _check_signature(path, text, tree, of_run=of_run)
    if of_run or SIGNATURE.match(text):
        tree = with_earlier(tree)
    return {name: part for name, part in tree.items() if part is not None}  # empty sections keep defaults


def with_earlier(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with the values of EARLIER for those that the file does not have."""
    filled = dict(tree)
    for section, values in EARLIER.items():
        if isinstance(filled.get(section), dict):
            filled[section] = values | filled[section]
    return filled


def keyed(config: RunConfig, section: str) -> dict[str, Any]:
    """Return the settings of a section that identify a stage: all that differ from EARLIER."""
    earlier = EARLIER.get(section, {})
    values = dataclasses.asdict(getattr(config, section))
    return {name: value for name, value in values.items() if earlier.get(name, _ABSENT) != value}


def _check_signature(path: Path, text: str, tree: dict[str, Any], *, of_run: bool) -> None:
    """Raise DamagedError if a signed file was changed, or an unsigned file of a run is incomplete."""
    match = SIGNATURE.match(text)
    if match and digest([tree, None if match[2] == "none" else match[2]]) != match[1]:
        raise DamagedError(
            f"{path} was changed after cemg-train wrote it",
            cause="the sha256 in its first line does not match its settings",
            fix="restore it from a copy; or, if you made the change, delete the first line",
        )
    required = [part.name for part in dataclasses.fields(RunConfig) if part.name not in ADDED_SECTIONS]
    missing = [name for name in required if name not in tree]
    if of_run and not match and missing:
        raise DamagedError(f"{path} is damaged", cause=f"the section {missing[0]} is missing",
                           fix="restore it from a copy")  # fmt: skip


def _parse(text: str) -> Any:
    """Parse YAML. Raises YAMLError for invalid text, and for text too large or with too many aliases."""
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"it has more than {MAX_YAML:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_YAML:
            raise yaml.YAMLError(f"its aliases expand to more than {MAX_YAML:,} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # invalid numbers and dates
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count ``node`` and the nodes below it, an aliased one at each of its uses. ``sizes`` caches by id."""
    if id(node) not in sizes:
        entries = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for entry in entries for child in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _first_line(error: yaml.YAMLError) -> str:
    """Return the problem and its position, without the excerpt that PyYAML appends."""
    mark = getattr(error, "problem_mark", None)
    position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{position}"


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply one ``section.name=value`` to ``tree``."""
    name, sign, value = override.partition("=")
    if not sign:
        raise UserError(f"--set {override} has no value", fix="write it as --set generator.epochs=10")
    *sections, last = name.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict | None):
            raise UserError(f"--set {override}: {section} is not a section", cause=f"it is {tree[section]!r}")
        tree[section] = tree.get(section) or {}
        tree = tree[section]
    try:
        tree[last] = _parse(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML", cause=_first_line(error)) from error


def _checked_names(tree: dict[str, Any], kind: type, path: Path | None, prefix: str = "") -> dict[str, Any]:
    """Return ``tree``, with "" for empty text. Raises UserError for a name that is not a setting."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in tree.items():
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, n=1)
            raise UserError(
                f"{prefix}{name} is not a setting",
                cause=str(path or "command line"),
                fix=(f"did you mean {prefix}{nearest[0]}? " if nearest else "")
                + f"use one of {', '.join(fields)}",
            )
        if value is None and fields[name].type == "str":  # YAML reads nothing as null
            tree[name] = ""
        section = fields[name].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section) and isinstance(value, dict):
            _checked_names(value, section, path, f"{prefix}{name}.")
    return tree
