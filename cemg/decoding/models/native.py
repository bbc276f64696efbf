"""The fast decoder of the CPU: a T5 or decoder-only model in C++, a call a step or a search, in float32.

B users, W beams, S prompt tokens, K codes a level, d the width, H heads over G key-value heads of Dh,
P places of a sequence.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.decoding.models.causal import CausalPlan
from cemg.decoding.models.layers import FeedForward, Norm, Projection
from cemg.decoding.models.t5 import T5Plan
from cemg.decoding.protocol import (
    DecoderPlan,
    Logits,
    LogitsRequest,
    SearchOutput,
    SearchTimings,
    Unsupported,
)
from cemg.decoding.timings import add_native_events
from cemg.errors import UserError
from cemg_kernels.constrained.softmax import NORMALIZE_INDEX, Normalize
from cemg_kernels.runtime.dispatch import native
from cemg_kernels.runtime.ranges import ranges_enabled
from cemg_kernels.trie.arrays import TrieArrays
from cemg_kernels.trie.filter_tensors import FilterTensors

if TYPE_CHECKING:
    from cemg_kernels._native import BeamSearch, Transformer

PANEL = 32  # columns that the C++ multiplies at once: kPanel of gemm_cpu.h
ROTARY_TABLE_STEP = 256  # places that the tables of rotations grow by
ROOM = 2**24  # floats of weights that share a stretch of memory
MOST_KEPT = (
    2**28
)  # bytes of a finished search's room that are kept for the next; one room a thread that calls
ACTIVATIONS = {"ReLU": 1, "SiLU": 2, "SiLUActivation": 2, "GELUActivation": 3, "NewGELUActivation": 4,
               "GELUTanh": 4}  # fmt: skip  # Activation of gemm_cpu.h

LinearFields = tuple[int, int, int, int]  # in, out, addresses of panels and bias
NormFields = tuple[int, int, float]  # addresses of weight and bias, epsilon
LogitsRequestFields = tuple[LinearFields, LinearFields, int, int]  # columns, all, addresses of the answers


class PositionTables(NamedTuple):
    """Tables by place in a sequence: embeddings [P, d], cosines and sines [P, Dh] of the rotation, a bias."""

    embedding: Tensor | None = None
    cosine: Tensor | None = None
    sine: Tensor | None = None
    bias: Tensor | None = None

    def addresses(self) -> tuple[int, int, int, int]:
        """0 where there is none."""
        one, two, three, four = (0 if table is None else table.data_ptr() for table in self)
        return one, two, three, four


def large_pages(count: int) -> Tensor:
    """Floats [count], zero, in pages of 2 MB where the system has them: products of few rows read every
    weight once, and looking up pages of 4 KB takes a tenth of their time."""
    # shared pages, the default, are those of a file in memory, which stay small; Windows knows no others
    private = (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,) if hasattr(mmap, "MAP_PRIVATE") else ()
    room = mmap.mmap(-1, 4 * count, *private)
    with suppress(AttributeError, OSError):  # no Linux, or no such pages
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.float32)


def prompt_fields(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [B, S] and which of their tokens there are, int64, as the C++ reads them; UserError for what
    is neither."""
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape or input_ids.is_floating_point():
        raise UserError(
            f"prompts must be integers [B, S] with a mask of that shape, got {input_ids.dtype} "
            f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        )
    return input_ids.to(torch.int64).contiguous(), (attention_mask != 0).to(torch.int64).contiguous()


class Sizes(NamedTuple):
    """Of all layers of a stack."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


def check_sizes(parts: Sequence[tuple[Projection | Norm | None, tuple[int, ...]]]) -> None:
    """Unsupported where a weight has another shape than its layer needs: the C++ reads as much memory."""
    for part, shape in parts:
        if part is None:
            continue
        found = part.weight.shape, part.bias is None or part.bias.shape == shape[:1]
        if found != (shape, True):
            raise Unsupported(f"one of its layers is {list(part.weight.shape)}, not {list(shape)}")


class NativePlan(DecoderPlan):
    """The weights of a plan as the C++ reads them, copied once: make a new one after training.

    Raises Unsupported for other weights than float32 on the CPU, for activations that the C++ does not know,
    and for layers of different sizes. Weights that are not finite give the lists that they give in PyTorch.
    """

    searches_in_one_call = True

    def __init__(self, plan: T5Plan | CausalPlan) -> None:
        if plan.dtype != torch.float32 or plan.embedding.device.type != "cpu":
            raise Unsupported(f"its weights are {plan.dtype} on {plan.embedding.device}")
        self.plan, self.max_tokens = plan, plan.max_tokens
        self.start_token = plan.start_token if isinstance(plan, T5Plan) else 0
        self._kept: list[Tensor] = []  # what the C++ has the addresses of
        self._room = torch.empty(0)  # for weights to come
        self._columns: dict[tuple[int, int], LinearFields] = {}  # of the head, by what ``linears`` says
        self._lock = threading.Lock()  # of what is made late
        self._whole: LinearFields | None = None  # the head
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._idle: list[BeamSearch] = []  # finished searches, whose room the next ones take
        self.encoder = self._t5_encoder(plan) if isinstance(plan, T5Plan) else None
        self.decoder = self._t5_decoder(plan) if isinstance(plan, T5Plan) else self._causal(plan)
        if plan.table is not None:
            self.decoder.set_code_table(self._address(plan.table), plan.first_code, len(plan.table))

    def describe(self) -> str:
        return f"{self.plan.describe()} in C++"

    def new_state(self) -> NativeState:
        """A state for one batch."""
        return NativeState(self)

    def search(self, threads: int) -> BeamSearch:
        """Room for a search on so many threads; give it back by ``finished``."""
        try:
            found = self._idle.pop()
        except IndexError:
            found = None
        if found is None or found.threads != threads:
            found = native().BeamSearch(self.encoder, self.decoder, threads)
        return found

    def finished(self, search: BeamSearch) -> None:
        """Keeps the room of a search, unless it is large."""
        if search.nbytes <= MOST_KEPT:
            self._idle.append(search)

    def beam_search(
        self, input_ids: Tensor, attention_mask: Tensor, *, beams: int, trie: TrieArrays,
        filter: FilterTensors | None, normalize: Normalize, requests: Sequence[LogitsRequest],
        code_tokens: Tensor | None = None,
    ) -> SearchOutput:  # fmt: skip
        """A whole search in one call; see ``DecoderPlan.beam_search``.

        Scores [B, W], leaves [B, W], codes [B, W, M] and the best that was cut [B].
        """
        tokens, mask = prompt_fields(input_ids, attention_mask)
        batch, length = input_ids.shape
        longest = int(mask.sum(1).max())
        prompt_positions = self.prompt_positions(length, longest)  # kept until the C++ has read it
        places = [self.step_positions(level, longest) for level in range(trie.levels)]
        linears = [self.linears(each) for each in requests]
        scores, pruned = torch.empty(batch, beams), torch.empty(batch)
        leaves = torch.empty(batch, beams, dtype=torch.int32)
        codes = torch.empty(batch, beams, trie.levels, dtype=torch.int64)
        numbers = [NORMALIZE_INDEX[normalize], beams, requests[0].first_token, self.start_token]
        if code_tokens is not None:
            numbers.append(code_tokens.data_ptr())
        room = self.search(torch.get_num_threads())
        room.note_laps(False)
        try:
            spent = room.search(
                trie.view, None if filter is None else filter.fields(batch),
                (tokens.data_ptr(), mask.data_ptr()), (batch, length),
                prompt_positions.addresses(),
                [(own.addresses(), columns) for own, (columns, _) in zip(places, linears, strict=True)],
                linears[0][1], numbers,
                (scores.data_ptr(), leaves.data_ptr(), codes.data_ptr(), pruned.data_ptr()),
            )  # fmt: skip
        finally:
            self.finished(room)
        return SearchOutput(scores, leaves, codes, pruned, SearchTimings(*spent))

    def linears(self, request: LogitsRequest) -> tuple[LinearFields, LinearFields]:
        """The requested columns of the head, and the whole head or nothing."""
        head, tokens = self.plan.head.whole, request.tokens
        key = (request.first_token, request.num_codes) if tokens is None else (tokens.data_ptr(), -1)
        with self._lock:
            if key not in self._columns:
                self._columns[key] = self._linear(head.columns(request))
                if tokens is not None:
                    self._kept.append(tokens)  # so that no others get their address
            if request.logsumexp and self._whole is None:
                self._whole = self._linear(head)
            whole = self._whole if request.logsumexp else None
        return self._columns[key], whole or self._linear(None)

    def prompt_positions(self, length: int, longest: int) -> PositionTables:
        """What the places of prompts add: ``length`` with their padding, of which ``longest`` hold tokens."""
        if isinstance(self.plan, T5Plan):
            return PositionTables(bias=self.plan.encoder_bias(length))
        return self._causal_positions(self.plan, longest)

    def step_positions(self, step: int, longest: int) -> PositionTables:
        """The same of the token that step ``step`` feeds, the ``step``-th after prompts of no more tokens."""
        if isinstance(self.plan, T5Plan):
            return PositionTables(bias=self.plan.decoder_bias(step))
        return self._causal_positions(self.plan, longest + step)

    def _causal_positions(self, plan: CausalPlan, count: int) -> PositionTables:
        if plan.positions is not None:
            plan.check_fits(count)
            return PositionTables(embedding=plan.positions)
        with self._lock:
            if self._rotation is None or len(self._rotation[0]) < count:
                rounded = -(-count // ROTARY_TABLE_STEP) * ROTARY_TABLE_STEP
                cosine, sine = plan.rotary(torch.arange(rounded)) or (None, None)
                assert cosine is not None and sine is not None
                self._rotation = cosine[:, 0].contiguous(), sine[:, 0].contiguous()  # [P, Dh]
            cosine, sine = self._rotation
        return PositionTables(cosine=cosine, sine=sine)

    def _t5_encoder(self, plan: T5Plan) -> Transformer:
        model = self._stack(plan, plan.heads, 1.0, plan.encoder_embedding, plan.encoder_norm, 1.0)
        for layer in plan.encoder:
            self._add(model, layer.norm, layer.qkv, layer.out, layer.feed_forward)
        return model

    def _t5_decoder(self, plan: T5Plan) -> Transformer:
        model = self._stack(plan, plan.heads, 1.0, plan.embedding, plan.head.norm, plan.head.scale)
        both = plan.cross_kv.weight.shape[0] // len(plan.decoder)
        for number, layer in enumerate(plan.decoder):
            key_value = plan.cross_kv.part(number * both, (number + 1) * both)
            self._add(model, layer.norm, layer.qkv, layer.out, layer.feed_forward,
                      cross_norm=layer.cross_norm,
                      cross=(layer.cross_q, key_value, layer.cross_out))  # fmt: skip
        return model

    def _causal(self, plan: CausalPlan) -> Transformer:
        model = self._stack(plan, plan.kv_heads, plan.scale, plan.embedding, plan.head.norm, plan.head.scale)
        for layer in plan.layers:
            self._add(model, layer.norm, layer.qkv, layer.out, layer.feed_forward,
                      head_norms=(layer.q_norm, layer.k_norm))  # fmt: skip
        return model

    def _stack(
        self, plan: T5Plan | CausalPlan, kv_heads: int, scale: float, embedding: Tensor, last: Norm,
        last_scale: float,
    ) -> Transformer:  # fmt: skip
        """A stack without its layers; all of a model's have the same sizes."""
        qkv = (plan.decoder if isinstance(plan, T5Plan) else plan.layers)[0].qkv.weight
        size = qkv.shape[0] // (plan.heads + 2 * kv_heads)
        self.sizes = sizes = Sizes(embedding.shape[1], plan.heads, kv_heads, size)
        check_sizes([(last, (sizes.width,)), (plan.head.whole, (len(plan.head.whole.weight), sizes.width))])
        return native().Transformer(
            sizes, scale, self._address(embedding), len(embedding), self._norm(last), last_scale
        )

    def _add(
        self, model: Transformer, norm: Norm, qkv: Projection, out: Projection, feed_forward: FeedForward, *,
        head_norms: Sequence[Norm | None] = (None, None), cross_norm: Norm | None = None,
        cross: Sequence[Projection | None] = (None, None, None),
    ) -> None:  # fmt: skip
        name = type(feed_forward.activation).__name__
        if name not in ACTIVATIONS:
            raise Unsupported(f"its C++ knows no activation {name}")
        norms = (norm, *head_norms, cross_norm, feed_forward.norm)
        linears = (qkv, out, *cross, feed_forward.gate, feed_forward.up, feed_forward.down)
        width, heads, kv_heads, size = self.sizes
        own, both, hidden = heads * size, 2 * kv_heads * size, len(feed_forward.up.weight)
        outputs = (own + both, width, own, both, width, hidden, hidden, width)
        inputs = (width, own, width, width, own, width, width, hidden)
        check_sizes(list(zip(linears, zip(outputs, inputs, strict=True), strict=True)))
        of_norms = ((width,), (size,), (size,), (width,), (width,))
        check_sizes(list(zip(norms, of_norms, strict=True)))
        model.add_layer([self._norm(n) for n in norms], [self._linear(p) for p in linears], ACTIVATIONS[name])

    def _linear(self, projection: Projection | None) -> LinearFields:
        """A projection [out, in] in panels [ceil(out / PANEL), in, PANEL], zero past ``out``."""
        if projection is None:
            return 0, 0, 0, 0
        out, width = projection.weight.shape
        return width, out, self._panels(projection.weight), self._address(projection.bias)

    def _panels(self, weight: Tensor) -> int:
        out, width = weight.shape
        panels = F.pad(weight, (0, 0, 0, -out % PANEL)).view(-1, PANEL, width).transpose(1, 2)
        count = panels.numel()
        if count > self._room.numel():
            self._room = large_pages(max(count, ROOM))
            self._kept.append(self._room)
        own, self._room = self._room[:count], self._room[count:]
        own.view(panels.shape).copy_(panels)
        return own.data_ptr()

    def _norm(self, norm: Norm | None) -> NormFields:
        if norm is None:
            return 0, 0, 0.0
        return self._address(norm.weight), self._address(norm.bias), norm.eps

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.float().contiguous())
        return self._kept[-1].data_ptr()


class NativeState:
    """A search whose state is in C++. While named ranges are on, ``record_timings`` gets the parts of each
    call."""

    def __init__(self, plan: NativePlan) -> None:
        self.plan = plan
        self.search = plan.search(torch.get_num_threads())
        self.batch = self.step_number = self.longest = 0  # until it starts
        self.search.note_laps(ranges_enabled())

    def __del__(self) -> None:
        self.plan.finished(self.search)

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        tokens, mask = prompt_fields(input_ids, attention_mask)
        self.batch, length = input_ids.shape
        self.step_number = 0  # of the first code
        self.longest = int(mask.sum(1).max())
        places, own = (
            self.plan.prompt_positions(length, self.longest),
            self.plan.step_positions(0, self.longest),
        )
        logits, room = self._room((self.batch, 1), request)
        self.search.start(
            tokens.data_ptr(), mask.data_ptr(), (self.batch, length), places.addresses(),
            self.plan.start_token, own.addresses(), room,
        )  # fmt: skip
        self._note_laps()
        return logits

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        fed, parents = tokens.contiguous(), parents.contiguous()
        asked = None if request.rows is None else request.rows.contiguous()
        if fed.dim() != 2 or len(fed) != self.batch or not fed.dtype == parents.dtype == torch.int64:
            raise ValueError(f"tokens and parents must be int64 [{self.batch}, W], got {fed.dtype} "
                             f"{list(fed.shape)} and {parents.dtype}")  # fmt: skip
        if parents.shape != fed.shape or (asked is not None and asked.shape != fed.shape):
            raise ValueError(f"tokens, parents and rows must have one shape, tokens have {list(fed.shape)}")
        self.step_number += 1
        places = self.plan.step_positions(self.step_number, self.longest)
        shape = tuple(fed.shape) if asked is None else (int(asked.sum()),)
        logits, room = self._room(shape, request)
        mask = 0 if asked is None else asked.data_ptr()
        self.search.step(fed.data_ptr(), parents.data_ptr(), mask, fed.shape[1], places.addresses(), room)
        self._note_laps()
        return logits if asked is None else logits.scatter(asked)

    def reset_to_prefill(self) -> None:
        self.step_number = 0
        self.search.rewind()

    def _note_laps(self) -> None:
        if ranges_enabled():
            add_native_events(self.search.laps())

    def _room(self, shape: tuple[int, ...], request: LogitsRequest) -> tuple[Logits, LogitsRequestFields]:
        """Room for the answer of rows in this shape, and what the C++ is told of it."""
        columns = torch.empty(*shape, request.num_codes)
        total = torch.empty(shape) if request.logsumexp else None
        room = (*self.plan.linears(request), columns.data_ptr(), 0 if total is None else total.data_ptr())
        return Logits(columns, total), room
