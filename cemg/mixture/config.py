"""Settings of the gate."""

from __future__ import annotations

from dataclasses import dataclass

from cemg.errors import UserError


@dataclass(frozen=True, slots=True)
class GateConfig:
    """The gate: how much the item memory and other experts weigh in the search, per history."""

    users: int = 6000
    """Number of validation users that fit the gate; none of them selects the checkpoint."""
    beams: int = 100
    """Number of beams in the searches that the gate is fitted on."""
    memory: bool = True
    """Whether the item memory is mixed in; without it and other experts, the generator recommends alone."""
    dense: str = ""
    """Folder of a SASRec or BSARec, trained by python -m cemg.baselines, that is mixed in; empty: none."""

    def __post_init__(self) -> None:
        for name in ("users", "beams"):
            if getattr(self, name) < 1:
                raise UserError(f"gate.{name} must be at least 1, got {getattr(self, name)}")
