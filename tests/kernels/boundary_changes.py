"""Wrong arguments in place of right ones: other shapes, strides, values, dtypes, devices and kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
            torch.uint64)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.bool, torch.complex64)
EDGES = (-(2**63), -(2**31) - 1, -(2**31), -2, -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1)
JUNK: tuple[Any, ...] = (None, "text", 3, 1.5, object(), {}, [[1], [1, 2]], ["1"], b"12", [None])
LIMITS = (40, 6, 57, 58)  # items and codes of the tries that the draws use, and numbers around their nodes


def shapes(t: Tensor, rng: random.Random) -> Iterator[Callable[[], Tensor]]:
    """Other shapes with the same dtype."""
    yield lambda: t[None]
    yield lambda: t[..., None]
    yield lambda: t.flatten()
    yield lambda: t[:0]
    yield lambda: t[..., :0]
    if t.dim():
        yield lambda: t[0]
        yield lambda: t[:-1]
        yield lambda: t[..., :-1]
        yield lambda: torch.cat((t, t[:1]))
        yield lambda: torch.cat((t, t[..., :1]), -1)


def strides(t: Tensor, rng: random.Random) -> Iterator[Callable[[], Tensor]]:
    """The same values in another memory layout; the last but one repeats the first row."""
    yield lambda: t.repeat_interleave(2, -1)[..., ::2]
    yield lambda: torch.cat((t, t))[len(t) :]
    yield lambda: t.movedim(0, -1).contiguous().movedim(-1, 0)
    yield lambda: t[:1].expand_as(t)
    yield lambda: torch._neg_view(t) if t.dtype in (torch.float32, torch.int32, torch.int64) else t


def values(t: Tensor, rng: random.Random) -> Iterator[Callable[[], Tensor]]:
    """One value at an edge of the dtype's range, or outside the range of the call."""

    def put(value: float) -> Tensor:
        changed = t.clone()
        if changed.numel():
            changed.view(-1)[rng.randrange(changed.numel())] = value
        return changed

    if t.is_floating_point():
        edges: tuple[float, ...] = (float("nan"), float("inf"), float("-inf"), 1e38, -1e38, 0.0)
        yield from (lambda value=value: put(value) for value in edges)
    elif t.dtype != torch.bool and not t.is_complex():
        info = torch.iinfo(t.dtype)
        in_range = [edge for edge in (*EDGES, *LIMITS, 100) if info.min <= edge <= info.max]
        yield from (lambda value=value: put(value) for value in in_range)


def kinds(t: Tensor, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Tensors of other devices, layouts and dtypes, numpy arrays, lists, and objects of other types."""
    yield from (lambda dtype=dtype: t.to(dtype) for dtype in (*INTEGERS, *FLOATS, *OTHERS))
    yield lambda: t.to("meta")
    yield lambda: t.to_sparse()
    yield lambda: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.quint8)
    yield lambda: t.clone().requires_grad_() if t.is_floating_point() else t
    yield lambda: t.numpy()
    yield lambda: t.numpy()[::-1]
    yield lambda: t.numpy().astype(">i8")
    yield lambda: t.tolist()
    yield lambda: _frozen(t.numpy().copy())
    yield from (lambda junk=junk: junk for junk in JUNK)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def changed(value: Any, rng: random.Random) -> Any:
    """A changed argument in place of a valid one; itself if torch cannot make the change."""
    if isinstance(value, Tensor):
        family = rng.choice((shapes, strides, values, values, kinds))
        options = list(family(value, rng))
        try:
            return rng.choice(options)() if options else value
        except (RuntimeError, TypeError, ValueError, IndexError):
            return value
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return rng.choice(JUNK)
    if isinstance(value, int):
        return rng.choice((*EDGES, value + 1, value - 1, 2**40, 10**12, 1.5, "3", None, np.int64(value)))
    return value
