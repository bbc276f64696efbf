"""Chooses the engine of a search by its name."""

from __future__ import annotations

from transformers import PreTrainedModel

from cemg.decoding.engine import Decoder
from cemg.decoding.free import FreeDecoder
from cemg.decoding.integrations.transformers import TransformersDecoder
from cemg.decoding.integrations.vllm import VllmDecoder
from cemg.errors import UserError
from cemg.tokenizer import Catalog
from cemg_kernels.constrained.softmax import Normalize


def make_decoder(
    engine: str, model: PreTrainedModel, catalog: Catalog, code_token_start: int, normalize: Normalize
) -> Decoder | FreeDecoder | TransformersDecoder | VllmDecoder:
    """The decoder of engine "cemg", "free", "transformers" or "vllm". Raises UserError for another name."""
    if engine == "cemg":
        return Decoder(model, catalog, code_token_start, normalize)
    if engine == "free":
        return FreeDecoder(Decoder(model, catalog, code_token_start, normalize))
    if engine == "transformers":
        return TransformersDecoder(model, catalog, code_token_start, normalize)
    if engine == "vllm":
        return VllmDecoder(model, catalog, code_token_start, normalize)
    raise UserError(f"unknown engine {engine!r}", fix="choose one of cemg, free, transformers, vllm")
