"""Decoder-only models in PyTorch steps: one prefill per user, whose KV cache all beams share.

Equal to the Hugging Face model up to rounding.

B users, W beams, R = B * W rows, S cells of a prompt, P tokens of all prompts, H heads over G key-value heads
of size Dh, d the width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
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
    padding_mask,
)
from cemg.decoding.models.stacks import PositionTables, Stack, StackedPlan, StackLayer
from cemg.decoding.models.weights import unwrapped, weight_of
from cemg.decoding.protocol import Logits, LogitsRequest, Unsupported
from cemg_kernels.attention.shared_prefix import shared_prefix_attention

ROTARY_TABLE_STEP = 256  # positions by which the rotary tables grow
ROTARY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer."""

    norm: Norm
    qkv: Projection  # [(H + 2 * G) * Dh, d]
    q_norm: Norm | None  # per head, before the rotary embedding (Qwen3)
    k_norm: Norm | None
    out: Projection
    feed_forward: FeedForward


class CausalPlan(StackedPlan):
    """The weights of a GPT-2, Llama, Mistral, Qwen2 or Qwen3, arranged for our own steps.

    Raises:
        Unsupported: For any other model, for sliding windows, and for rotary embeddings that depend on the
            sequence length.
    """

    steps_in_torch = True
    start_token = 0

    def __init__(self, model: PreTrainedModel, code_tokens: range) -> None:
        source = unwrapped(model, ("GPT2LMHeadModel", *ROTARY))
        config = source.config
        self.dtype = source.dtype
        self.positions: Tensor | None = None
        self.rotation: Callable[..., Any] | None = None
        self._rotary_tables: tuple[Tensor, Tensor] | None = None
        self._lock = Lock()  # of these tables
        if config.model_type == "gpt2":
            self._read_gpt2(source, config)
        else:  # RMSNorm, rotary positions and a gated feed-forward block
            self._read_rotary(source, config)
        self.max_tokens = None if self.positions is None else len(self.positions)
        self._precompute(code_tokens)

    def describe(self) -> str:
        return "fast decoder-only"

    def new_state(self) -> CausalState:
        return CausalState(self)

    def encoder_stack(self) -> None:
        return None

    def decoder_stack(self) -> Stack:
        layers = [
            StackLayer(
                layer.norm, layer.qkv, layer.out, layer.feed_forward, q_norm=layer.q_norm, k_norm=layer.k_norm
            )
            for layer in self.layers
        ]
        return Stack(
            self.heads, self.kv_heads, self.scale, self.embedding, self.head.norm, self.head.scale, layers
        )

    def prompt_positions(self, length: int, longest: int) -> PositionTables:
        return self._position_tables(longest)

    def step_positions(self, step: int, longest: int) -> PositionTables:
        return self._position_tables(longest + step)

    def _position_tables(self, count: int) -> PositionTables:
        """The tables of at least ``count`` positions."""
        if self.positions is not None:
            self.check_fits(count)
            return PositionTables(embedding=self.positions)
        with self._lock:
            if self._rotary_tables is None or len(self._rotary_tables[0]) < count:
                rounded = -(-count // ROTARY_TABLE_STEP) * ROTARY_TABLE_STEP
                cosine, sine = self.rotary(torch.arange(rounded)) or (None, None)
                assert cosine is not None and sine is not None
                self._rotary_tables = cosine[:, 0].contiguous(), sine[:, 0].contiguous()  # [P, Dh]
            cosine, sine = self._rotary_tables
        return PositionTables(cosine=cosine, sine=sine)

    def _read_gpt2(self, source: Any, config: Any) -> None:
        if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            raise Unsupported("a GPT-2 whose attention is scaled in an unusual way")
        body = source.transformer
        self.heads = self.kv_heads = config.num_attention_heads
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.embedding, self.positions = weight_of(body.wte), weight_of(body.wpe)
        self.head = Head(Norm.of(body.ln_f), Projection.of([source.lm_head], self.dtype))
        self.layers = [
            Layer(
                Norm.of(block.ln_1), self._conv(block.attn.c_attn), None, None, self._conv(block.attn.c_proj),
                FeedForward(Norm.of(block.ln_2), None, self._conv(block.mlp.c_fc),
                            self._conv(block.mlp.c_proj), block.mlp.act),
            )
            for block in body.h
        ]  # fmt: skip

    def _read_rotary(self, source: Any, config: Any) -> None:
        windows = getattr(config, "layer_types", None) or []
        mistral = config.model_type == "mistral" and config.sliding_window is not None
        if mistral or any(kind != "full_attention" for kind in windows):
            raise Unsupported("attention over a sliding window")
        if source.model.rotary_emb.rope_type not in ("default", "linear", "llama3"):
            raise Unsupported(f"rotary embeddings of the type {source.model.rotary_emb.rope_type}")
        body = source.model
        first = body.layers[0].self_attn
        if 2 * body.rotary_emb.inv_freq.numel() != first.head_dim:
            raise Unsupported("rotary embeddings of a part of each head")
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale, self.rotation = first.scaling, body.rotary_emb
        self.embedding = weight_of(body.embed_tokens)
        self.head = Head(Norm.of(body.norm), Projection.of([source.lm_head], self.dtype))
        self.layers = [self._rotary_layer(layer) for layer in body.layers[: config.num_hidden_layers]]

    def _rotary_layer(self, layer: Any) -> Layer:
        attn, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        return Layer(
            Norm.of(layer.input_layernorm),
            Projection.of([attn.q_proj, attn.k_proj, attn.v_proj], self.dtype),
            q_norm and Norm.of(q_norm), k_norm and Norm.of(k_norm), Projection.of([attn.o_proj], self.dtype),
            FeedForward(Norm.of(layer.post_attention_layernorm), Projection.of([mlp.gate_proj], self.dtype),
                 Projection.of([mlp.up_proj], self.dtype), Projection.of([mlp.down_proj], self.dtype),
                 mlp.act_fn),
        )  # fmt: skip

    def _conv(self, module: Any) -> Projection:
        return Projection.of([module], self.dtype, transposed=True)

    @torch.no_grad()
    def _precompute(self, code_tokens: range) -> None:
        """Compute layer 0's projections of all codes. GPT-2 has none: it adds learned positions first."""
        self.first_code, self.table = code_tokens.start, None
        if self.positions is None:
            layer = self.layers[0]
            self.table = code_table(layer.norm, layer.qkv, self.embedding, code_tokens)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [R, d] of tokens at their positions, both [R]."""
        x = F.embedding(tokens, self.embedding)
        return x if self.positions is None else x + F.embedding(positions, self.positions)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [R, 1, Dh] of positions [R]; None if positions are learned."""
        if self.rotation is None:
            return None
        cos, sin = self.rotation(self.embedding, positions[None])  # [1, R, Dh], of the embedding's dtype
        return cos[0, :, None], sin[0, :, None]

    def signed_rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same, with the sines of the first half negated, as ``split`` requires."""
        rotary = self.rotary(positions)
        if rotary is None:
            return None
        first, second = rotary[1].chunk(2, dim=2)
        return rotary[0], torch.cat((-first, second), dim=2)

    def split(
        self, layer: Layer, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, (H + 2 * G) * Dh] -> rotated queries [R, H, Dh] and keys [R, G, Dh], values [R, G, Dh]."""
        by_head = qkv.unflatten(1, (self.heads + 2 * self.kv_heads, -1))
        query_keys, values = by_head.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, keys = query_keys.split((self.heads, self.kv_heads), dim=1)
            query_keys = torch.cat((layer.q_norm(query), layer.k_norm(keys)), dim=1)
        if rotary is not None:
            query_keys = _apply_rotary(query_keys, *rotary)
        query, keys = query_keys.split((self.heads, self.kv_heads), dim=1)
        return query, keys, values


class CausalState:
    """The KV cache of the prompts and of the beams."""

    def __init__(self, plan: CausalPlan) -> None:
        self.plan = plan

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        plan = self.plan
        batch, length = input_ids.shape
        unpadded = UnpaddedBatch.of(attention_mask, num_tokens)
        positions = unpadded.unpad((attention_mask.cumsum(1) - 1).clamp_min(0).flatten())  # [P]
        self.lengths = attention_mask.sum(1)  # [B]
        self.padding = padding_mask(attention_mask, plan.dtype)  # [B, S]
        later = self.padding.new_full((length, length), float("-inf")).triu(1)
        mask = self.padding[:, None, None] + later  # [B, 1, S, S]
        rotary = plan.signed_rotary(positions)
        x = plan.embed(unpadded.unpad(input_ids.flatten()), positions)  # [P, d]
        self.prompt_kv: list[tuple[Tensor, Tensor]] = []  # per layer: keys and values [B, G, S, Dh]
        self.cache = BeamKVCache(batch, len(plan.layers), input_ids.device, shared_start=False)
        for layer in plan.layers:
            split = plan.split(layer, layer.qkv(layer.norm(x)), rotary)
            query, keys, values = (unpadded.pad(part).transpose(1, 2) for part in split)  # [B, H, S, Dh]
            self.prompt_kv.append((keys, values))
            if layer is plan.layers[-1]:  # only the last token's logits are needed
                x, query, mask = unpadded.last(x), query[:, :, -1:], mask[:, :, -1:]
            attended = attention(query, keys, values, plan.scale, mask)
            attended = attended.transpose(1, 2).flatten(0, 1).flatten(1)
            rows = attended if len(attended) == len(x) else unpadded.unpad(attended)
            x = layer.feed_forward(layer.out.added_to(x, rows))
        return plan.head(x, batch, request)

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        plan = self.plan
        batch, beams = tokens.shape
        flat = tokens.flatten()
        positions = (self.lengths + self.cache.length).repeat_interleave(beams)  # [R]
        rotary = plan.signed_rotary(positions)
        self.cache.extend(parents)
        x = plan.embed(flat, positions)
        for number, layer in enumerate(plan.layers):
            if number == 0 and plan.table is not None:
                qkv = plan.table.index_select(0, flat - plan.first_code)
            else:
                qkv = layer.qkv(layer.norm(x))
            query, keys, values = plan.split(layer, qkv, rotary)
            self.cache.append(number, torch.stack((keys, values), dim=1))
            prefix = shared_prefix_attention(
                query.unflatten(0, (batch, beams)), *self.prompt_kv[number], self.padding, plan.scale
            )
            attended = self.cache.attend(number, query, plan.scale, prefix=prefix)
            x = layer.feed_forward(layer.out.added_to(x, attended))
        return plan.head(x, batch, request)

    def reset_to_prefill(self) -> None:
        self.cache.reset_to_prefill()


def _apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply the rotary embedding to rows [R, heads, Dh]; the sines of the first half are negated."""
    swapped = x.unflatten(2, (2, -1)).flip(2).flatten(2)
    return torch.addcmul(x * cos, swapped, signed_sin)
