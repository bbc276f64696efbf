"""Converts arguments (tensors, numpy arrays, lists) to dense tensors and rejects everything else.

The C++ code reads raw addresses, so it may only receive dense tensors in memory.
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
    """Returns a dense tensor: ``value`` itself, or a copy of a numpy array or of nested lists.

    Args:
        name: The name of the argument, for error messages.
        value: A tensor, a numpy array or nested lists of numbers.

    Raises:
        ValueError: ``value`` is anything else, or a tensor that is sparse, quantized or on the device "meta".
    """
    tensor = value if isinstance(value, Tensor) else _converted(name, value)
    if torch.compiler.is_compiling():
        return tensor  # Dynamo cannot trace the checks below
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one; convert it with .to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the device meta, where tensors have no values; make it on the CPU")
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def integers_of(name: str, value: Any) -> Tensor:
    """Returns a dense tensor of integers; uint16, uint32 and uint64 become int64.

    Raises:
        ValueError: The values are not integers; they are never rounded. An empty tensor may have any dtype.
    """
    tensor = tensor_of(name, value)
    if tensor.dtype not in INTEGERS:
        if tensor.numel():
            raise ValueError(f"{name} must be integers, got {tensor.dtype}; convert them with .long()")
        return tensor.to(torch.int64)
    # torch lacks many operations on these
    unsigned = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return tensor.to(torch.int64) if unsigned else tensor


def integers_on(name: str, value: Any, device: torch.device) -> Tensor:
    """Returns a dense int64 tensor on ``device``; raises as ``integers_of`` does."""
    return integers_of(name, value).to(device, torch.int64)


def device_of(device: str | torch.device) -> torch.device:
    """Returns the device with its index; raises ValueError if this machine or this torch does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"{device!r} is not available on this machine: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without torch's explanations below it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _converted(name: str, value: Any) -> Tensor:
    try:
        if hasattr(value, "__array_interface__"):  # numpy arrays may be read-only or have negative strides
            import numpy as np

            return torch.from_numpy(np.array(value, order="C"))
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{name} must be a tensor, a numpy array or lists of numbers, got {type(value).__name__}: "
            f"{first_line(error)}"
        ) from error
