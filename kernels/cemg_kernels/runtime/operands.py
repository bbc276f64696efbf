"""What callers pass where a tensor is wanted: tensors, numpy arrays and lists; ValueError for anything else.

The C++ reads addresses, so nothing may reach it that is not a dense tensor in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    Numbers: TypeAlias = Tensor | ArrayLike  # a tensor, a numpy array, or nested lists

INTEGERS = frozenset({
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
})  # fmt: skip


def tensor_of(name: str, value: Any) -> Tensor:
    """``value`` itself where it is a dense tensor; made of a numpy array or of nested lists of numbers.

    Raises ValueError, naming ``name``, for anything else, and for tensors that are sparse, quantized or on
    the device "meta".
    """
    tensor = value if isinstance(value, Tensor) else _made(name, value)
    if torch.compiler.is_compiling():
        return tensor  # whose kinds Dynamo does not trace
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one; convert it with .to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the device meta, where tensors have no values; make it on the CPU")
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def integers_of(name: str, value: Any) -> Tensor:
    """The same of integers of any width, unsigned ones as int64; what is empty counts as integers.

    Raises ValueError for numbers of another kind, which are never rounded.
    """
    tensor = tensor_of(name, value)
    if tensor.dtype not in INTEGERS:
        if tensor.numel():
            raise ValueError(f"{name} must be integers, got {tensor.dtype}; convert them with .long()")
        return tensor.to(torch.int64)
    wide = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)  # torch compares few of these
    return tensor.to(torch.int64) if wide else tensor


def integers_on(name: str, value: Any, device: torch.device) -> Tensor:
    """The same as int64 on ``device``."""
    return integers_of(name, value).to(device, torch.int64)


def device_of(device: str | torch.device) -> torch.device:
    """The device, with its index; ValueError where this machine or this torch does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device of this machine: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without torch's explanations below."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _made(name: str, value: Any) -> Tensor:
    try:
        if hasattr(value, "__array_interface__"):  # numpy's may be read-only, or run backwards
            import numpy as np

            return torch.from_numpy(np.array(value, order="C"))
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{name} must be a tensor, a numpy array or lists of numbers, got {type(value).__name__}: "
            f"{first_line(error)}"
        ) from error
