"""One CUDA graph per (batch, length, beams) bucket: a whole search replayed without a launch from Python.

B users, S prompt tokens; a bucket holds prompts of at most its own B and S.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]  # each [B, ...], on the device
Search = Callable[[Tensor, Tensor], Outputs]  # prompts and mask [B, S]; neither waits for the device
Capture = Callable[[Search, Tensor, Tensor], Callable[[], Outputs]]
LENGTH_STEP = 16  # prompts are padded to the next multiple
MOST_GRAPHS = 16  # the least recently used goes when there are more


def bucket_of(batch: int, length: int) -> tuple[int, int]:
    """The bucket of prompts [batch, length]: a power of two, and the next multiple of LENGTH_STEP."""
    return 1 << max(batch - 1, 0).bit_length(), -(-length // LENGTH_STEP) * LENGTH_STEP


def capture_cuda(search: Search, input_ids: Tensor, attention_mask: Tensor) -> Callable[[], Outputs]:
    """Record ``search`` over these two static tensors; what comes back replays it and gives its outputs.

    It runs twice before, so that kernels are compiled and tables are made outside the recording.
    """
    device = input_ids.device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            search(input_ids, attention_mask)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = search(input_ids, attention_mask)

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


@dataclass(frozen=True, slots=True)
class Recorded:
    """A bucket's static input tensors, and what replays the search over them.

    ``search`` is kept because the recording reads its tensors where they were: a filter's, say.
    """

    search: Search
    input_ids: Tensor
    attention_mask: Tensor
    replay: Callable[[], Outputs]


class Graphs:
    """Recorded searches by bucket: static buffers, one graph for the prompt and all steps."""

    def __init__(self, *, pad_left: bool, device: torch.device, capture: Capture = capture_cuda) -> None:
        self.pad_left, self.device, self.capture = pad_left, device, capture
        self.recorded: OrderedDict[tuple[object, ...], Recorded] = OrderedDict()

    def run(
        self, search: Search, key: tuple[object, ...], input_ids: Tensor, attention_mask: Tensor
    ) -> Outputs:
        """``search`` over prompts [B, S]: its outputs' first B rows, overwritten by the next call.

        ``key`` is what else the recording depends on: beams, filter.
        """
        batch, length = input_ids.shape
        bucket = bucket_of(batch, length)
        recorded = self.recorded.pop((*bucket, *key), None)
        ids, mask = self._padded(input_ids, attention_mask, bucket)
        if recorded is None:
            ids, mask = ids.to(self.device, copy=True), mask.to(self.device, copy=True)
            recorded = Recorded(search, ids, mask, self.capture(search, ids, mask))
            while len(self.recorded) >= MOST_GRAPHS:
                self.recorded.popitem(last=False)
        else:
            recorded.input_ids.copy_(ids, non_blocking=True)
            recorded.attention_mask.copy_(mask, non_blocking=True)
        self.recorded[(*bucket, *key)] = recorded  # now the most recently used
        return tuple(out[:batch] for out in recorded.replay())

    def _padded(self, input_ids: Tensor, mask: Tensor, bucket: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prompts and mask of the bucket's shape; the users added are copies of the last."""
        users, length = bucket
        more = length - input_ids.shape[1]
        sides = (more, 0) if self.pad_left else (0, more)
        rows = torch.arange(users, device=input_ids.device).clamp_max(len(input_ids) - 1)
        return F.pad(input_ids[rows], sides), F.pad(mask[rows], sides)
