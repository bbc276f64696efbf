"""The fast decoder on the CPU: T5 and decoder-only models in C++, in float32, one call per step or search.

B users, W beams, S prompt tokens, K codes per level, d the hidden size, H heads over G key-value heads of
size Dh, P positions of a sequence, M levels.
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

from cemg.decoding.models.layers import Norm, Projection
from cemg.decoding.models.stacks import PositionTables, Stack, StackedPlan, StackLayer
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
from cemg_kernels.constrained.prior import PriorTensors
from cemg_kernels.constrained.softmax import NORMALIZE_INDEX, Normalize, native_normalize
from cemg_kernels.runtime.dispatch import native
from cemg_kernels.runtime.ranges import ranges_enabled
from cemg_kernels.trie.arrays import TrieArrays
from cemg_kernels.trie.filter_tensors import FilterTensors

if TYPE_CHECKING:
    from cemg_kernels import _native

WEIGHT_BLOCK = 2**24  # floats of weights that share one memory block
MAX_KEPT_BYTES = 2**28  # the next call does not reuse a larger search; each calling thread has its own
ACTIVATIONS = {"ReLU": "RELU", "SiLU": "SILU", "SiLUActivation": "SILU", "GELUActivation": "GELU",
               "NewGELUActivation": "GELU_TANH", "GELUTanh": "GELU_TANH"}  # fmt: skip


def addresses_of(tables: PositionTables) -> _native.PositionTables:
    """The same tables for C++, which does not keep the tensors alive."""
    addresses: _native.PositionTables = native().PositionTables(
        **{name: table.data_ptr() for name, table in tables._asdict().items() if table is not None}
    )
    return addresses


def large_pages(count: int) -> Tensor:
    """Zeros [count], float32, in pages of 2 MB if the system has them.

    Products of few rows read every weight once, and address translation of 4 KB pages takes a tenth of their
    time.
    """
    # a shared mapping, the default, is a file in memory and gets no large pages; Windows has no private one
    private = (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,) if hasattr(mmap, "MAP_PRIVATE") else ()
    pages = mmap.mmap(-1, 4 * count, *private)
    with suppress(AttributeError, OSError):  # not on Linux, or large pages are off
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)


def prompt_fields(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, [B, S] each, as the contiguous int64 that C++ reads.

    Raises:
        UserError: if the prompts are not integers [B, S] or the mask has another shape.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape or input_ids.is_floating_point():
        raise UserError(
            f"prompts must be integers [B, S] with a mask of that shape, got {input_ids.dtype} "
            f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        )
    return input_ids.to(torch.int64).contiguous(), (attention_mask != 0).to(torch.int64).contiguous()


class Sizes(NamedTuple):
    """The sizes that all layers of a model share."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes_of(stack: Stack) -> Sizes:
    """The sizes of the first layer."""
    head_dim = stack.layers[0].qkv.weight.shape[0] // (stack.heads + 2 * stack.kv_heads)
    return Sizes(stack.embedding.shape[1], stack.heads, stack.kv_heads, head_dim)


def check_sizes(parts: Sequence[tuple[Projection | Norm | None, tuple[int, ...]]]) -> None:
    """Raises Unsupported if a weight does not have the shape that C++ will read."""
    for part, shape in parts:
        if part is None:
            continue
        bias_fits = part.bias is None or part.bias.shape == shape[:1]
        if part.weight.shape != shape or not bias_fits:
            raise Unsupported(f"one of its layers is {list(part.weight.shape)}, not {list(shape)}")


class NativePlan(DecoderPlan):
    """A copy of a plan's weights in the layout of the C++ decoder. Make a new one after training.

    Weights that are not finite give the same lists as in PyTorch.

    Raises:
        Unsupported: if the weights are not float32 on the CPU, if C++ does not have the activation, or if the
            layers have different sizes.
    """

    searches_in_one_call = True

    def __init__(self, plan: StackedPlan) -> None:
        if plan.dtype != torch.float32 or plan.embedding.device.type != "cpu":
            raise Unsupported(f"its weights are {plan.dtype} on {plan.embedding.device}")
        self.source, self.max_tokens = plan, plan.max_tokens
        self.start_token = plan.start_token
        self._kept: list[Tensor] = []  # tensors whose addresses C++ holds
        self._free = torch.empty(0)  # the unused rest of the last block of weights
        self._columns: dict[tuple[int, int], _native.Linear] = {}  # of the head, see ``head_linears``
        self._lock = threading.Lock()  # for what is computed on first use
        self._vocabulary: _native.Linear | None = None  # the whole head
        self._idle: list[_native.BeamSearch] = []  # finished searches, whose buffers the next ones reuse
        encoder, decoder, head = plan.encoder_stack(), plan.decoder_stack(), plan.head.whole
        sizes = sizes_of(decoder)
        check_sizes([(head, (len(head.weight), sizes.width))])
        self.encoder = None if encoder is None else self._transformer(encoder, sizes)
        self.decoder = self._transformer(decoder, sizes)
        if plan.table is not None:
            self.decoder.set_code_table(
                table=self._address(plan.table), first_code=plan.first_code, num_codes=len(plan.table)
            )

    def describe(self) -> str:
        return f"{self.source.describe()} in C++"

    def new_state(self) -> NativeState:
        """A state for one batch."""
        return NativeState(self)

    def take_search(self, threads: int) -> _native.BeamSearch:
        """An idle search for this many threads, or a new one. Return it with ``keep_search``."""
        try:
            search = self._idle.pop()
        except IndexError:
            search = None
        if search is None or search.threads != threads:
            search = native().BeamSearch(self.encoder, self.decoder, threads)
        return search

    def keep_search(self, search: _native.BeamSearch) -> None:
        """Keeps a finished search for the next call, unless its buffers are large."""
        if search.nbytes <= MAX_KEPT_BYTES:
            self._idle.append(search)

    def beam_search(
        self, input_ids: Tensor, attention_mask: Tensor, *, beams: int, trie: TrieArrays,
        filter: FilterTensors | None, normalize: Normalize, requests: Sequence[LogitsRequest],
        code_tokens: Tensor | None = None, prior: PriorTensors | None = None,
    ) -> SearchOutput:  # fmt: skip
        """A whole search in one call; see ``DecoderPlan.beam_search``."""
        tokens, mask = prompt_fields(input_ids, attention_mask)
        batch, length = input_ids.shape
        longest = int(mask.sum(1).max())
        prompt_positions = self.source.prompt_positions(length, longest)  # these keep the tables alive
        positions = [self.source.step_positions(level, longest) for level in range(trie.levels)]
        linears = [self.head_linears(request) for request in requests]
        scores, pruned = torch.empty(batch, beams), torch.empty(batch)
        leaves = torch.empty(batch, beams, dtype=torch.int32)
        codes = torch.empty(batch, beams, trie.levels, dtype=torch.int64)
        search = self.take_search(torch.get_num_threads())
        search.set_profiling(False)
        try:
            spent = search.search(
                native().Prompts(tokens=tokens.data_ptr(), mask=mask.data_ptr(), batch=batch, length=length),
                trie.view,
                None if filter is None else filter.view(batch),
                native().SearchRequest(
                    normalize=native_normalize(NORMALIZE_INDEX[normalize]),
                    beam_width=beams,
                    first_token=requests[0].first_token,
                    start_token=self.start_token,
                    prompt_positions=addresses_of(prompt_positions),
                    step_positions=[addresses_of(tables) for tables in positions],
                    level_columns=[columns for columns, _ in linears],
                    vocabulary=linears[0][1],
                    code_tokens=0 if code_tokens is None else code_tokens.data_ptr(),
                    prior=None if prior is None else prior.view(),
                ),
                native().SearchResult(
                    scores=scores.data_ptr(), leaves=leaves.data_ptr(), codes=codes.data_ptr(),
                    pruned=pruned.data_ptr(),
                ),
            )  # fmt: skip
        finally:
            self.keep_search(search)
        timings = SearchTimings(spent.prefill, spent.decode_steps, spent.selection, spent.rows)
        return SearchOutput(scores, leaves, codes, pruned, timings)

    def head_linears(self, request: LogitsRequest) -> tuple[_native.Linear, _native.Linear]:
        """The requested columns of the head; and the whole head if its log-sum-exp is requested."""
        head, tokens = self.source.head.whole, request.tokens
        key = (request.first_token, request.num_codes) if tokens is None else (tokens.data_ptr(), -1)
        with self._lock:
            if key not in self._columns:
                self._columns[key] = self._linear(head.columns(request))
                if tokens is not None:
                    self._kept.append(tokens)  # so that no other tensor gets the address in the key
            if request.logsumexp and self._vocabulary is None:
                self._vocabulary = self._linear(head)
            vocabulary = self._vocabulary if request.logsumexp else None
        return self._columns[key], vocabulary or native().Linear()

    def _transformer(self, stack: Stack, sizes: Sizes) -> _native.Transformer:
        """A copy of an encoder or a decoder, which have the same sizes."""
        check_sizes([
            (stack.final_norm, (sizes.width,)),
            (Projection(stack.embedding), (len(stack.embedding), sizes.width)),
        ])  # fmt: skip
        model: _native.Transformer = native().Transformer(
            hidden_size=sizes.width, heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
            attention_scale=stack.attention_scale, embedding=self._address(stack.embedding),
            vocabulary=len(stack.embedding), final_norm=self._norm(stack.final_norm),
            final_scale=stack.final_scale,
        )  # fmt: skip
        for layer in stack.layers:
            model.add_layer(self._layer(layer, sizes))
        return model

    def _layer(self, layer: StackLayer, sizes: Sizes) -> _native.TransformerLayer:
        """A copy of a layer, after a check of its sizes."""
        feed_forward = layer.feed_forward
        activation = type(feed_forward.activation).__name__
        if activation not in ACTIVATIONS:
            raise Unsupported(f"the C++ decoder does not have its activation {activation}")
        width, heads, kv_heads, size = sizes
        queries, keys_values, hidden = heads * size, 2 * kv_heads * size, len(feed_forward.up.weight)
        norms = {
            "attention_norm": (layer.norm, width), "query_norm": (layer.q_norm, size),
            "key_norm": (layer.k_norm, size), "cross_norm": (layer.cross_norm, width),
            "feed_forward_norm": (feed_forward.norm, width),
        }  # fmt: skip
        linears = {
            "qkv": (layer.qkv, (queries + keys_values, width)),
            "attention_out": (layer.out, (width, queries)),
            "cross_query": (layer.cross_q, (queries, width)),
            "cross_key_value": (layer.cross_kv, (keys_values, width)),
            "cross_out": (layer.cross_out, (width, queries)), "gate": (feed_forward.gate, (hidden, width)),
            "up": (feed_forward.up, (hidden, width)), "down": (feed_forward.down, (width, hidden)),
        }  # fmt: skip
        check_sizes([*linears.values(), *((part, (length,)) for part, length in norms.values())])
        copy: _native.TransformerLayer = native().TransformerLayer(
            **{name: self._norm(part) for name, (part, _) in norms.items()},
            **{name: self._linear(part) for name, (part, _) in linears.items()},
            activation=native().Activation[ACTIVATIONS[activation]],
        )
        return copy

    def _linear(self, projection: Projection | None) -> _native.Linear:
        """A projection [out, in] in panels [ceil(out / PANEL), in, PANEL], zero past ``out``."""
        linear: _native.Linear = native().Linear()
        if projection is not None:
            out_features, in_features = projection.weight.shape
            linear = native().Linear(
                in_features=in_features, out_features=out_features, panels=self._panels(projection.weight),
                bias=self._address(projection.bias),
            )  # fmt: skip
        return linear

    def _panels(self, weight: Tensor) -> int:
        """Copies a weight in panels to large pages; returns the address."""
        panel = native().PANEL
        out_features, in_features = weight.shape
        panels = F.pad(weight, (0, 0, 0, -out_features % panel)).view(-1, panel, in_features).transpose(1, 2)
        count = panels.numel()
        if count > self._free.numel():
            self._free = large_pages(max(count, WEIGHT_BLOCK))
            self._kept.append(self._free)
        copy, self._free = self._free[:count], self._free[count:]
        copy.view(panels.shape).copy_(panels)
        return copy.data_ptr()

    def _norm(self, norm: Norm | None) -> _native.Norm:
        copy: _native.Norm = native().Norm()
        if norm is not None:
            weight, bias = self._address(norm.weight), self._address(norm.bias)
            copy = native().Norm(weight=weight, bias=bias, eps=norm.eps)
        return copy

    def _address(self, tensor: Tensor | None) -> int:
        """The address of a float32 copy that lives as long as the plan; 0 for None."""
        if tensor is None:
            return 0
        self._kept.append(tensor.float().contiguous())
        return self._kept[-1].data_ptr()


class NativeState:
    """The decoder state of one batch; the KV cache is in C++.

    While named ranges are on, ``record_timings`` gets the profile events of each call.
    """

    def __init__(self, plan: NativePlan) -> None:
        self.plan = plan
        self.search = plan.take_search(torch.get_num_threads())
        self.batch = self.step_number = self.longest = 0  # until prefill
        self.search.set_profiling(ranges_enabled())

    def __del__(self) -> None:
        self.plan.keep_search(self.search)

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        tokens, mask = prompt_fields(input_ids, attention_mask)
        self.batch, length = input_ids.shape
        self.step_number = 0
        self.longest = int(mask.sum(1).max())
        source = self.plan.source
        prompt_positions = source.prompt_positions(length, self.longest)  # these keep the tables alive
        positions = source.step_positions(0, self.longest)
        logits, native_request = self._empty_logits((self.batch, 1), request)
        self.search.prefill(
            native().Prompts(tokens=tokens.data_ptr(), mask=mask.data_ptr(), batch=self.batch, length=length),
            addresses_of(prompt_positions), self.plan.start_token, addresses_of(positions), native_request,
        )  # fmt: skip
        self._add_profile()
        return logits

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        tokens, parents = tokens.contiguous(), parents.contiguous()
        active = None if request.rows is None else request.rows.contiguous()
        if tokens.dim() != 2 or len(tokens) != self.batch or not tokens.dtype == parents.dtype == torch.int64:
            raise ValueError(f"tokens and parents must be int64 [{self.batch}, W], got {tokens.dtype} "
                             f"{list(tokens.shape)} and {parents.dtype}")  # fmt: skip
        if parents.shape != tokens.shape or (active is not None and active.shape != tokens.shape):
            raise ValueError(
                f"tokens, parents and rows must have the same shape; tokens have {list(tokens.shape)}"
            )
        self.step_number += 1
        positions = self.plan.source.step_positions(self.step_number, self.longest)
        shape = tuple(tokens.shape) if active is None else (int(active.sum()),)
        logits, native_request = self._empty_logits(shape, request)
        beams = native().BeamInput(
            tokens=tokens.data_ptr(), parents=parents.data_ptr(),
            active=0 if active is None else active.data_ptr(), beams=tokens.shape[1],
        )  # fmt: skip
        self.search.decode_step(beams, addresses_of(positions), native_request)
        self._add_profile()
        return logits if active is None else logits.scatter(active)

    def reset_to_prefill(self) -> None:
        self.step_number = 0
        self.search.reset_to_prefill()

    def _add_profile(self) -> None:
        if ranges_enabled():
            add_native_events([(event.name, event.end) for event in self.search.profile_events])

    def _empty_logits(
        self, shape: tuple[int, ...], request: LogitsRequest
    ) -> tuple[Logits, _native.LogitsRequest]:
        """Uninitialized logits for rows of this shape, and the request that makes C++ write them."""
        columns = torch.empty(*shape, request.num_codes)
        logsumexp = torch.empty(shape) if request.logsumexp else None
        head, vocabulary = self.plan.head_linears(request)
        return Logits(columns, logsumexp), native().LogitsRequest(
            columns=head, vocabulary=vocabulary, logits=columns.data_ptr(),
            logsumexp=0 if logsumexp is None else logsumexp.data_ptr(),
        )  # fmt: skip
