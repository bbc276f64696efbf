"""One CUDA graph per bucket of prompts, their tokens, beams and kind of filter: a search in one launch.

B users, S prompt tokens; a bucket holds prompts of at most its own B and S.
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
from cemg_kernels.trie.filter_tensors import NO_NODE, FilterTensors

Outputs = tuple[Tensor, ...]  # each [B, ...], on the device
# Of Inputs, and of how many tokens they have at most; never waits for the device.
Search = Callable[[Tensor, Tensor, Filter | None, int | None], Outputs]
Capture = Callable[[Callable[[], Outputs], torch.device], Callable[[], Outputs]]
LENGTH_STEP = 16  # prompts are padded to the next multiple
TOKEN_STEPS = 4  # the tokens of a bucket are rounded up to a quarter of its cells
FEWEST_CLOSED = 32  # places for closed nodes, where there are any
MOST_GRAPHS = 32  # the least recently used goes when there are more
BLANK = (0, -1, NO_NODE)  # what a filter's tensors hold where it has nothing to say


def power_of_two(count: int) -> int:
    """The least power of two that is no less than ``count``; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def bucket_of(batch: int, length: int) -> tuple[int, int]:
    """The bucket of prompts [batch, length]: a power of two, and the next multiple of LENGTH_STEP."""
    return power_of_two(batch), -(-length // LENGTH_STEP) * LENGTH_STEP


def rounded_tokens(mask: Tensor) -> int | None:
    """The tokens of a bucket's mask [B, S], rounded up; None: unknown, or no fewer than there are cells."""
    tokens, step = token_count(mask), -(-mask.numel() // TOKEN_STEPS)
    rounded = mask.numel() if tokens is None else -(-tokens // step) * step
    return rounded if rounded < mask.numel() else None


def filter_shapes(filter: Filter | None, users: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a filter's tensors in a bucket of ``users``: its kind. () for none."""
    if filter is None:
        return ()
    open_, filter_of, closed = filter.tensors
    most = power_of_two(closed.shape[1])
    lists = (users if len(closed) else 0, max(most, FEWEST_CLOSED) if most else 0)
    return (power_of_two(len(open_)), open_.shape[1]), (users if len(filter_of) else 0,), lists


class CudaCapture:
    """Records searches that share one pool of memory: each one's results are copied before the next runs."""

    def __init__(self) -> None:
        self.pool: Any = None  # a handle of torch's
        self.stream: Any = None  # one for all recordings: what is freed in the pool serves its stream alone

    def __call__(self, search: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
        """Record a search of static tensors; what comes back replays it and gives its outputs.

        It runs twice before, so that kernels are compiled and tables are made outside the recording.
        """
        side = self.stream = self.stream or torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                search()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # other threads may go on allocating
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            outputs = search()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


@dataclass(slots=True)
class Inputs:
    """What a recording reads, always in the same place: prompts and mask [B, S], a filter or none.

    ``taken``: the filter that was written there last. Filters never change, so it need not be again.
    """

    input_ids: Tensor
    attention_mask: Tensor
    filter: RequestFilter | None
    taken: Filter | None = None

    @classmethod
    def room_for(cls, ids: Tensor, mask: Tensor, filter: Filter | None, device: torch.device) -> Inputs:
        """Of these shapes on ``device``, not yet written; a filter's by ``filter_shapes``."""
        room = None
        if filter is not None:
            pairs = zip(filter.tensors, filter_shapes(filter, len(ids)), strict=True)
            tensors = FilterTensors(*(tensor.new_empty(shape) for tensor, shape in pairs))
            requests = max(1, tensors.num_requests)
            none = tensors.closed.new_empty(requests, 0)
            room = RequestFilter(filter.trie, filter.fingerprint, [None] * requests, none, tensors)
        return cls(torch.empty_like(ids, device=device), torch.empty_like(mask, device=device), room)

    def take(self, ids: Tensor, mask: Tensor, filter: Filter | None) -> None:
        """Write them there: prompts of the very shape, a filter of the same kind."""
        self.input_ids.copy_(ids, non_blocking=True)
        self.attention_mask.copy_(mask, non_blocking=True)
        if filter is None or self.filter is None or filter is self.taken:
            return
        for place, own, blank in zip(self.filter.tensors, filter.tensors, BLANK, strict=True):
            place.fill_(blank)
            place[tuple(slice(size) for size in own.shape)].copy_(own)
        self.taken = filter


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recording and all it reads: its inputs, and by ``search`` the trie and the weights."""

    search: Search
    inputs: Inputs
    replay: Callable[[], Outputs]


class Graphs:
    """Recorded searches by bucket: static buffers, one graph for the prompt and all steps.

    One thread at a time: whoever holds ``lock`` runs a search and reads its results.
    """

    def __init__(self, *, pad_left: bool, device: torch.device, capture: Capture | None = None) -> None:
        self.pad_left, self.device, self.capture = pad_left, device, capture or CudaCapture()
        self.recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self.lock = Lock()

    def run(
        self, search: Search, key: Hashable, input_ids: Tensor, attention_mask: Tensor,
        filter: Filter | None = None,
    ) -> Outputs:  # fmt: skip
        """``search`` over prompts [B, S]: its outputs' first B rows, overwritten by the next call.

        ``key`` is what else the recording depends on: beams. ``filter`` lies on the device and belongs to the
        trie that ``search`` walks: one recording serves all of a kind, whatever they allow.
        """
        batch, length = input_ids.shape
        bucket = bucket_of(batch, length)
        ids, mask = self._padded(input_ids, attention_mask, bucket)
        tokens = rounded_tokens(mask)
        whole = key, bucket, tokens, filter_shapes(filter, len(ids))
        recorded = self.recorded.pop(whole, None)
        if recorded is None:
            recorded = self._record(search, ids, mask, filter, tokens)
        else:
            recorded.inputs.take(ids, mask, filter)
        self.recorded[whole] = recorded  # now the most recently used
        return tuple(out[:batch] for out in recorded.replay())

    def _record(
        self, search: Search, ids: Tensor, mask: Tensor, filter: Filter | None, tokens: int | None
    ) -> Recorded:
        inputs = Inputs.room_for(ids, mask, filter, self.device)
        inputs.take(ids, mask, filter)

        def search_inputs() -> Outputs:
            return search(inputs.input_ids, inputs.attention_mask, inputs.filter, tokens)

        recorded = Recorded(search, inputs, self.capture(search_inputs, self.device))
        while len(self.recorded) >= MOST_GRAPHS:
            self.recorded.popitem(last=False)
        return recorded

    def _padded(self, input_ids: Tensor, mask: Tensor, bucket: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prompts and mask of the bucket's shape; the users added have one token of the last one's."""
        users, length = bucket
        if input_ids.shape == bucket:
            return input_ids, mask
        more = length - input_ids.shape[1]
        sides = (more, 0) if self.pad_left else (0, more)
        rows = torch.arange(users, device=input_ids.device).clamp_max(len(input_ids) - 1)
        ids, there = F.pad(input_ids[rows], sides), F.pad(mask[rows], sides)
        there[len(input_ids) :] = 0
        there[len(input_ids) :, -1 if self.pad_left else 0] = 1
        return ids, there
