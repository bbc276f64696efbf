"""The configurations in which a Triton kernel is compiled ahead of time, and helpers that enumerate them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

ARCHITECTURES = (80, 90)
MAX_REGISTERS = 255  # per thread; without this limit, ptxas chooses a lower one and spills some registers


@dataclass(frozen=True, slots=True)
class AotCase:
    """One configuration of a Triton kernel.

    Args:
        name: The operation's name, then the configuration in words.
        kernel: The function decorated with ``triton.jit``.
        signature: The type of every argument in order: "*fp32", "i32", "constexpr".
        constants: The values of the constexprs.
        options: The launch options: num_warps, num_stages, maxnreg.
        aligned: Arguments that are multiples of 16, as torch's pointers are. Other sizes compile for any
            number. Triton also makes variants for 1 and for multiples of 16, which need no more registers.
        architectures: The architectures that launch this configuration.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int | None] = field(default_factory=dict)
    aligned: Sequence[str] = ()
    architectures: tuple[int, ...] = ARCHITECTURES


def powers_of_two(largest: int) -> list[int]:
    """Returns 1, 2, 4, ... up to ``largest``: the size classes that a kernel distinguishes."""
    return [1 << power for power in range(largest.bit_length())]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns rows with one value per axis, so that any two values of two axes occur together in some row."""
    open_pairs = {
        (i, a, j, b) for i, j in combinations(range(len(axes)), 2) for a, b in product(axes[i], axes[j])
    }
    rows = []
    for i, a, j, b in sorted(open_pairs, key=repr):
        if (i, a, j, b) not in open_pairs:
            continue
        row = {i: a, j: b}
        for k in set(range(len(axes))) - {i, j}:  # the value that covers the most open pairs
            row[k] = max(axes[k], key=lambda value: len(_pairs(row | {k: value}) & open_pairs))
        open_pairs -= _pairs(row)
        rows.append(tuple(row[k] for k in range(len(axes))))
    return rows


def _pairs(row: dict[int, Any]) -> set[tuple[int, Any, int, Any]]:
    return {(i, row[i], j, row[j]) for i, j in combinations(sorted(row), 2)}
