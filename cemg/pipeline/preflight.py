"""Checks that fail in seconds, before the first stage, what a later stage would reject after hours.

Only configurations and tokenizers of models are loaded, not their weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cemg.dense import DenseRanker
from cemg.distributed import World
from cemg.errors import UserError
from cemg.features import check_image_model, check_text_model
from cemg.generator.training import check_parts
from cemg.graph.lightgcn import check_columns
from cemg.storage.manifest import Manifest
from cemg_kernels.trie.arrays import MAX_LEVELS

if TYPE_CHECKING:
    from cemg.config import RunConfig
    from cemg.data import Dataset
    from cemg.generator import BackboneConfig
    from cemg.storage.run import Run

MISSING = 0.5  # share of the images that may not exist
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def check_before_training(config: RunConfig, data: Dataset, run: Run) -> None:
    """Raise UserError if items, codes, models and lengths do not fit together.

    A model that a finished stage of ``run`` was built with is not checked again: it may be deleted by now.
    """
    _check_modalities(config, data)
    _check_capacity(config, data.num_items)
    _check_heads(config.backbone)
    features, generator = _config_of(run, "features"), _config_of(run, "generator")
    plain = config.to_dict()
    if any(data.texts) and features.get("text") != plain["text"]:
        check_text_model(config.text)
    if any(data.images) and features.get("image") != plain["image"]:
        check_image_model(config.image)
    if any(data.images) and not run.path("features").exists():
        _check_images(config, data)
    if config.gate.dense:
        DenseRanker.load(config.gate.dense).check_data(config.gate.dense, data.split())
    if config.backbone.pretrained and generator.get("backbone") != plain["backbone"]:
        _check_pretrained(config)


def check_world(config: RunConfig, world: World) -> None:
    """Raise UserError if the processes do not divide what they share: batches, and columns of embeddings."""
    check_parts(config.generator, world)
    check_columns(config.graph, world)
    if config.tokenizer.batch_size % world.size:
        size = -(-config.tokenizer.batch_size // world.size) * world.size
        raise UserError(
            f"{world.size} processes cannot divide tokenizer.batch_size={config.tokenizer.batch_size} evenly",
            fix=f"--set tokenizer.batch_size={size}, or another number of processes",
        )


def _config_of(run: Run, stage: str) -> dict[str, Any]:
    """The settings that a finished stage was built with; {} if there is none."""
    try:
        return Manifest.read(run.path(stage)).config
    except UserError:
        return {}


def _check_modalities(config: RunConfig, data: Dataset) -> None:
    available = {"text": any(data.texts), "image": any(data.images), "collab": True}
    left = [name for name, exists in available.items() if exists and name not in config.without]
    if not left:
        absent = " and ".join(f"{name}s" for name in ("text", "image") if not available[name])
        raise UserError(
            "no features are left for the semantic IDs",
            cause=f"without: {', '.join(config.without)}"
            + (f"; the items have no {absent}" if absent else ""),
            fix="--set 'without=[]', or remove fewer parts",
        )


def _check_images(config: RunConfig, data: Dataset) -> None:
    """Most images exist. A few that do not are masked; more are a folder that was moved."""
    named = [path for path in data.images if path is not None]
    missing = [path for path in named if not path.is_file()]
    if "image" not in config.without and len(missing) > MISSING * len(named):
        raise UserError(
            f"{len(missing):,} of the {len(named):,} images of {data.name} do not exist",
            cause=f"the first is {missing[0]}",
            fix="bring them back, prepare the data again with --images, or train --without image",
        )


def _check_capacity(config: RunConfig, items: int) -> None:
    """Every item needs a unique semantic ID."""
    tokenizer = config.tokenizer
    suffix = tokenizer.unique == "suffix"
    levels = tokenizer.levels + suffix
    if levels > MAX_LEVELS:
        raise UserError(
            f"tokenizer.levels={tokenizer.levels} and a suffix are {levels} codes per item; the limit is "
            f"{MAX_LEVELS}",
            fix="--set tokenizer.unique=assign, or fewer levels",
        )
    room = tokenizer.codebook_size**levels
    if items > room:
        raise UserError(
            f"{items:,} items do not fit {levels} levels of {tokenizer.codebook_size} codes",
            cause=f"there are {room:,} semantic IDs",
            fix="increase tokenizer.levels or tokenizer.codebook_size",
        )


def _check_heads(backbone: BackboneConfig) -> None:
    """Rotary embeddings need an even head width."""
    rotary = backbone.kind == "scratch" and backbone.architecture == "llama"
    if rotary and backbone.dim // backbone.heads % 2:
        raise UserError(
            f"backbone.dim={backbone.dim} and backbone.heads={backbone.heads} make heads of "
            f"{backbone.dim // backbone.heads}, which is odd",
            fix="choose a dim that is an even multiple of heads",
        )


def _check_pretrained(config: RunConfig) -> None:
    """The checkpoint exists, is of the given kind, and has enough positions for the prompts."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    backbone = config.backbone
    about = _load_config(backbone)
    name, seq2seq = type(about).__name__, bool(getattr(about, "is_encoder_decoder", False))
    if backbone.kind == "t5" and not seq2seq:
        raise UserError(
            f"backbone.pretrained={backbone.pretrained} is not an encoder-decoder", cause=f"it has a {name}",
            fix="--set backbone.kind=causal",
        )  # fmt: skip
    if backbone.kind == "causal" and (seq2seq or type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UserError(
            f"backbone.pretrained={backbone.pretrained} is not a decoder-only language model",
            cause=f"it has a {name}",
            fix="--set backbone.kind=t5" if seq2seq else "name another model",
        )
    if backbone.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError("backbone.lora_rank needs the package peft", fix="pip install peft")
    instruction = _instruction_length(backbone)
    if backbone.kind == "causal":
        _check_positions(config, about, instruction)


def _load_config(backbone: BackboneConfig) -> Any:
    from transformers import AutoConfig

    folder = Path(backbone.pretrained)
    gguf = {"gguf_file": backbone.gguf_file} if backbone.gguf_file else {}
    try:
        found = AutoConfig.from_pretrained(backbone.pretrained, trust_remote_code=False, **gguf)
    except (OSError, ValueError, ImportError, KeyError) as error:
        where = "folder" if folder.exists() else "hub name (is the network reachable?)"
        raise UserError(
            f"backbone.pretrained={backbone.pretrained} cannot be loaded as a {where}",
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="name a folder with config.json and weights, or a model of the Hugging Face hub",
        ) from error
    if folder.is_dir() and not gguf and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(
            f"{folder} has no weights", cause="no *.safetensors and no *.bin", fix="complete the folder"
        )
    return found


def _instruction_length(backbone: BackboneConfig) -> int:
    """Number of tokens of the instruction. Raises UserError if the checkpoint has no tokenizer."""
    if not backbone.instruction:
        return 0
    from transformers import AutoTokenizer

    gguf = {"gguf_file": backbone.gguf_file} if backbone.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone.pretrained, trust_remote_code=False, **gguf)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(
            f"backbone.instruction needs a tokenizer, but that of {backbone.pretrained} cannot be loaded",
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="add the files of the tokenizer, or remove the instruction",
        ) from error
    return len(tokenizer(backbone.instruction, add_special_tokens=False)["input_ids"])


def _check_positions(config: RunConfig, about: Any, instruction: int) -> None:
    """The longest prompt and the generated codes fit the positions of the model."""
    text = about.get_text_config() if hasattr(about, "get_text_config") else about
    limit = getattr(text, "max_position_embeddings", None)
    codes = config.tokenizer.levels + (config.tokenizer.unique == "suffix")
    needed = 1 + instruction + codes * (config.generator.history_items + 1)
    if isinstance(limit, int) and needed > limit:
        raise UserError(
            f"prompts of {needed} tokens do not fit the {limit} positions of {config.backbone.pretrained}",
            cause=f"{config.generator.history_items} history items and the next one, {codes} codes each; "
            f"{instruction} tokens of instruction",
            fix="reduce generator.history_items or tokenizer.levels",
        )
