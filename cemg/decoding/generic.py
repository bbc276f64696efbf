"""Steppers for any Hugging Face model: its own forward, fed beams. What has no fast path runs on these."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from cemg.decoding.layers import Logits, Stepper, Wanted
from cemg.errors import UserError

LEVELS_AHEAD = 8  # codes that may follow a prompt


def cached(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The cache under the name that the model's forward takes it by: transformers renamed it in 5.24."""
    plain = cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model
    name = "cache" if "cache" in signature(plain.forward).parameters else "past_key_values"
    return {name: cache}


class GenericPlan:
    """The model as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self) -> Stepper:
        """A stepper for one batch."""
        seq2seq = self.model.config.is_encoder_decoder
        return GenericSeq2Seq(self.model) if seq2seq else GenericCausal(self.model)


class GenericCausal:
    """A decoder-only model: beams as further positions of their user's sequence, under a 4-D mask."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache()  # whole in every layer: the masks of ``step`` say who sees what
        self.window = getattr(model.config, "sliding_window", None)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Wanted, num_tokens: int | None = None
    ) -> Logits:
        longest = int(attention_mask.sum(1).max()) if self.window else 0
        if self.window and longest + LEVELS_AHEAD > self.window:
            raise UserError(
                f"a prompt of {longest} tokens does not fit the model's sliding window of {self.window}",
                fix=f"cut prompts to {self.window - LEVELS_AHEAD} tokens, or use engine='transformers'",
            )
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions,
            use_cache=True, logits_to_keep=1, **cached(self.model, self.cache),
        )  # fmt: skip
        self.prompt = attention_mask.bool()  # [B, S]
        self.position = attention_mask.sum(1)  # [B], of the next token
        self.ancestors: Tensor | None = None  # [B, W, fed] bool: which of the tokens fed a beam descends from
        return Logits.of(out.logits, wanted)

    def rewind(self) -> None:
        if self.ancestors is not None:
            self.cache.crop(-self.ancestors.shape[2])
        self.position, self.ancestors = self.prompt.sum(1), None

    def step(self, tokens: Tensor, parents: Tensor, wanted: Wanted) -> Logits:
        batch, beams = tokens.shape
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        if self.ancestors is None:  # all grew from the one prompt
            self.ancestors = itself
        else:
            index = parents.long().clamp_min(0)[:, :, None].expand(-1, -1, self.ancestors.shape[2])
            self.ancestors = torch.cat((self.ancestors.gather(1, index), itself), dim=2)
        seen = torch.cat(
            (self.prompt[:, None].expand(-1, beams, -1), self.ancestors), dim=2
        )  # [B, W, S + steps·W]
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )
        out = self.model(
            input_ids=tokens, attention_mask=mask[:, None], use_cache=True,
            position_ids=self.position[:, None].expand(-1, beams), **cached(self.model, self.cache),
        )  # fmt: skip
        self.position = self.position + 1
        return Logits.of(out.logits, wanted)


class GenericSeq2Seq:
    """T5: the encoder runs once a user; each beam is a row of the decoder, its cache re-ordered a step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Wanted, num_tokens: int | None = None
    ) -> Logits:
        encoded = self.model.get_encoder()(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        self.prompt = encoded, attention_mask
        return Logits.of(self._first(), wanted)

    def rewind(self) -> None:
        self._first()  # again, not the encoder: the cache of before was re-ordered and has grown

    def _first(self) -> Tensor:
        """Logits [B, 1, V] after the start token, by a new cache."""
        self.encoded, self.mask = self.prompt
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = self.model.config.decoder_start_token_id
        return self._forward(torch.full_like(self.mask[:, :1], start))

    def step(self, tokens: Tensor, parents: Tensor, wanted: Wanted) -> Logits:
        batch, beams = tokens.shape
        before = len(self.encoded) // batch  # beams of the step before: 1 at first
        users = torch.arange(batch, device=tokens.device)[:, None] * before
        rows = (users + parents.long().clamp_min(0)).flatten()  # [B·W]
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        if before != beams:
            self.encoded, self.mask = self.encoded[rows], self.mask[rows]
        return Logits.of(self._forward(tokens.reshape(-1, 1)).reshape(batch, beams, -1), wanted)

    def _forward(self, tokens: Tensor) -> Tensor:
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded), attention_mask=self.mask,
            decoder_input_ids=tokens, use_cache=True, **cached(self.model, self.cache),
        )  # fmt: skip
        return out.logits
