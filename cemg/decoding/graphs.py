"""CUDA graphs: one launch per search.

One graph is recorded per bucket of prompts, and per number of tokens and beams, kind of filter and size of
prior.

B users, S prompt tokens, Z items of a prior. A bucket holds prompts of at most its own B, S and Z.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cemg.decoding.beams import Filter, token_count
from cemg_kernels import RequestFilter
from cemg_kernels.constrained.prior import PriorTensors
from cemg_kernels.trie.filter_tensors import NO_NODE, FilterTensors

Outputs = tuple[Tensor, ...]  # each [B, ...], on the device
# Of prompts, mask, filter, prior, and an upper bound on the number of tokens; never synchronizes.
Search = Callable[[Tensor, Tensor, Filter | None, PriorTensors | None, int | None], Outputs]
Replay = Callable[[], Outputs]
Capture = Callable[[Callable[[], Outputs], torch.device], Replay]
LENGTH_STEP = 16  # prompts are padded to the next multiple
TOKEN_STEPS = 4  # the token count of a bucket is rounded up to a multiple of a quarter of its size
MIN_CLOSED_NODES = 32  # entries for closed nodes, if a filter has any
MIN_PRIOR_ITEMS = 256
MAX_GRAPHS = 32  # the least recently used graph is dropped beyond this
UNUSED = (0, -1, NO_NODE)  # the value of unused entries in each of a filter's tensors
UNUSED_PRIOR = (NO_NODE, 0.0, 0.0)  # and of a prior's: above every rank, no mass, no weight


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def bucket_of(batch: int, length: int) -> tuple[int, int]:
    """The bucket of prompts [batch, length]: a power of two, and a multiple of LENGTH_STEP."""
    return power_of_two(batch), -(-length // LENGTH_STEP) * LENGTH_STEP


def rounded_tokens(mask: Tensor) -> int | None:
    """The number of tokens in a bucket's mask [B, S], rounded up.

    None if it is not known, or if it is rounded up to the size of the mask.
    """
    tokens, step = token_count(mask), -(-mask.numel() // TOKEN_STEPS)
    rounded = mask.numel() if tokens is None else -(-tokens // step) * step
    return rounded if rounded < mask.numel() else None


def filter_shapes(filter: Filter | None, users: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a filter's tensors in a bucket of ``users``: its kind. () without a filter."""
    if filter is None:
        return ()
    open_, filter_of, closed = filter.tensors
    most = power_of_two(closed.shape[1])
    closed_shape = (users if len(closed) else 0, max(most, MIN_CLOSED_NODES) if most else 0)
    return (power_of_two(len(open_)), open_.shape[1]), (users if len(filter_of) else 0,), closed_shape


def prior_items(prior: PriorTensors | None) -> int | None:
    """The number of items per request in the bucket of a prior; None without a prior."""
    return None if prior is None else max(MIN_PRIOR_ITEMS, power_of_two(prior.ranks.shape[1]))


class CudaCapture:
    """Records searches into CUDA graphs that share one memory pool.

    The results of a search must be copied before the next one runs.
    """

    def __init__(self) -> None:
        self.pool: Any = None  # a handle of torch's
        self.stream: Any = None  # the same for all recordings, since freed memory is reused per stream

    def __call__(self, search: Callable[[], Outputs], device: torch.device) -> Replay:
        """Record a search over static tensors; the result replays it and returns its outputs.

        The search runs twice before it is recorded, so that kernels are compiled and tables are built.
        """
        side = self.stream = self.stream or torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                search()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # thread_local: other threads may allocate meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            outputs = search()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


@dataclass(slots=True)
class StaticInputs:
    """The tensors that a recording reads: prompts and mask [B, S], and perhaps a filter and a prior.

    ``written_filter`` was written last. Filters never change, so the same one is not written again.
    """

    input_ids: Tensor
    attention_mask: Tensor
    filter: RequestFilter | None
    prior: PriorTensors | None
    written_filter: Filter | None = None

    @classmethod
    def like(
        cls,
        ids: Tensor,
        mask: Tensor,
        filter: Filter | None,
        prior: PriorTensors | None,
        device: torch.device,
    ) -> StaticInputs:
        """Uninitialized inputs on ``device``, with the shapes of these and of their buckets."""
        static_filter = None
        if filter is not None:
            pairs = zip(filter.tensors, filter_shapes(filter, len(ids)), strict=True)
            tensors = FilterTensors(*(tensor.new_empty(shape) for tensor, shape in pairs))
            requests = max(1, tensors.num_requests)
            none = tensors.closed.new_empty(requests, 0)
            static_filter = RequestFilter(filter.trie, filter.fingerprint, [None] * requests, none, tensors)
        static_prior = None
        items = prior_items(prior)
        if prior is not None and items is not None:
            users = len(ids)
            shapes = ((users, items), (users, items + 1), (users,))
            static_prior = PriorTensors(
                *(tensor.new_empty(shape) for tensor, shape in zip(prior, shapes, strict=True))
            )
        prompts = torch.empty_like(ids, device=device), torch.empty_like(mask, device=device)
        return cls(*prompts, static_filter, static_prior)

    def write(self, ids: Tensor, mask: Tensor, filter: Filter | None, prior: PriorTensors | None) -> None:
        """Copy prompts of the same shape, a filter and a prior of the same kind into the static tensors."""
        self.input_ids.copy_(ids, non_blocking=True)
        self.attention_mask.copy_(mask, non_blocking=True)
        if prior is not None and self.prior is not None:
            for static, tensor, unused in zip(self.prior, prior, UNUSED_PRIOR, strict=True):
                static.fill_(unused)
                static[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
        if filter is None or self.filter is None or filter is self.written_filter:
            return
        for static, tensor, unused in zip(self.filter.tensors, filter.tensors, UNUSED, strict=True):
            static.fill_(unused)
            static[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
        self.written_filter = filter


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded search and what it reads: its inputs and, held by ``search``, the trie and the weights."""

    search: Search
    inputs: StaticInputs
    replay: Replay


class GraphCache:
    """Recorded searches by bucket; each has static inputs and one graph for the prefill and all steps.

    Not thread-safe: a caller holds ``lock`` until it has copied the results.
    """

    def __init__(self, *, pad_left: bool, device: torch.device, capture: Capture | None = None) -> None:
        self.pad_left, self.device, self.capture = pad_left, device, capture or CudaCapture()
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self.lock = Lock()

    def run(
        self, search: Search, key: Hashable, input_ids: Tensor, attention_mask: Tensor,
        filter: Filter | None = None, prior: PriorTensors | None = None,
    ) -> Outputs:  # fmt: skip
        """``search`` over prompts [B, S]: the first B rows of its outputs, which the next call overwrites.

        ``key`` is what the recording depends on besides its inputs: the number of beams. ``filter`` is on the
        device and belongs to the trie of ``search``; one recording serves all filters of a kind. ``prior`` is
        on the device; one recording serves all priors of up to a power of two of items per request.
        """
        batch, length = input_ids.shape
        bucket = bucket_of(batch, length)
        ids, mask = self._padded(input_ids, attention_mask, bucket)
        tokens = rounded_tokens(mask)
        full_key = key, bucket, tokens, filter_shapes(filter, len(ids)), prior_items(prior)
        recording = self.recordings.pop(full_key, None)
        if recording is None:
            recording = self._record(search, ids, mask, filter, prior, tokens)
        else:
            recording.inputs.write(ids, mask, filter, prior)
        self.recordings[full_key] = recording  # now the most recently used
        return tuple(out[:batch] for out in recording.replay())

    def _record(
        self, search: Search, ids: Tensor, mask: Tensor, filter: Filter | None, prior: PriorTensors | None,
        tokens: int | None,
    ) -> Recording:  # fmt: skip
        inputs = StaticInputs.like(ids, mask, filter, prior, self.device)
        inputs.write(ids, mask, filter, prior)

        def search_inputs() -> Outputs:
            return search(inputs.input_ids, inputs.attention_mask, inputs.filter, inputs.prior, tokens)

        recording = Recording(search, inputs, self.capture(search_inputs, self.device))
        while len(self.recordings) >= MAX_GRAPHS:
            self.recordings.popitem(last=False)
        return recording

    def _padded(self, input_ids: Tensor, mask: Tensor, bucket: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prompts and mask of the bucket's shape. Added users have one token."""
        users, length = bucket
        if input_ids.shape == bucket:
            return input_ids, mask
        missing = length - input_ids.shape[1]
        sides = (missing, 0) if self.pad_left else (0, missing)
        rows = torch.arange(users, device=input_ids.device).clamp_max(len(input_ids) - 1)
        ids, padded_mask = F.pad(input_ids[rows], sides), F.pad(mask[rows], sides)
        padded_mask[len(input_ids) :] = 0
        padded_mask[len(input_ids) :, -1 if self.pad_left else 0] = 1
        return ids, padded_mask
