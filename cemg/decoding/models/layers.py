"""The few layers that the fast states are made of: a model's own weights, arranged for few calls.

R rows, d the width, V vocabulary, K codes a level, B users, W beams, S prompt tokens, H heads over G
key-value heads of Dh, T tokens a beam was fed.
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
from cemg_kernels.attention.beam_tree import ancestor_attention
from cemg_kernels.attention.logsumexp import row_logsumexp
from cemg_kernels.attention.shared_prefix import prompt_attention, served_by_triton

BLOCK_CELLS = 2**26  # logits over the vocabulary held at once
WORTH_UNPADDING = 0.9  # prompts are packed where their tokens are no larger a share of their cells
TABLE_ROWS = 8192  # layer 0's projections of every code are kept where there are no more codes


@dataclass(frozen=True, slots=True)
class Projection:
    """``x @ weight.T + bias``; ``weight`` [out, in]."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, modules: Sequence[Any], dtype: torch.dtype, transposed: bool = False) -> Projection:
        """Several linear layers over one input as one; ``transposed`` for GPT-2's Conv1D."""
        parts = [linear_of(module) for module in modules]
        weights = [weight.t() if transposed else weight for weight, _ in parts]
        biases = [bias for _, bias in parts]
        some = next((bias for bias in biases if bias is not None), None)
        weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype).contiguous()
        bias = None
        if some is not None:  # a projection without one adds nothing
            zeros = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat(zeros).to(dtype)
        return cls(weight, bias)

    def part(self, begin: int, end: int) -> Projection:
        """The columns ``begin`` ... ``end`` of what it gives, as a projection of its own."""
        return Projection(self.weight[begin:end], None if self.bias is None else self.bias[begin:end])

    def columns(self, request: LogitsRequest) -> Projection:
        """The requested columns, as a projection of its own; a copy where they do not lie together."""
        if request.tokens is None:
            return self.part(request.first_token, request.first_token + request.num_codes)
        tokens, none = request.tokens.clamp_min(0), request.tokens < 0
        bias = None if self.bias is None else self.bias[tokens]
        if bool(none.any()):
            zeros = torch.zeros(len(tokens), dtype=self.weight.dtype, device=self.weight.device)
            bias = (zeros if bias is None else bias).masked_fill(none, float("-inf"))
        return Projection(self.weight[tokens].masked_fill(none[:, None], 0), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor, *, inplace: bool = True) -> Tensor:
        """``residual + self(x)`` [R, out], in one product where all have one dtype, else in the wider one.

        ``inplace``: ``residual`` may be overwritten, since nobody reads it later."""
        if not residual.dtype == x.dtype == self.weight.dtype:
            return residual + self(x)
        if self.bias is not None:
            residual, inplace = residual + self.bias, True
        if residual.is_cuda and inplace:
            return residual.addmm_(x, self.weight.t())  # a launch less: nothing is copied
        return torch.addmm(residual, x, self.weight.t())


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, or LayerNorm where there is a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, layer: Any) -> Norm:
        """Of a norm of torch or transformers."""
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
    """What layer 0 projects each code's embedding to, [codes, out]; None where there are too many codes."""
    if len(codes) > TABLE_ROWS:
        return None
    return qkv(norm(embedding[codes.start : codes.stop]))


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The feed-forward block with its norm and residual: ``down(act(up(x)))``, or with a ``gate`` whose
    activation ``up(x)`` is multiplied with."""

    norm: Norm
    gate: Projection | None
    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        if self.gate is None:
            return self.down.added_to(x, self.activation(self.up(seen)))
        return self.down.added_to(x, self.activation(self.gate(seen)) * self.up(seen))


@dataclass(frozen=True, slots=True)
class Head:
    """The language-model head: the K columns of a level, and the log-sum-exp of all, some rows at a time."""

    norm: Norm
    whole: Projection  # [V, d]
    scale: float = 1.0  # of what the norm gives
    gathered: dict[int, tuple[Tensor, Projection]] = field(default_factory=dict)  # by their tokens' address

    def columns(self, request: LogitsRequest) -> Projection:
        """The requested columns; those that do not lie together are gathered once."""
        if request.tokens is None:
            return self.whole.columns(request)
        key = request.tokens.data_ptr()
        if key not in self.gathered:
            self.gathered[key] = request.tokens, self.whole.columns(request)  # the tokens keep their address
        return self.gathered[key][1]

    def __call__(self, x: Tensor, batch: int, request: LogitsRequest) -> Logits:
        """``x`` [B * W, d] before the last norm."""
        hidden = self.norm(x)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if not request.logsumexp:
            return Logits(self.columns(request)(hidden).float().view(batch, -1, request.num_codes), None)
        columns, totals = [], []
        for part in hidden.split(max(1, BLOCK_CELLS // self.whole.weight.shape[0])):
            logits = self.whole(part)
            columns.append(request.columns_of(logits).float().contiguous())
            totals.append(row_logsumexp(logits))
        level, total = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in (columns, totals))
        return Logits(level.view(batch, -1, request.num_codes), total.view(batch, -1))


def padding_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides padding when it is added to scores, [B, S]: 0 at a token, elsewhere a number so low that its
    exponential is 0, and so far from the lowest that a score can be added to it."""
    return (1 - mask.to(dtype)) * (torch.finfo(dtype).min / 2)


@dataclass(frozen=True, slots=True)
class UnpaddedBatch:
    """Where the P tokens of prompts lie among their B * S cells, so that layers see rows of tokens alone.

    ``cell`` [P] of each token, ``place`` [B * S] of each cell among the tokens; both None where nothing is
    saved. A cell of padding has the place of a token of its own user, hidden by the mask; tokens beyond those
    that there are have the cell of the last one, and are never asked for.
    """

    batch: int
    cell: Tensor | None
    place: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, tokens: int | None) -> UnpaddedBatch:
        """Of ``mask`` [B, S], with room for ``tokens``, no fewer than it has; never waits for a GPU."""
        cells, tokens = mask.numel(), token_count(mask) if tokens is None else tokens
        if tokens is None or tokens > WORTH_UNPADDING * cells:
            return cls(len(mask), None, None)
        there = mask != 0
        counts = there.sum(1)
        first = counts.cumsum(0) - counts  # [B] the place of each user's first token
        place = there.flatten().cumsum(0).view_as(mask) - 1
        place = torch.maximum(place, first[:, None]).clamp_max(tokens - 1).flatten()
        numbers = torch.arange(cells, device=mask.device)
        last = (numbers * there.flatten()).amax()
        target = place.masked_fill(~there.flatten(), tokens)  # padding goes behind all
        cell = last.repeat(tokens + 1).scatter_(0, target, numbers)[:-1]
        return cls(len(mask), cell, place)

    def tokens(self, cells: Tensor) -> Tensor:
        """[B * S, ...] -> [P, ...]."""
        return cells if self.cell is None else cells[self.cell]

    def cells(self, tokens: Tensor) -> Tensor:
        """[P, ...] -> [B, S, ...]."""
        return (tokens if self.place is None else tokens[self.place]).unflatten(0, (self.batch, -1))

    def last(self, tokens: Tensor) -> Tensor:
        """What the last cell of each user has, [P, ...] -> [B, ...]."""
        if self.place is None:
            return tokens.unflatten(0, (self.batch, -1))[:, -1]
        return tokens[self.place.view(self.batch, -1)[:, -1]]


def heads(rows: Tensor, count: int) -> Tensor:
    """[B, S, count * Dh] -> [B, count, S, Dh], a view."""
    return rows.unflatten(2, (count, -1)).transpose(1, 2)


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Softmax of ``scale * query . keys + mask``, times the values: [B, H, Q, Dh].

    ``query`` [B, H, Q, Dh], ``keys`` and ``values`` [B, G, S, Dh], ``mask`` broadcasts to [B, H, Q, S].
    """
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )


def cross_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, padding: Tensor) -> Tensor:
    """Beams over the prompt of their user: ``query`` [B, W, H, Dh], ``keys`` and ``values`` [B, G, S, Dh],
    ``padding`` [B, S] -> [B * W, H * Dh]."""
    if served_by_triton(query):
        return prompt_attention(query, keys, values, padding, scale)[0].flatten(2).flatten(0, 1)
    seen = attention(query.transpose(1, 2), keys, values, scale, padding[:, None, None])  # [B, H, W, Dh]
    return seen.transpose(1, 2).flatten(2).flatten(0, 1)


class BeamKVCache:
    """What the beams have been fed: keys and values of all steps, and who descends from whom.

    No cache is re-ordered: a table of ancestors [T, R] says which of a layer's rows, those of all steps one
    after the other, a row has.
    """

    def __init__(self, batch: int, layers: int, device: torch.device, shared_start: bool) -> None:
        """``shared_start``: step 0 is one row a user, whose keys and values follow by ``add``."""
        self.kept: list[Tensor | None] = [None] * layers  # each [rows of all steps, 2, G, Dh]
        self.start = torch.arange(batch, device=device)[None][: int(shared_start)]  # [0 or 1, B]
        self.reset_to_prefill()

    def reset_to_prefill(self) -> None:
        """Forget all but the shared start."""
        self.ancestors, self.beams, self.rows = self.start, 1, self.start.numel()
        for layer, kept in enumerate(self.kept):
            self.kept[layer] = kept[: self.rows] if kept is not None and self.rows else None

    @property
    def length(self) -> int:
        """T: how many tokens each beam was fed."""
        return len(self.ancestors)

    def grow(self, parents: Tensor) -> None:
        """Beams [B, W] grown from ``parents``, each fed one more token."""
        batch, beams = parents.shape
        users = torch.arange(batch, device=parents.device)[:, None] * self.beams
        new = torch.arange(self.rows, self.rows + batch * beams, device=parents.device)[None]
        self.ancestors = torch.cat((self.ancestors[:, (users + parents).flatten()], new))
        self.beams, self.rows = beams, self.rows + batch * beams

    def add(self, layer: int, keys_values: Tensor) -> None:
        """Keys and values [R, 2, G, Dh] of the tokens just fed."""
        kept = self.kept[layer]
        self.kept[layer] = keys_values if kept is None else torch.cat((kept, keys_values))

    def attend(
        self, layer: int, query: Tensor, scale: float, bias: Tensor | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """``query`` [R, H, Dh] over all of it -> [R, H * Dh]; ``bias`` [T, H] is added to the scores.

        ``prefix``: attention over the prompt to be merged with, as ``prompt_attention`` gives it."""
        kept = self.kept[layer]
        assert kept is not None  # of at least the token just fed
        if prefix is not None:
            prefix = prefix[0].flatten(0, 1), prefix[1].flatten(0, 1)
        return ancestor_attention(query, kept, self.ancestors, scale, bias, prefix)
