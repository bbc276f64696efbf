"""One typed configuration for all stages, from YAML and ``name=value`` overrides."""

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
from cemg.artifacts import check_file, digest, read_text
from cemg.data.readers import ColumnNames, check_encoding
from cemg.decoding.beams import MAX_BEAMS
from cemg.errors import DamagedError, UserError
from cemg.features import ImageConfig, TextConfig
from cemg.generator import BackboneConfig, GeneratorConfig
from cemg.graph import GraphConfig
from cemg.tokenizer import TokenizerConfig
from cemg_kernels.constrained.softmax import Normalize

MAX_YAML = 100_000  # characters of a configuration, and values in it
WITHOUT = ("collab", "image", "text", "llm")
SIGNATURE = re.compile(
    r"# cemg-train wrote these settings: sha256 ([0-9a-f]{64}), generator ([0-9a-f]{64}|none)"
)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the interactions come from. An empty ``path`` means the synthetic set."""

    path: str = ""
    """A folder or file that cemg-data reads; empty is the synthetic set."""
    format: str = "auto"
    """How it is written; auto detects it. cemg-data stats --help lists the formats."""
    images: str = ""
    """Folder of images named by item id."""
    name: str = ""
    """Name of the dataset in results."""
    items: str = ""
    """File that describes the items; empty is what lies beside the interactions."""
    columns: str = ""
    """Columns of csv and parquet: user=uid,item=sku,timestamp=ts,text=title+description."""
    separator: str = ""
    """Separator of csv files; empty is the most frequent in the first line."""
    encoding: str = ""
    """Encoding of text files; empty is UTF-8, or what the byte order mark says."""
    min_count: int | None = None
    """Interactions that every user and item keeps at least; null is 5, or 0 for the sequence format."""
    min_rating: float | None = None
    """Interactions rated lower are dropped."""
    drop_duplicates: bool = False
    """Whether rows that repeat another one exactly are dropped."""
    duplicates: Literal["keep", "first", "last"] = "keep"
    """Which interactions stay where a user has an item repeatedly."""
    ties: Literal["source", "shuffle"] = "source"
    """Order of one user's interactions of equal time."""
    synthetic_users: int = 1200
    """Users of the synthetic set."""
    synthetic_items: int = 400
    """Items of the synthetic set."""

    def __post_init__(self) -> None:
        for name in ("format", "images", "items", "columns", "separator", "encoding"):
            if not self.path and getattr(self, name) not in ("", "auto"):
                raise UserError(
                    f"data.{name}={getattr(self, name)} has no effect on the synthetic set",
                    fix="name the data: --interactions FILE, or --data PATH",
                )
        if self.columns:
            ColumnNames.parse(self.columns)
        check_encoding(self.encoding)


@dataclass(frozen=True, slots=True)
class PcaConfig:
    """The projection of text and image features to ``dim`` components (SPEC §2.3)."""

    dim: int = 128
    """Components kept of each modality's features."""
    whiten: bool = False
    """Whether components are scaled to unit variance."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"pca.dim must be at least 1, got {self.dim}")


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """Beam search at the test and in early stopping."""

    beams: int = 50
    """Beams of the test."""
    validation_beams: int = 20
    """Beams of the validations during training."""
    validation_users: int = 2000
    """Users of a validation, drawn by the seed."""
    batch_size: int = 64
    """Histories searched at once."""
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
    """Everything that decides a run's results."""

    data: DataConfig = field(default_factory=DataConfig)
    """Interactions, texts and images."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text features."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Image features."""
    pca: PcaConfig = field(default_factory=PcaConfig)
    """Projection of text and image features."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """Collaborative embeddings by LightGCN."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Fusion and RQ-VAE: from features to semantic IDs."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The language model."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Training of the generator."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beam search."""
    without: tuple[str, ...] = ()
    """Ablations: any of collab, image, text, llm."""
    seed: int = 0
    """Seed of every stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32, or bfloat16 (mixed precision)."""

    def __post_init__(self) -> None:
        _check_finite(self)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}", fix="--seed 0")
        for name in self.without:
            if name not in WITHOUT:
                raise UserError(f"--without {name}: no such part", fix=f"one of {', '.join(WITHOUT)}")
        for name in ("graph", "tokenizer", "generator"):
            own = getattr(self, name).seed
            if own not in (0, self.seed):
                raise UserError(f"{name}.seed={own} has no effect: the run's seed is every stage's",
                                fix=f"--seed {own}")  # fmt: skip
        if self.generator.loss == "valid" and self.decoding.normalize != "valid":
            raise UserError(
                f"generator.loss=valid needs decoding.normalize=valid, not {self.decoding.normalize}",
                cause="codes that continue no item are never trained, so their logits say nothing",
                fix="--set decoding.normalize=valid",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as YAML and JSON hold them."""
        return TypeAdapter(RunConfig).dump_python(self, mode="json")

    def seeded(self) -> RunConfig:
        """The run's seed handed to every stage; ``--without llm`` turned into the backbone it means."""
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
    """UserError for a setting, here or in a section, that is not a finite number."""
    for part in dataclasses.fields(config):
        name, value = f"{prefix}{part.name}", getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value}")


def config_text(config: RunConfig, *, generator: str | None = None) -> str:
    """The settings of a run as a YAML file, signed in its first line.

    ``generator`` is the key of the generator that was trained with them, once there is one.
    """
    tree = config.to_dict()
    sha = digest([_parse(yaml.safe_dump(tree)), generator])
    head = f"# cemg-train wrote these settings: sha256 {sha}, generator {generator or 'none'}\n"
    return head + yaml.safe_dump(tree, sort_keys=False)


def generator_of(path: Path) -> str | None:
    """The key of the generator that belongs to a run's settings; None where the file does not tell."""
    match = SIGNATURE.match(read_text(path))
    return match[2] if match and match[2] != "none" else None


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    data_path: str = "",
    preset: str = "",
    source: Mapping[str, Any] | None = None,
    own: bool = False,
    **top: Any,
) -> RunConfig:
    """Defaults, then the preset, then a YAML file, then ``top`` (values of RunConfig), ``data_path`` and
    ``source`` (values of DataConfig), then ``section.name=value`` strings. ``own``: the file is a run's,
    where no section may be missing.

    Raises UserError naming the file or the override, the field and what it should have been.
    """
    tree = _read(path, own=own) if path is not None else {}
    tree = settings.merged(settings.preset(preset), tree) if preset else tree
    tree |= {name: value for name, value in top.items() if value is not None}
    given = dict(source or {}) | ({"path": data_path} if data_path else {})
    if given:
        if not isinstance(tree.setdefault("data", {}), dict):
            raise UserError(f"data is no section in {path}", cause=f"it is {tree['data']!r}")
        tree["data"] |= given
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
            f"{where}: {first['msg']}, got {first['input']!r:.200}", cause=str(path or "command line")
        ) from None


def _read(path: Path, *, own: bool) -> dict[str, Any]:
    check_file(path, fix="restore it from a copy" if own else "name a file that exists")
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
        raise DamagedError(f"{path} must hold sections such as `generator:`, got {type(tree).__name__}")
    _check_signature(path, text, tree, own=own)
    return {name: part for name, part in tree.items() if part is not None}  # an empty section: its defaults


def _check_signature(path: Path, text: str, tree: dict[str, Any], *, own: bool) -> None:
    """Settings that ``config_text`` wrote are unchanged; a run's own that somebody wrote are complete."""
    match = SIGNATURE.match(text)
    if match and digest([tree, None if match[2] == "none" else match[2]]) != match[1]:
        raise DamagedError(
            f"{path} was changed after cemg-train had written it",
            cause="its settings do not have the sha256 in its first line",
            fix="restore it from a copy; or, if the change is yours, delete the first line",
        )
    missing = [field.name for field in dataclasses.fields(RunConfig) if field.name not in tree]
    if own and not match and missing:
        raise DamagedError(f"{path} is damaged", cause=f"{missing[0]} is missing in it",
                           fix="restore it from a copy")  # fmt: skip


def _parse(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError also where it is too large once aliases are expanded."""
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"a configuration has at most {MAX_YAML:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _expanded(node, {}) > MAX_YAML:
            raise yaml.YAMLError(f"its aliases expand to more than {MAX_YAML:,} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # of numbers and dates
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are below ``node``, itself included, an aliased one counted at each place."""
    if id(node) not in known:
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _first_line(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the excerpt below it."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{where}"


def _override(tree: dict[str, Any], override: str) -> None:
    name, sign, value = override.partition("=")
    if not sign:
        raise UserError(f"--set {override}: no value", fix="write it as --set generator.epochs=10")
    *sections, last = name.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict | None):
            raise UserError(f"--set {override}: {section} is no section", cause=f"it is {tree[section]!r}")
        tree[section] = tree.get(section) or {}
        tree = tree[section]
    try:
        tree[last] = _parse(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML", cause=_first_line(error)) from error


def _checked_names(tree: dict[str, Any], kind: type, path: Path | None, prefix: str = "") -> dict[str, Any]:
    """Refuse names that the configuration does not have: a typo must not pass."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in tree.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            raise UserError(
                f"{prefix}{name} is not a setting",
                cause=str(path or "command line"),
                fix=(f"{prefix}{near[0]}? " if near else "") + f"one of {', '.join(fields)}",
            )
        part = fields[name].default_factory
        if dataclasses.is_dataclass(part) and isinstance(value, dict):
            _checked_names(value, part, path, f"{prefix}{name}.")  # type: ignore[arg-type]
    return tree
