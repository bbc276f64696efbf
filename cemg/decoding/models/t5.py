"""The fast T5: encoder once a user, beams as queries of one cross-attention, the rest on few calls.

B users, W beams, R = B * W rows, S cells of a prompt, P tokens of all, T tokens a beam was fed,
H heads of Dh, d the width, L layers.
Equal to ``T5ForConditionalGeneration`` up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cemg.decoding.models.layers import (
    BeamKVCache,
    FeedForward,
    Head,
    Norm,
    Projection,
    UnpaddedBatch,
    attention,
    code_table,
    cross_attention,
    heads,
    padding_of,
)
from cemg.decoding.models.rows import start_token
from cemg.decoding.models.weights import unwrapped, weight_of
from cemg.decoding.protocol import DecoderPlan, Logits, LogitsRequest
from cemg.decoding.timings import timed_stage

CLASSES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    norm: Norm
    qkv: Projection  # [3 * H * Dh, d]
    out: Projection
    feed_forward: FeedForward


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    norm: Norm
    qkv: Projection
    kv: Projection  # its last two thirds
    out: Projection
    cross_norm: Norm
    cross_q: Projection
    cross_out: Projection
    feed_forward: FeedForward


class T5Plan(DecoderPlan):
    """A T5's weights as the state wants them. They are read here, once: make a new plan after training.

    Raises ``Unsupported`` for a model that only looks like a T5.
    """

    steps_in_torch = True

    def __init__(self, model: PreTrainedModel, code_tokens: range) -> None:
        source = unwrapped(model, CLASSES)
        config = source.config
        self.dtype, self.device = source.dtype, source.device
        self.heads, self.start_token = config.num_heads, start_token(source)
        self.encoder_embedding = weight_of(source.encoder.embed_tokens)
        self.embedding = weight_of(source.decoder.embed_tokens)  # the same tensor, some adapters aside
        self.encoder = [self._encoder_layer(block) for block in source.encoder.block]
        self.decoder = [self._decoder_layer(block) for block in source.decoder.block]
        self.encoder_norm = Norm.of(source.encoder.final_layer_norm)
        scaled = config.model_type == "t5" and getattr(
            config, "scale_decoder_outputs", config.tie_word_embeddings
        )
        whole = Projection.of([source.lm_head], self.dtype)
        scale = config.d_model**-0.5 if scaled else 1.0
        self.head = Head(Norm.of(source.decoder.final_layer_norm), whole, scale)
        crosses = [block.layer[1].EncDecAttention for block in source.decoder.block]
        self.cross_kv = Projection.of([p for cross in crosses for p in (cross.k, cross.v)], self.dtype)
        self.encoder_attention = source.encoder.block[0].layer[0].SelfAttention
        self.decoder_attention = source.decoder.block[0].layer[0].SelfAttention
        self._encoder_bias: dict[int, Tensor] = {}
        self._decoder_bias: dict[int, Tensor] = {}
        self._precompute(code_tokens)

    def describe(self) -> str:
        return "fast T5"

    def new_state(self) -> T5State:
        """A state for one batch."""
        return T5State(self)

    @torch.no_grad()
    def _precompute(self, code_tokens: range) -> None:
        """What depends on weights alone: the start token before cross-attention, and codes in layer 0."""
        first = self.decoder[0]
        start = self.embedding[self.start_token][None]  # [1, d]
        qkv = first.qkv(first.norm(start))
        self.start_kv = qkv[:, qkv.shape[1] // 3 :]  # [1, 2 * H * Dh]
        self.start_hidden = first.out.added_to(start, qkv[:, 2 * qkv.shape[1] // 3 :], inplace=False)
        self.first_code = code_tokens.start
        self.table = code_table(first.norm, first.qkv, self.embedding, code_tokens)

    def _encoder_layer(self, block: Any) -> EncoderLayer:
        own = block.layer[0]
        out = Projection.of([own.SelfAttention.o], self.dtype)
        return EncoderLayer(
            Norm.of(own.layer_norm), self._qkv(own.SelfAttention), out, self._feed_forward(block.layer[1])
        )

    def _decoder_layer(self, block: Any) -> DecoderLayer:
        own, cross = block.layer[0], block.layer[1]
        qkv = self._qkv(own.SelfAttention)
        return DecoderLayer(
            Norm.of(own.layer_norm), qkv, qkv.part(qkv.weight.shape[0] // 3, qkv.weight.shape[0]),
            Projection.of([own.SelfAttention.o], self.dtype), Norm.of(cross.layer_norm),
            Projection.of([cross.EncDecAttention.q], self.dtype),
            Projection.of([cross.EncDecAttention.o], self.dtype), self._feed_forward(block.layer[2]),
        )  # fmt: skip

    def _qkv(self, attention: Any) -> Projection:
        return Projection.of([attention.q, attention.k, attention.v], self.dtype)

    def _feed_forward(self, layer: Any) -> FeedForward:
        dense = layer.DenseReluDense
        gated = hasattr(dense, "wi_0")
        gate = Projection.of([dense.wi_0], self.dtype) if gated else None
        up = Projection.of([dense.wi_1 if gated else dense.wi], self.dtype)
        # What the feed-forward block adds leaves the range of float16, as transformers knows: it keeps this
        # weight in float32, and so the hidden states from there on.
        down = Projection.of([dense.wo], torch.float32 if self.dtype == torch.float16 else self.dtype)
        return FeedForward(Norm.of(layer.layer_norm), gate, up, down, dense.act)

    def encoder_bias(self, length: int) -> Tensor:
        """The encoder's position bias by distance, [H, 2 * length - 1]: key minus query, -(length - 1) first.

        Made once a length and never dropped: a recorded graph reads it where it is.
        """
        if length not in self._encoder_bias:
            distance = torch.arange(1 - length, length, device=self.device)
            self._encoder_bias[length] = _bias(self.encoder_attention, distance).t().contiguous()
        return self._encoder_bias[length]

    def decoder_bias(self, position: int) -> Tensor:
        """The bias of the query at ``position`` towards keys 0 ... position, [position + 1, H]; made once."""
        if position not in self._decoder_bias:
            distance = torch.arange(-position, 1, device=self.device)
            self._decoder_bias[position] = _bias(self.decoder_attention, distance)
        return self._decoder_bias[position]


class T5State:
    """The search's state: keys and values of the prompt, and of each beam's own tokens."""

    def __init__(self, plan: T5Plan) -> None:
        self.plan = plan

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        plan = self.plan
        batch = input_ids.shape[0]
        self.padding = padding_of(attention_mask, plan.dtype)  # [B, S]
        with timed_stage("prefill", "decode: encoder"):
            unpadded = UnpaddedBatch.of(attention_mask, num_tokens)
            encoded = self._encode(input_ids, unpadded)
        crosses = unpadded.cells(plan.cross_kv(encoded)).chunk(2 * len(plan.decoder), dim=2)
        views = [heads(part, plan.heads) for part in crosses]  # each [B, H, S, Dh]
        self.cross = list(zip(views[::2], views[1::2], strict=True))
        self.beam_cache = BeamKVCache(batch, len(plan.decoder), input_ids.device, shared_start=True)
        with timed_stage("decode_steps"):
            return self._first_step(batch, request)

    def _first_step(self, batch: int, request: LogitsRequest) -> Logits:
        """The decoder's step of the start token, one row per user."""
        plan = self.plan
        x = plan.start_hidden.repeat(batch, 1)
        for number, layer in enumerate(plan.decoder):
            kv = plan.start_kv.expand(batch, -1)
            if number > 0:
                kv = layer.kv(layer.norm(x))
                x = layer.out.added_to(x, kv[:, kv.shape[1] // 2 :])  # one key: attention is its value
            self.beam_cache.add(number, kv.unflatten(1, (2, plan.heads, -1)))
            x = layer.feed_forward(self._cross_attend(number, x, batch))
        return plan.head(x, batch, request)

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        plan = self.plan
        batch = tokens.shape[0]
        self.beam_cache.grow(parents)
        bias = plan.decoder_bias(self.beam_cache.length - 1)  # [T, H]
        flat = tokens.flatten()
        x = F.embedding(flat, plan.embedding)  # [R, d]
        for number, layer in enumerate(plan.decoder):
            if number == 0 and plan.table is not None:
                qkv = plan.table.index_select(0, flat - plan.first_code)
            else:
                qkv = layer.qkv(layer.norm(x))
            shaped = qkv.unflatten(1, (3, plan.heads, -1))  # [R, 3, H, Dh]
            self.beam_cache.add(number, shaped[:, 1:])
            x = layer.out.added_to(x, self.beam_cache.attend(number, shaped[:, 0], 1.0, bias))
            x = layer.feed_forward(self._cross_attend(number, x, batch))
        return plan.head(x, batch, request)

    def reset_to_prefill(self) -> None:
        self.beam_cache.reset_to_prefill()

    def _encode(self, input_ids: Tensor, unpadded: UnpaddedBatch) -> Tensor:
        """The encoder's output, [P, d]."""
        plan = self.plan
        batch, length = input_ids.shape
        place = torch.arange(length, device=input_ids.device)
        distance = place[None] - place[:, None] + length - 1  # [S, S], of keys from queries
        mask = plan.encoder_bias(length)[:, distance] + self.padding[:, None, None]  # [B, H, S, S]
        x = F.embedding(unpadded.tokens(input_ids.flatten()), plan.encoder_embedding)  # [P, d]
        for layer in plan.encoder:
            qkv = unpadded.cells(layer.qkv(layer.norm(x)))  # [B, S, 3 * H * Dh]
            q, k, v = (heads(part, plan.heads) for part in qkv.chunk(3, dim=2))
            seen = attention(q, k, v, 1.0, mask)
            rows = unpadded.tokens(seen.transpose(1, 2).reshape(batch * length, -1))
            x = layer.feed_forward(layer.out.added_to(x, rows))
        return plan.encoder_norm(x)

    def _cross_attend(self, number: int, x: Tensor, batch: int) -> Tensor:
        """x plus what its beams see of their user's prompt; [R, d]."""
        layer = self.plan.decoder[number]
        query = layer.cross_q(layer.cross_norm(x)).view(batch, len(x) // batch, self.plan.heads, -1)
        return layer.cross_out.added_to(x, cross_attention(query, *self.cross[number], 1.0, self.padding))


def _bias(attention: Any, distance: Tensor) -> Tensor:
    """The learned bias of keys ``distance`` places after the query: any shape -> [..., H]."""
    bucket = attention._relative_position_bucket(
        distance, bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )  # fmt: skip
    return F.embedding(bucket, attention.relative_attention_bias.weight.detach())
