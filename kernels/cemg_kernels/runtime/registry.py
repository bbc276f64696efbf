"""The table of operations. Each operation's module adds its entry when it is imported.

``dispatch`` reads the table to choose a backend, and ``aot`` reads it to compile every kernel. So neither
imports an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .aot_case import AotCase


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation and its backends.

    Args:
        name: The name that ``cemg_kernels.backends`` reports.
        backends: The names of the backends, the preferred first.
        cuda_problem: Returns why the native backend cannot run on a GPU, or "" where it can. None where the
            native backend is CPU only.
        aot_cases: Returns the configurations of the operation's Triton kernels: all of them for True,
            otherwise those that use the most registers and shared memory.
    """

    name: str
    backends: tuple[str, ...]
    cuda_problem: Callable[[], str] | None = None
    aot_cases: Callable[[bool], Sequence[AotCase]] | None = None


OPERATIONS: dict[str, Operation] = {}


def register(
    name: str,
    backends: tuple[str, ...],
    *,
    cuda_problem: Callable[[], str] | None = None,
    aot_cases: Callable[[bool], Sequence[AotCase]] | None = None,
) -> None:
    """Adds an operation to the table; the arguments are those of ``Operation``."""
    OPERATIONS[name] = Operation(name, backends, cuda_problem, aot_cases)
