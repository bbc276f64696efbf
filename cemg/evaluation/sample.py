"""A seeded sample of test users, for models whose test of all users takes too long.

T users with targets.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cemg.errors import UserError

NAME = re.compile(r"(\d+) users, seed (\d+), sha256 [0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Sample:
    """``count`` different users, drawn by ``seed``. It depends on nothing else but T."""

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"a sample needs at least 1 user, got {self.count}")

    def rows(self, total: int) -> np.ndarray:
        """Return the positions of the sampled users among T = ``total``, ascending; all if T is smaller."""
        return np.sort(np.random.default_rng(self.seed).permutation(total)[: self.count])

    def name(self, total: int) -> str:
        """Return what identifies the sample in the fingerprint of a split; "" if it has all users."""
        if self.count >= total:
            return ""
        return f"{self.count} users, seed {self.seed}, sha256 {digest(self.rows(total))}"

    @classmethod
    def of(cls, split: Mapping[str, Any]) -> Sample | None:
        """Return the sample that a fingerprint names, None if it names none."""
        found = NAME.fullmatch(str(split.get("subset", "")))
        return None if found is None else cls(int(found[1]), int(found[2]))


def digest(rows: np.ndarray) -> str:
    """Return the first 16 digits of the sha256 of positions."""
    chosen = np.sort(np.asarray(rows, dtype="<i8"))
    return hashlib.sha256(chosen.tobytes()).hexdigest()[:16]
