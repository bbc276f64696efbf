"""Chooses the backend of each operation from the device, from what is installed and from one switch.

The backends of an operation are some of these: ``reference`` (plain PyTorch, the definition), ``torch``
(tuned PyTorch), ``sparse`` (torch's CSR product, cuSPARSE on a GPU), ``triton`` and ``native`` (C++).
``CEMG_FAST_KERNELS=0`` in the environment, or ``use_fast_kernels(False)``, selects the reference of every
operation. Fast kernels are on by default.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .interface import check_interface
from .registry import OPERATIONS

_native: ModuleType | None
try:
    _native, NATIVE_ERROR = importlib.import_module("cemg_kernels._native"), ""
except ImportError as error:
    _native, NATIVE_ERROR = None, str(error)

if _native is not None:
    check_interface(_native)

ENVIRONMENT = "CEMG_FAST_KERNELS"
ON_REQUEST = {  # backends that run on a CPU only if the caller names them
    "triton": "interpreted on the CPU, so only on request",
    "sparse": "slower than torch's embedding_bag on the CPU, so only on request",
}
# the dtypes that the attention and logsumexp kernels read
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_environment = os.environ.get(ENVIRONMENT, "1")  # read once: a read takes 1 us, an operation a few
_override: bool | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that an operation runs on, and the reason in words."""

    backend: str
    why: str


def use_fast_kernels(enabled: bool | None) -> None:
    """Turns all backends except the references on or off for this process.

    Args:
        enabled: True or False override the environment variable ``CEMG_FAST_KERNELS``. None removes the
            override and reads the variable again.

    Raises:
        ValueError: ``enabled`` is anything else.

    Example:
        >>> use_fast_kernels(False)  # compare against the references
        >>> use_fast_kernels(None)
    """
    if not isinstance(enabled, bool | None):
        raise ValueError(
            f"enabled must be True, False or None (as {ENVIRONMENT} says), got {enabled!r}; pass one of these"
        )
    global _override, _environment
    _override, _environment = enabled, os.environ.get(ENVIRONMENT, "1")
    _choose.cache_clear()


def fast_kernels_enabled() -> bool:
    """Returns whether fast kernels are on.

    The last call of ``use_fast_kernels`` decides. Without one, the environment variable ``CEMG_FAST_KERNELS``
    (0 or 1, by default 1) decides.

    Raises:
        ValueError: The variable holds anything else.
    """
    if _override is not None:
        return _override
    if _environment not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {_environment!r}; unset it for the default, 1")
    return _environment == "1"


def native() -> ModuleType:
    """Returns the C++ module; raises RuntimeError with the reason if it is not built."""
    if _native is None:
        raise RuntimeError(f"the native module is not built ({NATIVE_ERROR}); run: pip install -e .")
    return _native


def native_available() -> bool:
    """Returns whether the C++ module is built."""
    return _native is not None


def choose(op: str, device: torch.device) -> Choice:
    """Returns the backend that ``op`` uses for tensors on ``device``, with the reason."""
    return _choose(op, device.type)


@cache
def _choose(op: str, device: str) -> Choice:
    if not fast_kernels_enabled():
        return Choice("reference", f"fast kernels are off ({ENVIRONMENT}=0 or --no-fast-kernels)")
    unavailable: list[str] = []
    for backend in OPERATIONS[op].backends:
        problem = _problem(op, backend, device)
        if not problem and device == "cpu":
            problem = ON_REQUEST.get(backend, "")
        if not problem:
            skipped = f"instead of {'; '.join(unavailable)}" if unavailable else ""
            return Choice(backend, skipped or f"the fastest available on {device}")
        unavailable.append(f"{backend}: {problem}")
    raise RuntimeError(f"{op} has no backend for {device}: {'; '.join(unavailable)}")


def pick(op: str, device: torch.device, backend: str | None = None) -> str:
    """Returns ``backend`` after a check, or the dispatcher's choice if it is None.

    Raises:
        ValueError: ``op`` does not have this backend, or the backend cannot run on ``device``.
    """
    if backend is None:
        return _choose(op, device.type).backend
    known = OPERATIONS[op].backends
    if backend not in known:
        raise ValueError(f"{op} has no backend {backend!r}; choose from {', '.join(known)}")
    problem = _problem(op, backend, device.type)
    if problem:
        raise ValueError(f"{op}: backend {backend!r} cannot run on {device}: {problem}")
    return backend


def backends(device: str | torch.device = "cpu") -> dict[str, Choice]:
    """Returns the backend of every operation on ``device``, with the reason.

    ``cemg-doctor`` and ``cemg-train`` print this table.

    Args:
        device: The device of the tensors, "cpu" or "cuda".

    Returns:
        A ``Choice`` per operation: its ``backend``, and ``why`` in words.

    Raises:
        ValueError: ``device`` is not the name of a device.

    Example:
        >>> backends("cpu")["trie"].backend
        'native'
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device; use cpu, or cuda") from error
    return {op: choose(op, parsed) for op in OPERATIONS}


def on_its_gpu(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: Triton launches go to the GPU of the first tensor argument, whichever GPU is current."""

    @wraps(function)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(next(one for one in arguments if isinstance(one, Tensor))):
            return function(*arguments, **options)

    return run


def _problem(op: str, backend: str, device: str) -> str:
    """Returns why ``backend`` of ``op`` cannot run on ``device``, or "" if it can."""
    if backend == "triton":
        return _triton_problem(device)
    if backend != "native":
        return ""
    cuda_problem = OPERATIONS[op].cuda_problem
    if cuda_problem is not None and device == "cuda":
        return cuda_problem()
    if device != "cpu":
        return f"the C++ of this operation is built for the CPU, not for {device}"
    return "" if _native is not None else f"not built ({NATIVE_ERROR})"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_problem(device: str) -> str:
    if not _has_triton():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device == "cuda":
        return ""
    return "" if interpreted else f"no kernels for {device} (TRITON_INTERPRET=1 interprets them)"
