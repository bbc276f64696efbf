"""Pre-trained checkpoints: loading with all weights, and extending the vocabulary by the codes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from cemg.errors import UserError

# Buffers in checkpoints of older transformers, which models compute themselves today.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")


def load_checkpoint(kind: Literal["t5", "causal"], name: str, gguf_file: str = "") -> PreTrainedModel:
    """Load a model in float32.

    Args:
        kind: "t5", an encoder-decoder, or "causal", a decoder.
        name: Name on the Hugging Face hub, or a folder.
        gguf_file: GGUF file in it; "" for none.

    Raises:
        UserError: The model cannot be loaded or is of the other kind, or the weights of the checkpoint are
            not exactly those of its class.
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
    """Raise UserError if a loading report has missing, unexpected or mismatched weights."""
    missing = sorted(report["missing_keys"])
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not COMPUTED.search(key))
    faults = {"are missing": missing, "have another shape": mismatched, "are unknown to it": unexpected}
    for fault, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"backbone.pretrained={name}: {len(keys)} weights of its {kind} {fault}",
                cause=f"{', '.join(keys[:3])}{more}",
                fix="name a complete checkpoint of a language model with its head",
            )


def _not_loaded(kind: str, name: str, error: Exception) -> UserError:
    where = "folder" if Path(name).exists() else "hub name (is the network reachable?)"
    cause = str(error).strip().splitlines()
    other_kind = "Unrecognized configuration class" in str(error)
    return UserError(
        f"backbone.pretrained={name} cannot be loaded as a {where}",
        cause=cause[0] if cause else type(error).__name__,
        fix=f"--set backbone.kind={'causal' if kind == 't5' else 't5'}, since the model is of the other kind"
        if other_kind
        else "name a folder with config.json and weights, or a model of the Hugging Face hub",
    )


def add_tokens(model: PreTrainedModel, size: int, *, similar: bool = True) -> None:
    """Set the number of tokens of embeddings and head to ``size``. An untied head stays untied.

    New embeddings are drawn; ``similar`` gives them the mean and covariance of the others.

    When transformers resizes, it ties the separate heads of Flan-T5, T5 1.1, mT5 and UMT5, because the
    configuration of every T5 says ``tie_word_embeddings``.
    """
    config: Any = model.config
    configured = config.tie_word_embeddings
    if not tied(model):
        config.tie_word_embeddings = False
    try:
        model.resize_token_embeddings(size, mean_resizing=similar)
    finally:
        config.tie_word_embeddings = configured


def tied(model: PreTrainedModel) -> bool:
    """Whether head and input embeddings are the same weight; True if there is no head."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return head is None or head.weight is embedding.weight
