"""Deprecated alias of ``cemg_kernels.runtime.aot``; the next release removes it."""

from __future__ import annotations

import warnings

from .runtime.aot import main

warnings.warn(
    "cemg_kernels.aot is deprecated; use cemg_kernels.runtime.aot", DeprecationWarning, stacklevel=2
)

if __name__ == "__main__":
    main()
