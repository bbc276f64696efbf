"""Pre-trained models in their own class and with all of their weights, and room for the codes in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from cemg.errors import UserError

# Of older transformers: buffers that a model computes itself today.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")


def load_checkpoint(kind: Literal["t5", "causal"], name: str, gguf_file: str = "") -> PreTrainedModel:
    """The model of that hub name or folder in float32: an encoder-decoder (``t5``) or a decoder (``causal``).

    Raises UserError where it cannot be loaded, is of the other kind, or where its class has weights that the
    checkpoint lacks, or the checkpoint weights that the class has no place for.
    """
    family: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        model, report = family.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(kind, name, error) from error
    check_whole(name, type(model).__name__, report)
    config: Any = model.config
    if kind == "t5" and getattr(config, "decoder_start_token_id", None) is None:  # transformers 5 moves it
        start = getattr(model.generation_config, "decoder_start_token_id", None)
        config.decoder_start_token_id = config.pad_token_id if start is None else start
    return cast(PreTrainedModel, model)


def check_whole(name: str, kind: str, report: Mapping[str, Any]) -> None:
    """UserError for weights that a loading report names as missing, unexpected or of another shape."""
    missing = sorted(report["missing_keys"])
    other = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not COMPUTED.search(key))
    faults = {"are missing": missing, "have another shape": other, "have no place in it": unexpected}
    for what, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"backbone.pretrained={name}: {len(keys)} weights of its {kind} {what}",
                cause=f"{', '.join(keys[:3])}{more}",
                fix="name a complete checkpoint of a language model with its head",
            )


def _not_loaded(kind: str, name: str, error: Exception) -> UserError:
    where = "folder" if Path(name).exists() else "hub name (is the network reachable?)"
    cause = str(error).strip().splitlines()
    other = "Unrecognized configuration class" in str(error)
    return UserError(
        f"backbone.pretrained={name} cannot be loaded as a {where}",
        cause=cause[0] if cause else type(error).__name__,
        fix=f"--set backbone.kind={'causal' if kind == 't5' else 't5'}, for a model of the other kind"
        if other
        else "name a folder with config.json and weights, or a model of the Hugging Face hub",
    )


def add_tokens(model: PreTrainedModel, size: int) -> None:
    """Room for ``size`` tokens in the embeddings and in the head, which stays apart where it was.

    transformers ties a head that is not the embeddings (Flan-T5's, T5 1.1's, mT5's, UMT5's) when it resizes,
    since the configuration of all T5 says so.
    """
    config: Any = model.config
    says_tied = config.tie_word_embeddings
    if not tied(model):
        config.tie_word_embeddings = False
    try:
        model.resize_token_embeddings(size)
    finally:
        config.tie_word_embeddings = says_tied


def tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embeddings; True where there is no head."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return head is None or head.weight is embedding.weight
