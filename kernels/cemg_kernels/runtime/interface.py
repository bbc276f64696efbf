"""Detects a C++ module whose interface differs from the one that this Python code expects."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

STUB = Path(__file__).parents[1] / "_native.pyi"


def interface() -> str:
    """A hash of the stub file ``_native.pyi``, which describes the interface of the C++ module."""
    return hashlib.sha256("\n".join(STUB.read_text().splitlines()).encode()).hexdigest()[:16]


def check_interface(module: ModuleType) -> None:
    """Checks that the C++ module was built with this version of the stub file.

    Raises:
        ImportError: if it was not, for example after a ``git pull`` without a new build.
    """
    built = getattr(module, "INTERFACE", None)
    if STUB.exists() and built != interface():
        raise ImportError(
            f"the native module {module.__file__} was built for another version of cemg_kernels "
            f"(its interface is {built}, expected {interface()}); run pip install -e . again"
        )
