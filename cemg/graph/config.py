"""Settings of the collaborative embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from cemg.errors import UserError


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """Collaborative embeddings of width ``dim``. The L2 penalty applies to the batch's rows of E^(0)."""

    dim: int = 64
    """Width of the collaborative embeddings."""
    layers: int = 3
    """Propagation layers over the user-item graph; 0 is matrix factorization."""
    epochs: int = 80
    """Passes over the training interactions."""
    batch_size: int = 4096
    """Interactions per step."""
    learning_rate: float = 3e-3
    """Learning rate of Adam."""
    l2: float = 1e-4
    """Weight of the L2 penalty on the embeddings of a batch."""
    seed: int = 0
    """Random seed; the run's seed replaces it."""

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"graph.{name} must be at least 1, got {getattr(self, name)}")
        if self.layers < 0:
            raise UserError(f"graph.layers must be at least 0, got {self.layers}")
        if not self.learning_rate > 0:
            raise UserError(f"graph.learning_rate must be above 0, got {self.learning_rate}")
        if not self.l2 >= 0:
            raise UserError(f"graph.l2 must not be negative, got {self.l2}")
