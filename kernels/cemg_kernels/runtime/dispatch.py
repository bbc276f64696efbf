"""Which backend of an operation runs: by device, by what is built, by one switch.

An operation has up to five backends: ``reference`` (plain PyTorch, the definition), ``torch`` (tuned
PyTorch), ``sparse`` (its CSR product, cuSPARSE on a GPU), ``triton`` and ``native`` (C++).
``CEMG_FAST_KERNELS=0`` in the environment, or ``use_fast_kernels(False)``, puts every operation on its
reference; both are on by default.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_native: ModuleType | None
try:
    from .. import _native  # type: ignore[no-redef]

    NATIVE_ERROR = ""
except ImportError as error:
    _native = None
    NATIVE_ERROR = str(error)

ENVIRONMENT = "CEMG_FAST_KERNELS"
OPS: dict[str, tuple[str, ...]] = {  # the backends of each operation, the preferred first
    "residual_quantize": ("triton", "native", "torch", "reference"),
    "trie_softmax": ("triton", "native", "reference"),
    "trie_beam_step": ("triton", "native", "torch", "reference"),
    "trie_build": ("triton", "native", "reference"),
    "trie": ("native", "reference"),
    "lightgcn_propagate": ("triton", "native", "sparse", "torch", "reference"),
    "ancestor_attention": ("triton", "reference"),
    "prompt_attention": ("triton", "reference"),
    "row_logsumexp": ("triton", "reference"),
    "decoder": ("native", "torch", "reference"),
}
ON_REQUEST = {  # backends that run on a CPU, but not unless asked for
    "triton": "interpreted on the CPU, so only when asked for",
    "sparse": "slower than torch's embedding_bag on the CPU, so only when asked for",
}
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels of attention and sums read
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_environment = os.environ.get(ENVIRONMENT, "1")  # read once: a look costs a microsecond, an operation few
_override: bool | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend an operation gets, and why in words."""

    backend: str
    why: str


def use_fast_kernels(enabled: bool | None) -> None:
    """Turn every backend but the references on or off, for this process; outranks the environment.

    None gives the word back to the environment, which is read again.
    """
    if not isinstance(enabled, bool | None):
        raise ValueError(
            f"fast kernels are on (True), off (False) or as the environment says (None), got {enabled!r}"
        )
    global _override, _environment
    _override, _environment = enabled, os.environ.get(ENVIRONMENT, "1")
    _choose.cache_clear()


def fast_kernels_enabled() -> bool:
    """What ``use_fast_kernels`` said last, else what ``CEMG_FAST_KERNELS`` (0 or 1) was then, else True.

    Raises ValueError where the variable holds anything else.
    """
    if _override is not None:
        return _override
    if _environment not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {_environment!r}; unset it for the default, 1")
    return _environment == "1"


def native() -> ModuleType:
    """The C++ module; RuntimeError with the reason where it is not built."""
    if _native is None:
        raise RuntimeError(f"the native module is not built ({NATIVE_ERROR}); run: pip install -e .")
    return _native


def native_available() -> bool:
    return _native is not None


def choose(op: str, device: torch.device) -> Choice:
    """The backend that ``op`` runs on tensors of ``device``."""
    return _choose(op, device.type)


@cache
def _choose(op: str, device: str) -> Choice:
    if not fast_kernels_enabled():
        return Choice("reference", f"fast kernels are off ({ENVIRONMENT}=0 or --no-fast-kernels)")
    refused: list[str] = []
    for backend in OPS[op]:
        problem = _problem(op, backend, device)
        if not problem and device == "cpu":
            problem = ON_REQUEST.get(backend, "")
        if not problem:
            return Choice(backend, "; ".join(refused) or f"the fastest built for {device}")
        refused.append(f"{backend}: {problem}")
    raise RuntimeError(f"{op} has no backend for {device}: {'; '.join(refused)}")


def pick(op: str, device: torch.device, backend: str | None = None) -> str:
    """``backend`` checked, or the choice where it is None.

    Raises ValueError where ``op`` has no such backend, or where it cannot serve ``device``.
    """
    if backend is None:
        return _choose(op, device.type).backend
    if backend not in OPS[op]:
        raise ValueError(f"{op} has no backend {backend!r}; choose from {', '.join(OPS[op])}")
    problem = _problem(op, backend, device.type)
    if problem:
        raise ValueError(f"{op}: backend {backend!r} cannot run on {device}: {problem}")
    return backend


def backends(device: str | torch.device = "cpu") -> dict[str, Choice]:
    """Every operation's backend on ``device`` and why: what ``cemg-doctor`` and ``cemg-train`` print."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device; use cpu, or cuda") from error
    return {op: choose(op, found) for op in OPS}


def on_its_gpu(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, whose Triton launches go to the GPU of its first tensor, whatever GPU is current."""

    @wraps(function)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(next(one for one in arguments if isinstance(one, Tensor))):
            return function(*arguments, **options)

    return run


def _problem(op: str, backend: str, device: str) -> str:
    """Why ``backend`` of ``op`` cannot serve ``device``; empty where it can."""
    if backend == "triton":
        return _triton_problem(device)
    if backend != "native":
        return ""
    if op == "trie" and device == "cuda":
        from ..trie import cuda_launch as trie_cuda

        return trie_cuda.problem()
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
