"""The weights of a model in one form for all architectures, as the C++ decoder copies them.

d the width, H heads over G key-value heads of size Dh, P positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cemg.decoding.models.layers import FeedForward, Head, Norm, Projection
from cemg.decoding.protocol import DecoderPlan


class PositionTables(NamedTuple):
    """Tables by position: embeddings [P, d], cosines and sines [P, Dh] of the rotary embedding, a bias."""

    embedding: Tensor | None = None
    cosine: Tensor | None = None
    sine: Tensor | None = None
    bias: Tensor | None = None


class StackLayer(NamedTuple):
    """The weights of one layer: self-attention, perhaps cross-attention, and the feed-forward block."""

    norm: Norm
    qkv: Projection  # [(H + 2 * G) * Dh, d]
    out: Projection
    feed_forward: FeedForward
    q_norm: Norm | None = None  # per head
    k_norm: Norm | None = None
    cross_norm: Norm | None = None
    cross_q: Projection | None = None
    cross_kv: Projection | None = None
    cross_out: Projection | None = None


class Stack(NamedTuple):
    """An encoder or a decoder."""

    heads: int
    kv_heads: int
    attention_scale: float
    embedding: Tensor  # [tokens, d]
    final_norm: Norm
    final_scale: float  # applied after the last norm
    layers: Sequence[StackLayer]


class StackedPlan(DecoderPlan, Protocol):
    """A plan whose weights are stacks of known layers."""

    dtype: torch.dtype
    embedding: Tensor
    head: Head
    start_token: int  # the decoder's; 0 without an encoder
    first_code: int  # the token of the first row of ``table``
    table: Tensor | None  # layer 0's projections of all codes

    def encoder_stack(self) -> Stack | None:
        """The encoder; None for a decoder-only model."""
        ...

    def decoder_stack(self) -> Stack:
        """The decoder."""
        ...

    def prompt_positions(self, length: int, longest: int) -> PositionTables:
        """The tables for prompts padded to ``length``, the longest of which has ``longest`` tokens."""
        ...

    def step_positions(self, step: int, longest: int) -> PositionTables:
        """The tables for the token of decode step ``step``, after prompts of at most ``longest`` tokens."""
        ...
