"""Settings of the generator's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cemg.errors import UserError


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Optimisation of the generator.

    ``loss`` "valid" (paper equation 5 has "vocab") learns preferences among the codes that the trie admits,
    not also which codes go together. It requires ``decoding.normalize=valid``. An item at which ``crop``
    starts a history is not a target.
    """

    history_items: int = 20
    """Items of a history that the model sees; older ones are cut."""
    epochs: int = 40
    """Passes over the training sequences."""
    batch_size: int = 128
    """Sequences per step."""
    learning_rate: float = 1e-3
    """Peak of the schedule; AdamW."""
    weight_decay: float = 0.05
    """Of AdamW."""
    warmup_share: float = 0.03
    """Share of the steps until the peak is reached."""
    schedule: Literal["cosine", "inverse-sqrt"] = "cosine"
    """cosine or inverse-sqrt."""
    label_smoothing: float = 0.0
    """Probability mass spread over the other tokens; with loss=vocab."""
    loss: Literal["vocab", "valid"] = "vocab"
    """Tokens in a code's softmax: vocab, all (the paper), or valid, those that continue a real item."""
    crop: float = 0.0
    """Share of samples that start at a random later item of their history, drawn anew each epoch."""
    first_item: bool = True
    """Whether a user's first item, with no history before it, is a target."""
    clip: float = 1.0
    """Gradients are clipped to this norm."""
    validate_every: int = 2
    """Epochs between two validations."""
    patience: int = 6
    """Validations without a better NDCG@10 until training stops; 0 never stops early."""
    checkpoint_seconds: int = 60
    """At most this much training is lost when it is interrupted."""
    seed: int = 0
    """Set by the run's seed."""

    def __post_init__(self) -> None:
        for name in ("history_items", "epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise UserError(f"generator.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"generator.{name} must be above 0, got {getattr(self, name)}")
        if self.loss == "valid" and self.label_smoothing:
            raise UserError(
                "generator.label_smoothing does not go with generator.loss=valid", fix="leave one of them out"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"generator.label_smoothing must be within 0 … 1, got {self.label_smoothing}")
        if not 0 <= self.crop <= 1:
            raise UserError(f"generator.crop must be within 0 … 1, got {self.crop}")
