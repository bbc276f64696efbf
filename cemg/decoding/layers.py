"""The few layers that the fast steppers are made of: a model's own weights, arranged for few calls.

R rows, d the width, V vocabulary, K codes a level, B users, S prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cemg_kernels import beam_attention, rms_norm, row_logsumexp
from cemg_kernels.beam_attention import Prefix, Step

BLOCK_COLUMNS = 4096  # of the vocabulary, multiplied at once on a CPU
BLOCK_CELLS = {"cpu": 2**21, "cuda": 2**26}  # logits held at once: 8 and 256 MB
PACKED_ROWS = 4  # with fewer, a product is a pass over the weight, which MKL's kernel does faster


class Wanted(NamedTuple):
    """Which logits a step returns: ``size`` columns from token ``first``; the log-sum-exp of all or not."""

    first: int
    size: int
    total: bool


class Logits(NamedTuple):
    """``columns`` [B, W, K] float32 and, where wanted, ``total`` [B, W]: log-sum-exp over the vocabulary."""

    columns: Tensor
    total: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, wanted: Wanted) -> Logits:
        """The wanted part of logits [B, W, V]."""
        total = logits.float().logsumexp(-1) if wanted.total else None
        return cls(logits[..., wanted.first : wanted.first + wanted.size].float().contiguous(), total)


class Stepper(Protocol):
    """A model in the middle of one search: logits of the first code, then of the next one for every beam."""

    def start(self, input_ids: Tensor, attention_mask: Tensor, wanted: Wanted) -> Logits:
        """After prompts [B, S], one row a user: W = 1."""
        ...

    def step(self, tokens: Tensor, parents: Tensor, wanted: Wanted) -> Logits:
        """After ``tokens`` [B, W], grown from the beams ``parents`` [B, W] before."""
        ...


class Unsupported(Exception):
    """This model's shape is not one that a fast stepper knows; the message says what."""


def unwrapped(model: Any) -> Any:
    """The model under PEFT's wrapper, or itself. Raises Unsupported for adapters other than LoRA."""
    if not hasattr(model, "peft_config"):
        return model
    kinds = {str(config.peft_type.value) for config in model.peft_config.values()}
    if kinds != {"LORA"}:
        raise Unsupported(f"adapters of the kind {', '.join(sorted(kinds))}")
    return model.get_base_model()


def weight_of(module: Any) -> Tensor:
    """The weight that a module applies: what LoRA adds included, PEFT's trained copy where it has one.

    Raises Unsupported where an adapter does more than add to the weight.
    """
    if hasattr(module, "modules_to_save"):  # PEFT: a layer that trains whole, beside its frozen original
        return module.modules_to_save[module.active_adapters[0]].weight.detach()
    if not hasattr(module, "get_delta_weight"):
        return module.weight.detach()
    if any(module.use_dora.values()) or module.disable_adapters:
        raise Unsupported("adapters that are switched off, or scale the weight (DoRA)")
    weight = module.get_base_layer().weight.detach()
    if not module.merged:
        for name in module.active_adapters:
            weight = weight + module.get_delta_weight(name).detach()
    return weight


def packed(weight: Tensor) -> Tensor | None:
    """A float32 weight of the CPU in oneDNN's own layout; None where it would not be used.

    ``F.linear`` asks MKL, which takes AVX2 on an AMD processor that has AVX-512: there oneDNN is 2 to 2.5
    times as fast (Zen 5, one core, 50 rows of 128 x 1024: 0.064 against 0.129 ms).
    """
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
    ):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight)


ONEDNN = {"ReLU": ("relu", ""), "SiLU": ("swish", ""), "SiLUActivation": ("swish", ""),
          "GELUActivation": ("gelu", "none"), "NewGELUActivation": ("gelu", "tanh"),
          "GELUTanh": ("gelu", "tanh")}  # fmt: skip


class Activation(NamedTuple):
    """An activation, and what oneDNN calls it; an empty ``name`` where it knows none."""

    function: Callable[[Tensor], Tensor]
    name: str
    algorithm: str

    @classmethod
    def of(cls, module: Any) -> Activation:
        """Of a module of torch or transformers."""
        return cls(module, *ONEDNN.get(type(module).__name__, ("", "")))


@dataclass(frozen=True, slots=True)
class Projection:
    """``x @ weight.T + bias``; ``weight`` [out, in], and in ``packed`` as the CPU multiplies it fastest."""

    weight: Tensor
    bias: Tensor | None = None
    packed: Tensor | None = None

    @classmethod
    def of(
        cls, modules: Sequence[Any], dtype: torch.dtype, transposed: bool = False, pack: bool = True
    ) -> Projection:
        """Several linear layers over one input as one; ``transposed`` for GPT-2's Conv1D."""
        weights = [weight_of(m).t() if transposed else weight_of(m) for m in modules]
        biases = [m.bias for m in modules]
        if any(b is None for b in biases) and any(b is not None for b in biases):
            raise Unsupported("some projections of a layer have a bias and some have none")
        weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype).contiguous()
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases]).to(dtype)
        return cls(weight, bias, packed(weight) if pack else None)

    def part(self, begin: int, end: int) -> Projection:
        """The columns ``begin`` ... ``end`` of what it gives, as a projection of its own."""
        weight, bias = self.weight[begin:end], None if self.bias is None else self.bias[begin:end]
        return Projection(weight, bias, packed(weight))

    def __call__(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        if self.packed is not None and x.shape[0] >= PACKED_ROWS and (activation is None or activation.name):
            name, algorithm = ("none", "") if activation is None else (activation.name, activation.algorithm)
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        out = F.linear(x, self.weight, self.bias)
        return out if activation is None else activation.function(out)

    def times(self, factor: Tensor, x: Tensor) -> Tensor:
        """``factor * self(x)`` [R, out]."""
        if self.packed is not None and x.shape[0] >= PACKED_ROWS:
            return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.packed, self.bias, "mul")
        return factor * F.linear(x, self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + self(x)`` [R, out], in one product."""
        if self.packed is not None and x.shape[0] >= PACKED_ROWS:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        if self.bias is not None:
            residual = residual + self.bias
        return torch.addmm(residual, x, self.weight.t())


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, or LayerNorm where there is a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Feed:
    """The feed-forward block with its norm and residual: ``down(act(up(x)))``, or with a ``gate`` whose
    activation ``up(x)`` is multiplied with."""

    norm: Norm
    gate: Projection | None
    up: Projection
    down: Projection
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        if self.gate is None:
            hidden = self.up(seen, self.activation)
        else:
            hidden = self.up.times(self.gate(seen, self.activation), seen)
        return self.down.added_to(x, hidden)


@dataclass(frozen=True, slots=True)
class Head:
    """The language-model head: the K columns of a level, and the log-sum-exp of all, block by block.

    The logits of a block of columns stay in the cache until they are summed; the vocabulary's never lie in
    memory at once.
    """

    norm: Norm
    whole: Projection  # [V, d], not packed
    blocks: tuple[Projection, ...]  # its columns, in turn
    scale: float = 1.0
    levels: dict[int, Projection] = field(default_factory=dict)  # by first token, made when first wanted

    @classmethod
    def of(cls, norm: Norm, module: Any, dtype: torch.dtype, scale: float = 1.0) -> Head:
        """Of a linear layer over the last norm, whose output is scaled before."""
        whole = Projection.of([module], dtype, pack=False)
        size = whole.weight.shape[0]
        width = BLOCK_COLUMNS if whole.weight.device.type == "cpu" else size
        blocks = tuple(whole.part(begin, begin + width) for begin in range(0, size, width))
        return cls(norm, whole, blocks, scale)

    def __call__(self, x: Tensor, batch: int, wanted: Wanted) -> Logits:
        """``x`` [B * W, d] before the last norm."""
        hidden = self.norm(x)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if wanted.first not in self.levels:
            self.levels[wanted.first] = self.whole.part(wanted.first, wanted.first + wanted.size)
        columns = self.levels[wanted.first](hidden).float().view(batch, -1, wanted.size)
        return Logits(columns, self._total(hidden).view(batch, -1) if wanted.total else None)

    def _total(self, hidden: Tensor) -> Tensor:
        """The log-sum-exp over the vocabulary, [R]."""
        totals, cells = [], BLOCK_CELLS[hidden.device.type]
        for block in self.blocks:
            parts = hidden.split(max(1, cells // block.weight.shape[0]))
            totals.append(torch.cat([row_logsumexp(block(part)) for part in parts]))
        return totals[0] if len(totals) == 1 else torch.stack(totals).logsumexp(0)


@dataclass(frozen=True, slots=True)
class Packing:
    """Which places of a padded [B, S] hold tokens, so that row-wise layers compute nothing for padding."""

    batch: int
    length: int
    index: Tensor | None  # [T] places in B * S; None where all are tokens

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """Of a mask [B, S]. On a GPU everything stays padded: counting would wait for the device."""
        batch, length = mask.shape
        if mask.device.type != "cpu" or bool(mask.all()):
            return cls(batch, length, None)
        return cls(batch, length, mask.flatten().nonzero()[:, 0])

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        rows = padded.reshape(self.batch * self.length, *padded.shape[2:])
        return rows if self.index is None else rows.index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, c] -> [B, S, c], zero where there is no token."""
        if self.index is not None:
            padded = rows.new_zeros(self.batch * self.length, rows.shape[1])
            rows = padded.index_copy_(0, self.index, rows)
        return rows.view(self.batch, self.length, -1)


def heads(rows: Tensor, count: int) -> Tensor:
    """[B, S, count * Dh] -> [B, count, S, Dh], a view."""
    return rows.unflatten(2, (count, -1)).transpose(1, 2)


class OwnTokens:
    """What the beams have been fed: keys and values a layer and step, and who descends from whom."""

    def __init__(self, batch: int, layers: int, device: torch.device, shared_start: bool) -> None:
        """``shared_start``: step 0 is one row a user, whose keys and values follow by ``add``."""
        self.steps: list[list[Step]] = [[] for _ in range(layers)]
        first = torch.arange(batch, dtype=torch.int32, device=device)[None]
        self.ancestors = first if shared_start else first[:0]  # [T, R]
        self.beams = 1

    def grow(self, parents: Tensor) -> None:
        """Beams [B, W] grown from ``parents``, each fed one more token."""
        batch, beams = parents.shape
        users = torch.arange(batch, device=parents.device)[:, None] * self.beams
        rows = torch.arange(batch * beams, dtype=torch.int32, device=parents.device)[None]
        self.ancestors = torch.cat((self.ancestors[:, (users + parents).flatten()], rows))
        self.beams = beams

    def add(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values [R, G, Dh] of the tokens just fed."""
        self.steps[layer].append((keys, values))

    def attend(
        self,
        layer: int,
        query: Tensor,
        scale: float,
        bias: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """``query`` [R, H, Dh] over all of it -> [R, H * Dh]."""
        shaped = query.view(-1, self.beams, *query.shape[1:])
        return beam_attention(shaped, self.steps[layer], self.ancestors, scale, bias, prefix)
