"""T5 in PyTorch steps: one encoder pass per user, whose cross-attention keys and values all beams share.

Equal to ``T5ForConditionalGeneration`` up to rounding.

B users, W beams, R = B * W rows, S cells of a prompt, P tokens of all prompts, T tokens that each beam has
been fed, H heads of size Dh, d the width, L layers.
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
    padding_mask,
)
from cemg.decoding.models.rows import start_token
from cemg.decoding.models.stacks import PositionTables, Stack, StackedPlan, StackLayer
from cemg.decoding.models.weights import unwrapped, weight_of
from cemg.decoding.protocol import Logits, LogitsRequest
from cemg.decoding.timings import timed_stage

CLASSES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """The weights of an encoder layer."""

    norm: Norm
    qkv: Projection  # [3 * H * Dh, d]
    out: Projection
    feed_forward: FeedForward


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of a decoder layer."""

    norm: Norm
    qkv: Projection
    kv: Projection  # the last two thirds of qkv
    out: Projection
    cross_norm: Norm
    cross_q: Projection
    cross_out: Projection
    feed_forward: FeedForward


class T5Plan(StackedPlan):
    """The weights of a T5, arranged for our own steps.

    Raises:
        Unsupported: For a model that is not exactly a T5 or an mT5.
    """

    steps_in_torch = True

    def __init__(self, model: PreTrainedModel, code_tokens: range) -> None:
        source = unwrapped(model, CLASSES)
        config = source.config
        self.dtype, self.device = source.dtype, source.device
        self.heads, self.start_token = config.num_heads, start_token(source)
        self.encoder_embedding = weight_of(source.encoder.embed_tokens)
        self.embedding = weight_of(source.decoder.embed_tokens)  # adapters may make the two different
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
        return T5State(self)

    def encoder_stack(self) -> Stack:
        layers = [StackLayer(layer.norm, layer.qkv, layer.out, layer.feed_forward) for layer in self.encoder]
        return Stack(self.heads, self.heads, 1.0, self.encoder_embedding, self.encoder_norm, 1.0, layers)

    def decoder_stack(self) -> Stack:
        size = self.cross_kv.weight.shape[0] // len(self.decoder)
        layers = [
            StackLayer(
                layer.norm, layer.qkv, layer.out, layer.feed_forward, cross_norm=layer.cross_norm,
                cross_q=layer.cross_q, cross_kv=self.cross_kv.part(number * size, (number + 1) * size),
                cross_out=layer.cross_out,
            )
            for number, layer in enumerate(self.decoder)
        ]  # fmt: skip
        return Stack(self.heads, self.heads, 1.0, self.embedding, self.head.norm, self.head.scale, layers)

    def prompt_positions(self, length: int, longest: int) -> PositionTables:
        return PositionTables(bias=self.encoder_bias(length))

    def step_positions(self, step: int, longest: int) -> PositionTables:
        return PositionTables(bias=self.decoder_bias(step))

    @torch.no_grad()
    def _precompute(self, code_tokens: range) -> None:
        """Compute what depends on weights alone: the start token up to cross-attention, and layer 0's
        projections of all codes."""
        layer = self.decoder[0]
        start = self.embedding[self.start_token][None]  # [1, d]
        qkv = layer.qkv(layer.norm(start))
        self.start_kv = qkv[:, qkv.shape[1] // 3 :]  # [1, 2 * H * Dh]
        self.start_hidden = layer.out.added_to(start, qkv[:, 2 * qkv.shape[1] // 3 :], inplace=False)
        self.first_code = code_tokens.start
        self.table = code_table(layer.norm, layer.qkv, self.embedding, code_tokens)

    def _encoder_layer(self, block: Any) -> EncoderLayer:
        layer = block.layer[0]
        out = Projection.of([layer.SelfAttention.o], self.dtype)
        return EncoderLayer(
            Norm.of(layer.layer_norm), self._qkv(layer.SelfAttention), out, self._feed_forward(block.layer[1])
        )

    def _decoder_layer(self, block: Any) -> DecoderLayer:
        layer, cross = block.layer[0], block.layer[1]
        qkv = self._qkv(layer.SelfAttention)
        return DecoderLayer(
            Norm.of(layer.layer_norm), qkv, qkv.part(qkv.weight.shape[0] // 3, qkv.weight.shape[0]),
            Projection.of([layer.SelfAttention.o], self.dtype), Norm.of(cross.layer_norm),
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
        # The output of the block exceeds the range of float16. Like transformers, keep this weight, and so
        # the hidden states from here on, in float32.
        down = Projection.of([dense.wo], torch.float32 if self.dtype == torch.float16 else self.dtype)
        return FeedForward(Norm.of(layer.layer_norm), gate, up, down, dense.act)

    def encoder_bias(self, length: int) -> Tensor:
        """The encoder's position bias by distance, [H, 2 * length - 1]; key minus query from -(length - 1).

        Computed once per length and never dropped, since a recorded graph reads it at its address.
        """
        if length not in self._encoder_bias:
            distance = torch.arange(1 - length, length, device=self.device)
            self._encoder_bias[length] = _position_bias(self.encoder_attention, distance).t().contiguous()
        return self._encoder_bias[length]

    def decoder_bias(self, position: int) -> Tensor:
        """The decoder's position bias of the query at ``position`` for keys 0 ... position,
        [position + 1, H]; computed once."""
        if position not in self._decoder_bias:
            distance = torch.arange(-position, 1, device=self.device)
            self._decoder_bias[position] = _position_bias(self.decoder_attention, distance)
        return self._decoder_bias[position]


class T5State:
    """The cross-attention keys and values of the prompts, and the KV cache of the beams."""

    def __init__(self, plan: T5Plan) -> None:
        self.plan = plan

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        plan = self.plan
        batch = input_ids.shape[0]
        self.padding = padding_mask(attention_mask, plan.dtype)  # [B, S]
        with timed_stage("prefill", "decode: encoder"):
            unpadded = UnpaddedBatch.of(attention_mask, num_tokens)
            encoded = self._encode(input_ids, unpadded)
            crosses = unpadded.pad(plan.cross_kv(encoded)).chunk(2 * len(plan.decoder), dim=2)
        views = [heads(part, plan.heads) for part in crosses]  # each [B, H, S, Dh]
        self.cross_kv = list(zip(views[::2], views[1::2], strict=True))  # per layer
        self.cache = BeamKVCache(batch, len(plan.decoder), input_ids.device, shared_start=True)
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
                x = layer.out.added_to(x, kv[:, kv.shape[1] // 2 :])  # one key: attention returns its value
            self.cache.append(number, kv.unflatten(1, (2, plan.heads, -1)))
            x = layer.feed_forward(self._cross_attend(number, x, batch))
        return plan.head(x, batch, request)

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        plan = self.plan
        batch = tokens.shape[0]
        self.cache.extend(parents)
        bias = plan.decoder_bias(self.cache.length - 1)  # [T, H]
        flat = tokens.flatten()
        x = F.embedding(flat, plan.embedding)  # [R, d]
        for number, layer in enumerate(plan.decoder):
            if number == 0 and plan.table is not None:
                qkv = plan.table.index_select(0, flat - plan.first_code)
            else:
                qkv = layer.qkv(layer.norm(x))
            by_head = qkv.unflatten(1, (3, plan.heads, -1))  # [R, 3, H, Dh]
            self.cache.append(number, by_head[:, 1:])
            x = layer.out.added_to(x, self.cache.attend(number, by_head[:, 0], 1.0, bias))
            x = layer.feed_forward(self._cross_attend(number, x, batch))
        return plan.head(x, batch, request)

    def reset_to_prefill(self) -> None:
        self.cache.reset_to_prefill()

    def _encode(self, input_ids: Tensor, unpadded: UnpaddedBatch) -> Tensor:
        """The encoder's output, [P, d]."""
        plan = self.plan
        batch, length = input_ids.shape
        position = torch.arange(length, device=input_ids.device)
        distance = position[None] - position[:, None] + length - 1  # [S, S], of keys from queries
        mask = plan.encoder_bias(length)[:, distance] + self.padding[:, None, None]  # [B, H, S, S]
        x = F.embedding(unpadded.unpad(input_ids.flatten()), plan.encoder_embedding)  # [P, d]
        for layer in plan.encoder:
            qkv = unpadded.pad(layer.qkv(layer.norm(x)))  # [B, S, 3 * H * Dh]
            q, k, v = (heads(part, plan.heads) for part in qkv.chunk(3, dim=2))
            attended = attention(q, k, v, 1.0, mask)
            rows = unpadded.unpad(attended.transpose(1, 2).reshape(batch * length, -1))
            x = layer.feed_forward(layer.out.added_to(x, rows))
        return plan.encoder_norm(x)

    def _cross_attend(self, number: int, x: Tensor, batch: int) -> Tensor:
        """``x`` plus the attention of its rows to their user's prompt; [R, d]."""
        layer = self.plan.decoder[number]
        query = layer.cross_q(layer.cross_norm(x)).view(batch, len(x) // batch, self.plan.heads, -1)
        attended = cross_attention(query, *self.cross_kv[number], 1.0, self.padding)
        return layer.cross_out.added_to(x, attended)


def _position_bias(attention: Any, distance: Tensor) -> Tensor:
    """The learned bias of keys at ``distance`` from the query: any shape -> [..., H]."""
    bucket = attention._relative_position_bucket(
        distance, bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )  # fmt: skip
    return F.embedding(bucket, attention.relative_attention_bias.weight.detach())
