"""One row per beam: the model runs as ``generate()`` runs it, with any kind of cache.

This serves models that the tree mask of ``generic.py`` does not: state-space and recurrent layers, ALiBi,
local attention, encoder-decoders.

B users, W beams, R = B * W rows, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.generic import ModelOutput

from cemg.decoding.models.eval_mode import EvalModeState
from cemg.decoding.models.rope_lengths import forget_lengths, rope_of_lengths
from cemg.decoding.protocol import DecoderPlan, DecoderState, Logits, LogitsRequest, Unsupported

CACHES = ("cache", "past_key_values", "cache_params")  # the names under which ``generate`` passes a cache
# Early versions of transformers 5 take the positions of uncached tokens instead of their number.
TAKES_LENGTH = "next_sequence_length" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
RESERVED_STEPS = 64  # positions reserved after a prompt; only caches of a fixed size use it


class RowsPlan(DecoderPlan):
    """A model of ``transformers``, run through its own ``prepare_inputs_for_generation``.

    With ``cached=False`` and ``padded=False``, every row is the model's plain forward over its own tokens.

    Args:
        model: The model.
        cached: Keep the model's own cache and reorder it at every step; else recompute whole sequences.
        padded: Run all prompts in one padded batch; else group them by length, without padding.

    Raises:
        Unsupported: For a model that ``generate()`` does not serve.
    """

    uses_model_forward = True
    VARIANTS: ClassVar = (
        {"cached": True, "padded": True},
        {"cached": True, "padded": False},
        {"cached": False, "padded": False},
    )

    def __init__(self, model: PreTrainedModel, *, cached: bool = True, padded: bool = True) -> None:
        if not hasattr(model, "prepare_inputs_for_generation"):
            raise Unsupported(f"{type(model).__name__} has no prepare_inputs_for_generation")
        self.model, self.cached, self.padded = model, cached, padded

    @classmethod
    def variants(cls, model: PreTrainedModel) -> list[RowsPlan]:
        """All variants, fastest first; the last one is correct for every deterministic model."""
        return [cls(model, **options) for options in cls.VARIANTS]

    def describe(self) -> str:
        how = "with the model's own cache" if self.cached else "recomputed at every step"
        return f"the model's own forward, one row per beam, {how}" + (
            "" if self.padded else ", prompts grouped by length"
        )

    def new_state(self) -> DecoderState:
        state = RowsState(self.model, cached=self.cached) if self.padded else GroupedByLengthState(self)
        return EvalModeState(self.model, state)


class RowsState:
    """Whole sequences [R, S + m], and the other inputs that ``generate()`` would pass."""

    def __init__(self, model: PreTrainedModel, *, cached: bool) -> None:
        self.model: Any = model
        self.cached = cached
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.arguments = forward_arguments(model)
        self.depends_on_length = rope_of_lengths(model) is not None

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        mask = attention_mask.long()
        self.inputs: dict[str, Any] = {"use_cache": self.cached}
        if "logits_to_keep" in self.arguments:
            self.inputs["logits_to_keep"] = 1
        if self.seq2seq:
            if self.depends_on_length:
                forget_lengths(self.model)
            encoded = self.model.get_encoder()(input_ids=input_ids, attention_mask=mask, return_dict=True)
            self.inputs["encoder_outputs"] = encoded
            self.inputs["attention_mask"] = mask
            self.tokens = torch.full_like(input_ids[:, :1], start_token(self.model))
        else:
            self.tokens = input_ids
            self._add_mask(mask)
        self.prefill_inputs = self.tokens, dict(self.inputs)
        self.stepped = False
        return Logits.of(self._run_prompts(), request)

    def _add_mask(self, mask: Tensor) -> None:
        """Add the mask and positions of decoder-only prompts if there is padding, as ``generate()`` does."""
        if bool(mask.all()):
            return
        if "attention_mask" not in self.arguments:
            raise Unsupported("the model's forward takes no attention_mask, so prompts cannot be padded")
        self.inputs["attention_mask"] = mask
        if "position_ids" in self.arguments and hasattr(self.model, "_prepare_position_ids_for_generation"):
            positions = self.model._prepare_position_ids_for_generation
            self.inputs["position_ids"] = positions(self.tokens, {"attention_mask": mask})

    def reset_to_prefill(self) -> None:
        if self.stepped:  # the cache was reordered, and recurrent states were overwritten
            self.tokens, self.inputs = self.prefill_inputs[0], dict(self.prefill_inputs[1])
            self._run_prompts()
            self.stepped = False

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        batch, beams = tokens.shape
        previous_beams = len(self.tokens) // batch  # 1 after the prefill
        users = torch.arange(batch, device=tokens.device)[:, None] * previous_beams
        rows = (users + parents.long().clamp_min(0)).flatten()  # [R]
        if previous_beams != beams:  # all inputs but the cache are the same for all beams of a user
            self.inputs = {name: _select(name, value, rows) for name, value in self.inputs.items()}
        self._reorder(rows)
        self.tokens = torch.cat((self.tokens[rows], tokens.reshape(-1, 1)), dim=1)
        self.stepped = True
        logits = self._forward(new=1 if self.cached else None)
        return Logits.of(logits.view(batch, beams, -1), request)

    def _run_prompts(self) -> Tensor:
        """Logits [B, 1, V] after the prompts, with a new cache."""
        if self.cached:
            self._add_cache()
        return self._forward(first=True)[:, None]

    def _add_cache(self) -> None:
        """Add a new cache to the inputs, as ``generate()`` creates it for this model.

        A plain encoder-decoder gets a dynamic cache: for it ``generate()`` counts the encoder's layers.
        """
        name = "cache" if "cache" in self.arguments else "past_key_values"
        prepare = plain(self.model)._prepare_cache_for_generation
        if self.seq2seq and prepare.__func__ is GenerationMixin._prepare_cache_for_generation:
            self.inputs[name] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            return
        length = self.tokens.shape[1] + RESERVED_STEPS
        prepare(GenerationConfig(), self.inputs, GenerationMode.BEAM_SEARCH, len(self.tokens), length)

    def _forward(self, *, new: int | None = None, first: bool = False) -> Tensor:
        """Logits [R, V] after the last token. ``new``: the number of uncached tokens, None for all."""
        length = self.tokens.shape[1]
        if TAKES_LENGTH:
            self.inputs["next_sequence_length"] = new
        else:
            self.inputs["cache_position"] = torch.arange(length, device=self.tokens.device)[
                -(new or length) :
            ]
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens, is_first_iteration=first, **self.inputs
        )
        if self.depends_on_length:
            forget_lengths(self.model)
        out = self.model(**inputs, return_dict=True)
        self.inputs = self.model._update_model_kwargs_for_generation(
            out, self.inputs, is_encoder_decoder=self.seq2seq
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _reorder(self, rows: Tensor) -> None:
        """Give each row the cache of its parent ``rows`` [R]."""
        for name in CACHES:
            cache = self.inputs.get(name)
            if cache is None:
                continue
            if hasattr(self.model, "_reorder_cache"):
                self.inputs[name] = self.model._reorder_cache(cache, rows)
            elif hasattr(cache, "reorder_cache"):
                cache.reorder_cache(rows)
            else:
                raise Unsupported(f"a {type(cache).__name__} cannot be reordered")


class GroupedByLengthState:
    """Runs users whose prompts have the same number of tokens together, each group without padding."""

    def __init__(self, plan: RowsPlan) -> None:
        self.plan = plan

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        is_token = attention_mask != 0
        lengths = is_token.sum(1)
        self.groups: list[tuple[Tensor, RowsState]] = []
        parts = []
        for length in lengths.unique().tolist():
            users = (lengths == length).nonzero()[:, 0]
            ids = input_ids[users][is_token[users]].view(len(users), length)
            state = RowsState(self.plan.model, cached=self.plan.cached)
            parts.append(state.prefill(ids, torch.ones_like(ids), request))
            self.groups.append((users, state))
        return self._join(parts)

    def reset_to_prefill(self) -> None:
        for _, state in self.groups:
            state.reset_to_prefill()

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        parts = [state.decode_step(tokens[users], parents[users], request) for users, state in self.groups]
        return self._join(parts)

    def _join(self, parts: list[Logits]) -> Logits:
        """The logits of all groups, in the order of the users."""
        order = torch.cat([users for users, _ in self.groups]).argsort()
        columns = torch.cat([part.values for part in parts])[order]
        totals = [part.logsumexp for part in parts if part.logsumexp is not None]
        return Logits(columns, torch.cat(totals)[order] if totals else None)


def start_token(model: PreTrainedModel) -> int:
    """The token with which an encoder-decoder starts under ``generate()``."""
    generation: Any = getattr(model, "generation_config", None)
    for token in (
        getattr(generation, "decoder_start_token_id", None),
        getattr(model.config, "decoder_start_token_id", None),
        getattr(generation, "bos_token_id", None),
    ):
        if token is not None:
            return int(token)
    raise Unsupported("an encoder-decoder without decoder_start_token_id")


def plain(model: Any) -> Any:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_arguments(model: Any) -> set[str]:
    """The argument names of the model's forward, with those that a subclass passes on."""
    base = plain(model)
    names: set[str] = set()
    for forward in (
        base.forward,
        *(vars(kind)["forward"] for kind in type(base).__mro__ if "forward" in vars(kind)),
    ):
        parameters = signature(forward).parameters
        names |= set(parameters)
        if not any(one.kind == one.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def _select(name: str, value: Any, rows: Tensor) -> Any:
    """The rows ``rows`` [R] of an input of the model; inputs without rows are returned unchanged."""
    if isinstance(value, ModelOutput):
        return type(value)(**{part: _select(part, tensor, rows) for part, tensor in value.items()})
    if not isinstance(value, Tensor) or value.ndim == 0 or name == "cache_position":
        return value
    return value.index_select(1 if "position_ids" in name and value.ndim == 3 else 0, rows)
