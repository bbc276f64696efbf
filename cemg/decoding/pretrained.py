"""A checkpoint folder with its catalog: ``transformers`` loads the model, and ``Decoder`` both."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from cemg.errors import UserError
from cemg.loading import MODELS
from cemg.storage import files
from cemg.tokenizer import Catalog, CodeTokens

CATALOG = "cemg_catalog"  # a subfolder of the checkpoint's folder
SETTINGS = "cemg_decoder.json"  # in that folder
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def save_pretrained(
    folder: Path | str, model: PreTrainedModel, catalog: Catalog, *, tokens: CodeTokens, normalize: str,
    prompts: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a model, its catalog and its token map to one folder. Other files in it stay.

    Args:
        folder: The folder, created if it does not exist.
        model: The model; adapters are merged into a copy of its weights.
        catalog: The catalog.
        tokens: The token of each code.
        normalize: The ``normalize`` of the ``Decoder`` that loads it.
        prompts: Settings of prompts, stored with it.

    Raises:
        UserError: If ``folder`` is a file or holds adapters, or if the model's adapters cannot be merged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if (folder / "adapter_config.json").exists():  # transformers would load them on top of the merged weights
        raise UserError(f"{folder} holds adapters", fix="name another folder")
    plain = plain_model(model)
    part, written = folder.with_name(f".{folder.name}.part"), set[str]()
    shutil.rmtree(part, ignore_errors=True)
    try:
        files.make_folder(part)
        plain.save_pretrained(part)
        catalog.with_tokens(tokens).save(part / CATALOG)
        about = {"format": 1, "normalize": normalize, **({"prompts": dict(prompts)} if prompts else {})}
        files.write_json(part / CATALOG / SETTINGS, about)
        if not folder.exists():
            files.replace_folder(part, folder)
            return
        files.replace_folder(part / CATALOG, folder / CATALOG)
        files.sync_tree(part)
        for file in sorted(part.iterdir()):
            files.move(file, folder / file.name)
            written.add(file.name)
        for old in folder.iterdir():  # weights that were split into other files
            if WEIGHTS.fullmatch(old.name) and old.name not in written:
                old.unlink()
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_pretrained(folder: Path | str, *, device: str = "cpu") -> tuple[PreTrainedModel, Catalog, str]:
    """Load a folder that ``save_pretrained`` wrote.

    Returns:
        The model in evaluation mode, the catalog with its token map, and ``normalize``.

    Raises:
        UserError: If a part is missing or damaged, or if weights are missing or unexpected.
    """
    folder = Path(folder)
    if not (folder / CATALOG / SETTINGS).is_file():
        raise UserError(
            f"{folder} holds no {CATALOG}/{SETTINGS}",
            cause="only save_pretrained of a Decoder or a Recommender writes it",
            fix="Decoder(model, Catalog.read(…)) serves any other checkpoint",
        )
    about = _settings(folder / CATALOG / SETTINGS)
    catalog = Catalog.load(folder / CATALOG)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with MODELS:
            model, report = family.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # its type depends on the damage
        cause = str(error).strip().splitlines()
        raise UserError(f"{folder} holds no readable model", cause=cause[0] if cause else None) from error
    for problem in ("missing", "unexpected"):
        weights = report[f"{problem}_keys"]
        if weights:
            raise UserError(f"{folder}: {len(weights)} weights are {problem}", cause=min(weights))
    return model.to(device).eval(), catalog, about["normalize"]


def _settings(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about["normalize"], str):
            raise ValueError("normalize is not a text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged", cause=f"{type(error).__name__}: {error}", fix="save it again"
        ) from error
    return cast(dict[str, Any], about)


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model with LoRA merged in a copy; itself if it has no adapters.

    Raises:
        UserError: For other adapters, and for adapters over quantized weights.
    """
    if hasattr(model, "peft_config"):
        kinds = ", ".join(sorted({str(one.peft_type.value) for one in cast(Any, model).peft_config.values()}))
        try:
            model = copy.deepcopy(cast(Any, model)).merge_and_unload(safe_merge=True)
        except Exception as error:  # its type depends on the adapter
            raise UserError(
                f"adapters of the kind {kinds} cannot be merged into this model", cause=str(error),
                fix="merge them yourself, and make the Decoder of the merged model",
            ) from error  # fmt: skip
    return without_gguf_mark(model)


def without_gguf_mark(model: PreTrainedModel) -> PreTrainedModel:
    """A model that can be saved: one read from GGUF is marked as quantized, though its weights are plain."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return model
    plain: Any = copy.copy(model)
    plain.hf_quantizer, plain.config = None, copy.deepcopy(model.config)
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return cast(PreTrainedModel, plain)
