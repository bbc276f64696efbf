"""Settings of the generator's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cemg.errors import UserError


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Training of the generator.

    The loss of the paper (equation 5) is "vocab". "valid", which the presets use and the paper does not,
    normalizes only over the codes that the trie admits; it requires ``decoding.normalize=valid``. The first
    item of a cropped history is not a target.
    """

    history_items: int = 20
    """Newest items of a history that the prompt contains."""
    epochs: int = 40
    """Passes over the training sequences."""
    batch_size: int = 128
    """Sequences per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    warmup_share: float = 0.03
    """Share of all steps used for warm-up."""
    schedule: Literal["cosine", "inverse-sqrt"] = "cosine"
    """Learning-rate schedule after warm-up: cosine or inverse-sqrt."""
    label_smoothing: float = 0.0
    """Label smoothing, over the tokens in the softmax."""
    item_tokens: bool = False
    """Whether an item in the history is one token, its codes and an embedding of its own; else its codes."""
    item_loss: float = 0.0
    """Weight of a second loss, the softmax over items from the states that predict the first code."""
    loss: Literal["vocab", "valid"] = "vocab"
    """Tokens in the softmax: vocab (all; equation 5 of the paper) or valid (those of real items; ours)."""
    temperature: float = 1.0
    """Temperature of that softmax, in training alone; below 1 it penalizes likely wrong codes more."""
    crop: float = 0.0
    """Share of samples whose history starts at a random later item, drawn per epoch."""
    first_item: bool = True
    """Whether a user's first item, with no history before it, is a target."""
    clip: float = 1.0
    """Maximum norm of the gradients."""
    validate_every: int = 2
    """Number of epochs between validations."""
    patience: int = 6
    """Training stops after this many validations without a better NDCG@10; 0 never stops early."""
    budget_hours: float = 0.0
    """Hours after which training stops, within an epoch too; validations do not count. 0: no limit."""
    accumulation_steps: int = 1
    """Parts of a batch that a process computes one by one (gradient accumulation): less memory."""
    gradient_checkpointing: bool = False
    """Whether the activations of a layer are computed again in the backward pass: less memory, more time."""
    checkpoint_seconds: int = 60
    """Seconds between checkpoints, also of LightGCN and the RQ-VAE; longer if writing one takes long."""
    seed: int = 0
    """Random seed; the run's seed replaces it."""

    def __post_init__(self) -> None:
        for name in ("history_items", "epochs", "batch_size", "validate_every", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"generator.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"generator.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"generator.label_smoothing must be within 0 … 1, got {self.label_smoothing}")
        for name in ("item_loss", "budget_hours"):
            if getattr(self, name) < 0:
                raise UserError(f"generator.{name} must not be negative, got {getattr(self, name)}")
        if self.item_loss and not self.item_tokens:
            raise UserError(
                f"generator.item_loss={self.item_loss} needs embeddings of items",
                fix="--set generator.item_tokens=true",
            )
        if not 0 <= self.crop <= 1:
            raise UserError(f"generator.crop must be within 0 … 1, got {self.crop}")
