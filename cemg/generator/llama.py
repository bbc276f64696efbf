"""The forward pass of a Llama from scratch for training on a CPU, faster than the Hugging Face module's.

It reads the module's parameters. Only the positions that the loss reads pass through the head.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedModel

from cemg.generator.branches import ItemInputs
from cemg.generator.dropout import DropoutEmbedding, DropoutLinear
from cemg.generator.fused import add_with_dropout, attention, feed_forward, rms_norm
from cemg.generator.losses import Predictions
from cemg.generator.samples import Batch
from cemg.generator.vocabulary import Vocabulary

PLAIN = {nn.Linear, nn.Embedding, nn.ModuleList, DropoutLinear, DropoutEmbedding}
HOMES = {LlamaForCausalLM.__module__, "transformers.activations", "torch.nn.modules.activation"}


class LlamaForward:
    """Predictions of a Llama that `build_backbone` made from random weights."""

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the model is on a CPU and has this shape: the one that `build_backbone` makes."""
        config = model.config
        return (
            type(model) is LlamaForCausalLM
            and {parameter.device.type for parameter in model.parameters()} == {"cpu"}
            and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
            and all(_is_plain(module) for module in model.modules())
            and config.num_attention_heads == config.num_key_value_heads
            and config.hidden_size == config.num_attention_heads * config.head_dim
            and config.rope_parameters["rope_type"] == "default"
            and config.hidden_act == "silu"
            and not (config.attention_bias or config.mlp_bias or config.attention_dropout)
        )

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, dtype: torch.dtype,
        inputs: ItemInputs | None = None, *, checkpointed: bool = False,
    ) -> None:  # fmt: skip
        """``inputs`` and ``checkpointed``: see `forward_of`."""
        self.model, self.vocabulary, self.dtype, self.inputs = model, vocabulary, dtype, inputs
        self.checkpointed = checkpointed
        config = model.config
        self.heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        width = config.hidden_size // self.heads
        self.pairs = torch.arange(config.hidden_size).view(self.heads, 2, -1).transpose(1, 2).flatten()
        frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)  # [positions, E / 2]
        self.rotations = torch.stack((turn * width**-0.5, turn), 1)[:, :, None].repeat(1, 1, self.heads, 1)

    def __call__(self, batch: Batch) -> Predictions:
        body: Any = self.model.model
        table = body.embed_tokens.weight
        if self.inputs is None:
            ids = batch.input_ids[:, :-1]  # the last token predicts nothing
            x = self._hidden(F.embedding(ids, table), self.rotations[: ids.shape[1]], None)
            first = len(self.vocabulary.instruction)
            by_item = x.view(*ids.shape, -1)[:, first:].unflatten(1, (-1, self.vocabulary.levels))
            states = by_item[batch.is_target]
        else:
            x, branches = self.inputs(batch)
            states = self._hidden(x, self.rotations[branches.positions], branches.reads)[branches.states]
        states = rms_norm(states, body.norm.weight, self.eps, self.dtype)
        return HeadPredictions(states, self.model.lm_head.weight, self.vocabulary)

    def _hidden(self, x: Tensor, rotations: Tensor, reads: Tensor | None) -> Tensor:
        """States after the last layer [n, D], from embeddings [B, S, D]."""
        body: Any = self.model.model
        shape = x.shape[:2]
        x = add_with_dropout(torch.zeros(()), x.flatten(0, 1), self._rate(body.embed_tokens))
        for layer in body.layers:
            arguments = layer, x, shape, rotations, reads
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                x = self._layer(*arguments)
        return x

    def _layer(
        self, layer: Any, x: Tensor, shape: torch.Size, rotations: Tensor, reads: Tensor | None
    ) -> Tensor:
        own, mlp = layer.self_attn, layer.mlp
        heads = (own.q_proj.weight[self.pairs], own.k_proj.weight[self.pairs], own.v_proj.weight)
        qkv = self._product(rms_norm(x, layer.input_layernorm.weight, self.eps, self.dtype), torch.cat(heads))
        mixed = attention(qkv.view(*shape, 3, self.heads, -1), rotations, reads).flatten(0, 1)
        x = add_with_dropout(x, self._product(mixed, own.o_proj.weight), self._rate(own.o_proj))
        normed = rms_norm(x, layer.post_attention_layernorm.weight, self.eps, self.dtype)
        weights = (part.weight.to(self.dtype) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return add_with_dropout(x, feed_forward(normed, *weights), self._rate(mlp.down_proj))

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.to(self.dtype).t()

    def _rate(self, module: Any) -> float:
        return float(getattr(module, "share", 0.0)) if self.model.training else 0.0


class HeadPredictions(Predictions):
    """Predictions from hidden states [n, L, D] and the weight of the head [V, D]."""

    def __init__(self, hidden: Tensor, head: Tensor, vocabulary: Vocabulary) -> None:
        self.hidden, self.head, self.vocabulary = hidden, head, vocabulary

    @property
    def states(self) -> Tensor:
        return self.hidden

    def logits(self) -> Tensor:
        return self.hidden @ self.head.to(self.hidden.dtype).t()

    def code_logits(self, level: int, chosen: Tensor) -> Tensor:
        return self.hidden[chosen, level] @ self._codes[level].t()

    @cached_property
    def _codes(self) -> tuple[Tensor, ...]:
        """Rows of the codes, [K, D] per level: one slice of the head, so one gradient of its size."""
        first, levels = self.vocabulary.code_token_start, self.vocabulary.levels
        size = self.vocabulary.codebook_size
        codes = self.head[first : first + levels * size].to(self.hidden.dtype)
        split: tuple[Tensor, ...] = codes.split(size)
        return split


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is one of transformers' Llama or a layer of `build_backbone`, with its own forward."""
    known = type(module) in PLAIN or type(module).__module__ in HOMES
    return known and "forward" not in vars(module)
