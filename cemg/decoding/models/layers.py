"""The layers of our own decode steps: a model's weights, arranged so that few calls are needed.

R rows, d the width, V vocabulary, K codes per level, B users, W beams, S prompt tokens, P tokens of all
prompts, H heads over G key-value heads of size Dh, T tokens that each beam has been fed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.decoding.beams import token_count
from cemg.decoding.models.weights import linear_of
from cemg.decoding.protocol import Logits, LogitsRequest, Unsupported
from cemg_kernels.attention.beam_tree import beam_tree_attention
from cemg_kernels.attention.logsumexp import row_logsumexp
from cemg_kernels.attention.shared_prefix import served_by_triton, shared_prefix_attention

MAX_LOGITS = 2**26  # logits over the vocabulary held at once
WORTH_UNPADDING = 0.9  # padding is skipped if tokens are at most this share of a batch
MAX_TABLE_CODES = 8192  # layer 0's projections of all codes are stored up to this number of codes


@dataclass(frozen=True, slots=True)
class Projection:
    """``x @ weight.T + bias``; ``weight`` [out, in]."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, modules: Sequence[Any], dtype: torch.dtype, transposed: bool = False) -> Projection:
        """Linear layers over the same input, as one; ``transposed`` for GPT-2's Conv1D."""
        parts = [linear_of(module) for module in modules]
        weights = [weight.t() if transposed else weight for weight, _ in parts]
        biases = [bias for _, bias in parts]
        some_bias = next((bias for bias in biases if bias is not None), None)
        weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype).contiguous()
        bias = None
        if some_bias is not None:
            zeros = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat(zeros).to(dtype)
        return cls(weight, bias)

    def part(self, begin: int, end: int) -> Projection:
        """The projection to the outputs ``begin`` ... ``end`` only."""
        return Projection(self.weight[begin:end], None if self.bias is None else self.bias[begin:end])

    def columns(self, request: LogitsRequest) -> Projection:
        """The projection to the requested codes only; a copy if their tokens are not consecutive."""
        if request.tokens is None:
            return self.part(request.first_token, request.first_token + request.num_codes)
        tokens, missing = request.tokens.clamp_min(0), request.tokens < 0
        bias = None if self.bias is None else self.bias[tokens]
        if bool(missing.any()):
            zeros = torch.zeros(len(tokens), dtype=self.weight.dtype, device=self.weight.device)
            bias = (zeros if bias is None else bias).masked_fill(missing, float("-inf"))
        return Projection(self.weight[tokens].masked_fill(missing[:, None], 0), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor, *, inplace: bool = True) -> Tensor:
        """``residual + self(x)`` [R, out]; one fused product if all have the same dtype.

        Otherwise the result has the wider dtype. ``inplace``: ``residual`` may be overwritten.
        """
        if not residual.dtype == x.dtype == self.weight.dtype:
            return residual + self(x)
        if self.bias is not None:
            residual, inplace = residual + self.bias, True
        if residual.is_cuda and inplace:
            return residual.addmm_(x, self.weight.t())  # saves the launch of a copy
        return torch.addmm(residual, x, self.weight.t())


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm without a bias, LayerNorm with one."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, layer: Any) -> Norm:
        """From a norm of torch or transformers."""
        if not type(layer).__name__.endswith(("LayerNorm", "RMSNorm")):
            raise Unsupported(f"a {type(layer).__name__} in the place of a norm")
        bias = getattr(layer, "bias", None)
        eps = layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps
        return cls(layer.weight.detach(), None if bias is None else bias.detach(), eps)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def code_table(norm: Norm, qkv: Projection, embedding: Tensor, codes: range) -> Tensor | None:
    """Layer 0's projection of each code's embedding, [codes, out]; None if there are too many codes."""
    if len(codes) > MAX_TABLE_CODES:
        return None
    return qkv(norm(embedding[codes.start : codes.stop]))


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The feed-forward block with its norm and residual.

    ``x + down(act(up(norm(x))))``, or with a gate ``x + down(act(gate(norm(x))) * up(norm(x)))``.
    """

    norm: Norm
    gate: Projection | None
    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        if self.gate is None:
            return self.down.added_to(x, self.activation(self.up(normed)))
        return self.down.added_to(x, self.activation(self.gate(normed)) * self.up(normed))


@dataclass(frozen=True, slots=True)
class Head:
    """The last norm and the language-model head: logits of the K codes of a level, and their log-sum-exp."""

    norm: Norm
    whole: Projection  # [V, d]
    scale: float = 1.0  # applied after the norm
    gathered: dict[int, tuple[Tensor, Projection]] = field(default_factory=dict)  # by the tokens' address

    def columns(self, request: LogitsRequest) -> Projection:
        """The projection to the requested codes; tokens that are not consecutive are gathered once."""
        if request.tokens is None:
            return self.whole.columns(request)
        key = request.tokens.data_ptr()
        if key not in self.gathered:
            self.gathered[key] = request.tokens, self.whole.columns(request)  # keeps the address in use
        return self.gathered[key][1]

    def __call__(self, x: Tensor, batch: int, request: LogitsRequest) -> Logits:
        """The requested logits of hidden states ``x`` [B * W, d]."""
        hidden = self.norm(x)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if not request.logsumexp:
            return Logits(self.columns(request)(hidden).float().view(batch, -1, request.num_codes), None)
        columns, totals = [], []
        for rows in hidden.split(max(1, MAX_LOGITS // self.whole.weight.shape[0])):
            logits = self.whole(rows)
            columns.append(request.columns_of(logits).float().contiguous())
            totals.append(row_logsumexp(logits))
        values, total = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (columns, totals))
        return Logits(values.view(batch, -1, request.num_codes), total.view(batch, -1))


def padding_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [B, S] that is added to attention scores: 0 at a token, a very low number at padding.

    Its exponential is 0. It is half the lowest finite number, so that a score can be added to it.
    """
    return (1 - mask.to(dtype)) * (torch.finfo(dtype).min / 2)


@dataclass(frozen=True, slots=True)
class UnpaddedBatch:
    """Maps the P tokens of prompts to the B * S cells of a padded batch, so that layers skip padding.

    ``cell_of_token`` [P]; ``token_of_cell`` [B * S]; both None if skipping padding does not pay. A padding
    cell maps to a token of its own user, hidden by the mask. If P exceeds the number of tokens, the surplus
    maps to the last token's cell and is never read.
    """

    batch: int
    cell_of_token: Tensor | None
    token_of_cell: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, num_tokens: int | None) -> UnpaddedBatch:
        """From ``mask`` [B, S]. ``num_tokens`` is an upper bound; this never synchronizes with a GPU."""
        cells, tokens = mask.numel(), token_count(mask) if num_tokens is None else num_tokens
        if tokens is None or tokens > WORTH_UNPADDING * cells:
            return cls(len(mask), None, None)
        is_token = mask != 0
        counts = is_token.sum(1)
        first = counts.cumsum(0) - counts  # [B] index of each user's first token
        token_of_cell = is_token.flatten().cumsum(0).view_as(mask) - 1
        token_of_cell = torch.maximum(token_of_cell, first[:, None]).clamp_max(tokens - 1).flatten()
        numbers = torch.arange(cells, device=mask.device)
        last = (numbers * is_token.flatten()).amax()
        target = token_of_cell.masked_fill(~is_token.flatten(), tokens)  # padding goes to a dropped entry
        cell_of_token = last.repeat(tokens + 1).scatter_(0, target, numbers)[:-1]
        return cls(len(mask), cell_of_token, token_of_cell)

    def unpad(self, cells: Tensor) -> Tensor:
        """[B * S, ...] -> [P, ...]."""
        return cells if self.cell_of_token is None else cells[self.cell_of_token]

    def pad(self, tokens: Tensor) -> Tensor:
        """[P, ...] -> [B, S, ...]."""
        cells = tokens if self.token_of_cell is None else tokens[self.token_of_cell]
        padded: Tensor = cells.unflatten(0, (self.batch, -1))
        return padded

    def last(self, tokens: Tensor) -> Tensor:
        """The values of each user's last cell, [P, ...] -> [B, ...]."""
        if self.token_of_cell is None:
            return self.pad(tokens)[:, -1]
        return tokens[self.token_of_cell.view(self.batch, -1)[:, -1]]


def heads(rows: Tensor, count: int) -> Tensor:
    """[B, S, count * Dh] -> [B, count, S, Dh], a view."""
    by_head: Tensor = rows.unflatten(2, (count, -1))
    return by_head.transpose(1, 2)


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Softmax of ``scale * query . keys + mask``, times the values: [B, H, Q, Dh].

    ``query`` [B, H, Q, Dh], ``keys`` and ``values`` [B, G, S, Dh], ``mask`` broadcasts to [B, H, Q, S].
    """
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )


def cross_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, padding: Tensor) -> Tensor:
    """Attention of beams to the prompt of their user, [B * W, H * Dh].

    ``query`` [B, W, H, Dh], ``keys`` and ``values`` [B, G, S, Dh], ``padding`` [B, S].
    """
    if served_by_triton(query):
        return shared_prefix_attention(query, keys, values, padding, scale)[0].flatten(2).flatten(0, 1)
    out = attention(query.transpose(1, 2), keys, values, scale, padding[:, None, None])  # [B, H, W, Dh]
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


class BeamKVCache:
    """Keys and values of the tokens that beams have been fed, without reordering at a decode step.

    Each layer keeps the rows of all steps, one step after the other. A table of ancestors [T, R] holds the
    indices of the rows that each beam attends to.
    """

    def __init__(self, batch: int, layers: int, device: torch.device, *, shared_start: bool) -> None:
        """``shared_start``: the prefill appends one row per user, which decode steps keep."""
        self.keys_values: list[Tensor | None] = [None] * layers  # each [rows of all steps, 2, G, Dh]
        self.start = torch.arange(batch, device=device)[None][: int(shared_start)]  # [0 or 1, B]
        self.reset_to_prefill()

    def reset_to_prefill(self) -> None:
        """Drop all rows but those of the prefill."""
        self.ancestors, self.beams, self.rows = self.start, 1, self.start.numel()
        for layer, rows in enumerate(self.keys_values):
            self.keys_values[layer] = rows[: self.rows] if rows is not None and self.rows else None

    @property
    def length(self) -> int:
        """T, the number of tokens that each beam has been fed."""
        return len(self.ancestors)

    def extend(self, parents: Tensor) -> None:
        """Begin a step: beams [B, W] extend the beams ``parents`` by one token each."""
        batch, beams = parents.shape
        users = torch.arange(batch, device=parents.device)[:, None] * self.beams
        new = torch.arange(self.rows, self.rows + batch * beams, device=parents.device)[None]
        self.ancestors = torch.cat((self.ancestors[:, (users + parents).flatten()], new))
        self.beams, self.rows = beams, self.rows + batch * beams

    def append(self, layer: int, keys_values: Tensor) -> None:
        """Add the keys and values [R, 2, G, Dh] of this step's tokens."""
        rows = self.keys_values[layer]
        self.keys_values[layer] = keys_values if rows is None else torch.cat((rows, keys_values))

    def attend(
        self, layer: int, query: Tensor, scale: float, bias: Tensor | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of ``query`` [R, H, Dh] to each beam's own tokens, [R, H * Dh].

        ``bias`` [T, H] is added to the scores. ``prefix`` is attention to the prompt, as
        ``shared_prefix_attention`` returns it; the two are merged.
        """
        keys_values = self.keys_values[layer]
        assert keys_values is not None  # holds at least this step's tokens
        if prefix is not None:
            prefix = prefix[0].flatten(0, 1), prefix[1].flatten(0, 1)
        return beam_tree_attention(query, keys_values, self.ancestors, scale, bias, prefix)
