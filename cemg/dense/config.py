"""Settings of the sequence models and of their training."""

from __future__ import annotations

from dataclasses import dataclass

from cemg.errors import UserError

CHOICES = {
    "model": ("sasrec", "bsarec"),
    "loss": ("ce", "bce"),
    "samples": ("positions", "prefixes"),
    "products": ("bfloat16", "float32"),
    "schedule": ("constant", "linear"),
    "select": ("NDCG@10", "HR@10"),
}
SIZES = ("dim", "blocks", "heads", "inner", "max_length", "frequencies")
COUNTS = (*SIZES, "batch_size", "epochs", "patience", "folds")


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Settings of the model, its loss and its training.

    Attributes:
        model: "sasrec" has causal self-attention; "bsarec" mixes it with a frequency filter.
        loss: "ce" is softmax cross-entropy over the whole catalog. "bce" is the binary cross-entropy of the
            SASRec paper, with one random negative per target.
        negatives: Items per step that the softmax of "ce" is estimated from, drawn uniformly; 0 means all.
        samples: "prefixes" has one sample per training item, predicted from the items before it. "positions"
            predicts all items of a user from one pass; BSARec cannot, because its filter is not causal.
        inner: Width of the hidden layer of the feed-forward network.
        dropout: Of embeddings, attention weights and the output of each sublayer.
        inner_dropout: Of the hidden layer of the feed-forward network.
        norm_first: Whether LayerNorm precedes each sublayer instead of following it.
        max_length: Number of the newest items of a history that the model reads.
        alpha: Weight of the frequency filter of BSARec; 1 - alpha is that of attention.
        frequencies: Dimensions that the low-pass filter of BSARec keeps, out of ``max_length``.
        schedule: Learning rate over the steps: "constant", or "linear" from ``learning_rate`` to 0 at the end
            of ``epochs``.
        beta2: Decay of the second moment of Adam.
        patience: Training stops after this many epochs without a better ``select`` on validation.
        select: Validation metric that selects the epoch, the history removed from the lists, over all users.
        products: Type of the matrix products of the cross-entropy, "bfloat16" or "float32".
        folds: Number of user folds; 1 trains on all users.
        fold: The fold of users that the training leaves out, if there is more than one.
    """

    model: str = "sasrec"
    loss: str = "ce"
    negatives: int = 2048
    samples: str = "prefixes"
    dim: int = 64
    blocks: int = 2
    heads: int = 1
    inner: int = 256
    dropout: float = 0.5
    inner_dropout: float = 0.0
    norm_first: bool = False
    max_length: int = 50
    alpha: float = 0.7
    frequencies: int = 5
    learning_rate: float = 1e-3
    schedule: str = "linear"
    beta2: float = 0.999
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 30
    patience: int = 10
    select: str = "NDCG@10"
    products: str = "bfloat16"
    folds: int = 1
    fold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("dropout", "inner_dropout", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.negatives < 0:
            raise UserError(f"negatives must be 0 or more, got {self.negatives}")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise UserError(f"learning_rate {self.learning_rate} must be positive, weight_decay not negative")
        if not 0 <= self.fold < self.folds:
            raise UserError(f"fold must be in 0 … {self.folds - 1}, got {self.fold}")
        if self.model == "bsarec" and self.samples == "positions":
            raise UserError(
                "BSARec cannot train on all positions of a sequence",
                cause="its frequency filter reads the items after a position",
                fix="use samples=prefixes",
            )
