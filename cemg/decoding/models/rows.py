"""Steppers with one row per beam: the model runs as ``generate()`` runs it, whatever its cache is.

They serve models that the tree mask of ``generic.py`` does not: state-space and recurrent layers, ALiBi,
local attention, encoder-decoders. B users, W beams, R = B * W rows, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import ModelOutput

from cemg.decoding.models.eval_mode import EvalModeState
from cemg.decoding.models.rope_lengths import forget_lengths, rope_of_lengths
from cemg.decoding.protocol import DecoderPlan, DecoderState, Logits, LogitsRequest, Unsupported

CACHES = ("cache", "past_key_values", "cache_params")  # names under which ``generate`` passes a cache
# how many tokens the cache lacks; early versions of transformers 5 take their positions instead
CUTS_BY_LENGTH = "next_sequence_length" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
STEPS_AHEAD = 64  # positions reserved behind a prompt; only caches of a fixed size read it


class RowsPlan(DecoderPlan):
    """A model of ``transformers``, run through its own ``prepare_inputs_for_generation``.

    ``cached``: keep the model's own cache and reorder it at every step; otherwise whole sequences are
    recomputed at every step. ``padded``: run all prompts in one padded batch; otherwise group them by length,
    without padding. Without both, every row is the model's plain forward over its own tokens. Raises
    Unsupported for a model that ``generate()`` does not serve.
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
        """All of them, the fastest first; the last one is right for every deterministic model."""
        return [cls(model, **options) for options in cls.VARIANTS]

    def describe(self) -> str:
        how = "with the model's own cache" if self.cached else "recomputed at every step"
        return f"the model's own forward, one row per beam, {how}" + (
            "" if self.padded else ", prompts grouped by length"
        )

    def new_state(self) -> DecoderState:
        """A state for one batch."""
        state = RowsState(self.model, cached=self.cached) if self.padded else GroupedByLengthState(self)
        return EvalModeState(self.model, state)


class RowsState:
    """Rows of whole sequences [R, S + m] and what ``generate()`` would pass beside them."""

    def __init__(self, model: PreTrainedModel, *, cached: bool) -> None:
        self.model: Any = model
        self.cached = cached
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.arguments = forward_arguments(model)
        self.follows_length = rope_of_lengths(model) is not None

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        mask = attention_mask.long()
        self.inputs: dict[str, Any] = {"use_cache": self.cached}
        if "logits_to_keep" in self.arguments:
            self.inputs["logits_to_keep"] = 1
        if self.seq2seq:
            if self.follows_length:
                forget_lengths(self.model)
            encoded = self.model.get_encoder()(input_ids=input_ids, attention_mask=mask, return_dict=True)
            self.inputs["encoder_outputs"] = encoded
            self.inputs["attention_mask"] = mask
            self.tokens = torch.full_like(input_ids[:, :1], start_token(self.model))
        else:
            self.tokens = input_ids
            self._place(mask)
        self.prompts = self.tokens, dict(self.inputs)
        self.stepped = False
        return Logits.of(self._prefill(), request)

    def _place(self, mask: Tensor) -> None:
        """Mask and positions of causal prompts, as ``generate()`` passes them; neither without padding."""
        if bool(mask.all()):
            return
        if "attention_mask" not in self.arguments:
            raise Unsupported("the model's forward takes no attention_mask, so prompts cannot be padded")
        self.inputs["attention_mask"] = mask
        if "position_ids" in self.arguments and hasattr(self.model, "_prepare_position_ids_for_generation"):
            place = self.model._prepare_position_ids_for_generation
            self.inputs["position_ids"] = place(self.tokens, {"attention_mask": mask})

    def reset_to_prefill(self) -> None:
        if self.stepped:  # the cache has been reordered, and states are overwritten in place
            self.tokens, self.inputs = self.prompts[0], dict(self.prompts[1])
            self._prefill()
            self.stepped = False

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        batch, beams = tokens.shape
        before = len(self.tokens) // batch  # beams of the previous step: 1 at first
        users = torch.arange(batch, device=tokens.device)[:, None] * before
        rows = (users + parents.long().clamp_min(0)).flatten()  # [R]
        if before != beams:  # all but the cache is the same for every beam of a user
            self.inputs = {name: _selected(name, value, rows) for name, value in self.inputs.items()}
        self._reorder(rows)
        self.tokens = torch.cat((self.tokens[rows], tokens.reshape(-1, 1)), dim=1)
        self.stepped = True
        logits = self._forward(new=1 if self.cached else None)
        return Logits.of(logits.view(batch, beams, -1), request)

    def _prefill(self) -> Tensor:
        """Logits [B, 1, V] after the prompts, by a new cache."""
        if self.cached:
            self._add_cache()
        return self._forward(first=True)[:, None]

    def _add_cache(self) -> None:
        """A new cache among the inputs, as ``generate()`` makes it, where the model takes one.

        Except for a plain encoder-decoder: ``generate()`` counts the layers of its encoder for it.
        """
        name = "cache" if "cache" in self.arguments else "past_key_values"
        prepare = plain(self.model)._prepare_cache_for_generation
        if self.seq2seq and prepare.__func__ is GenerationMixin._prepare_cache_for_generation:
            self.inputs[name] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            return
        length = self.tokens.shape[1] + STEPS_AHEAD
        prepare(GenerationConfig(), self.inputs, GenerationMode.BEAM_SEARCH, len(self.tokens), length)

    def _forward(self, *, new: int | None = None, first: bool = False) -> Tensor:
        """Logits [R, V] after the last token; ``new``: how many tokens the cache lacks, None for all."""
        length = self.tokens.shape[1]
        if CUTS_BY_LENGTH:
            self.inputs["next_sequence_length"] = new
        else:
            self.inputs["cache_position"] = torch.arange(length, device=self.tokens.device)[
                -(new or length) :
            ]
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens, is_first_iteration=first, **self.inputs
        )
        if self.follows_length:
            forget_lengths(self.model)
        out = self.model(**inputs, return_dict=True)
        self.inputs = self.model._update_model_kwargs_for_generation(
            out, self.inputs, is_encoder_decoder=self.seq2seq
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _reorder(self, rows: Tensor) -> None:
        """The cache of each row becomes that of the row it grew from."""
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
    """Users whose prompts have the same number of tokens run together, each group without padding."""

    def __init__(self, plan: RowsPlan) -> None:
        self.plan = plan

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        held = attention_mask != 0
        lengths = held.sum(1)
        self.groups: list[tuple[Tensor, RowsState]] = []
        parts = []
        for length in lengths.unique().tolist():
            users = (lengths == length).nonzero()[:, 0]
            ids = input_ids[users][held[users]].view(len(users), length)
            state = RowsState(self.plan.model, cached=self.plan.cached)
            parts.append(state.prefill(ids, torch.ones_like(ids), request))
            self.groups.append((users, state))
        return self._joined(parts)

    def reset_to_prefill(self) -> None:
        for _, state in self.groups:
            state.reset_to_prefill()

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        return self._joined(
            [own.decode_step(tokens[users], parents[users], request) for users, own in self.groups]
        )

    def _joined(self, parts: list[Logits]) -> Logits:
        """The logits of all groups, in the order of the users."""
        order = torch.cat([users for users, _ in self.groups]).argsort()
        columns = torch.cat([part.values for part in parts])[order]
        totals = [part.logsumexp for part in parts if part.logsumexp is not None]
        return Logits(columns, torch.cat(totals)[order] if totals else None)


def start_token(model: PreTrainedModel) -> int:
    """The token that an encoder-decoder starts with under ``generate()``."""
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
    """The model under PEFT's wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_arguments(model: Any) -> set[str]:
    """The names of the inputs that the model's forward takes, those that a subclass passes on included."""
    own = plain(model)
    names: set[str] = set()
    for forward in (
        own.forward,
        *(vars(kind)["forward"] for kind in type(own).__mro__ if "forward" in vars(kind)),
    ):
        parameters = signature(forward).parameters
        names |= set(parameters)
        if not any(each.kind == each.VAR_KEYWORD for each in parameters.values()):
            break
    return names


def _selected(name: str, value: Any, rows: Tensor) -> Any:
    """Of an input of the model, the rows that ``rows`` [R] names; what has no rows stays."""
    if isinstance(value, ModelOutput):
        return type(value)(**{part: _selected(part, held, rows) for part, held in value.items()})
    if not isinstance(value, Tensor) or value.ndim == 0 or name == "cache_position":
        return value
    return value.index_select(1 if "position_ids" in name and value.ndim == 3 else 0, rows)
