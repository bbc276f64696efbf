"""A trained sequence model as a ranker, and as a prior over items for the mixture.

B users, L positions, D embedding, N items, Z items of a prior.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, PositiveInt
from torch import Tensor

from cemg.data.dataset import Split
from cemg.dense.config import DenseConfig
from cemg.dense.encoder import SequenceEncoder
from cemg.dense.histories import pad_histories
from cemg.errors import DamagedError, UserError
from cemg.storage import files
from cemg.storage.read import STRICT, check_signature, file_digest, read_json, read_tensors, signed

ABOUT, WEIGHTS = "dense.json", "dense.safetensors"
DENSE_FILES = (ABOUT, WEIGHTS)
EARLIER = "sasrec.json"  # of versions that counted positions from the oldest item
TRAIN = "python -m cemg.baselines --help"


@dataclass(frozen=True, slots=True)
class DenseRanker:
    """A trained model, for ``cemg.evaluation.evaluate`` and for mixtures.

    Attributes:
        model: The weights.
        config: The settings.
        targets: ``targets_sha256`` of the split that it was trained on; "" if that is not known.
    """

    model: SequenceEncoder
    config: DenseConfig
    targets: str = ""

    @torch.inference_mode()
    def __call__(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Rank the whole catalog, the histories' own items included.

        Args:
            histories: B histories of item rows, oldest first.
            top: Items per list.

        Returns:
            [B, min(top, N)] int64 item rows, best first.

        Raises:
            UserError: A history is empty, so it has no position with a state.
        """
        logits = self.logits(histories)
        return logits.topk(min(top, logits.shape[1]), dim=1).indices

    @torch.inference_mode()
    def prior(
        self, histories: Sequence[np.ndarray], top: int = 1000, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compute the probabilities of the most probable items, for ``cemg_kernels.ItemPrior``.

        The softmax is over the whole catalog, so the masses of a row sum to less than 1 if ``top < N``.

        Args:
            histories: B histories of item rows, oldest first.
            top: Items per history, Z = min(top, N).
            temperature: Divides the logits.

        Returns:
            The item rows [B, Z] int64, best first, and their masses [B, Z] float64.

        Raises:
            UserError: A history is empty, or the temperature is not positive.
        """
        if not temperature > 0:
            raise UserError(f"temperature must be positive, got {temperature}")
        logits = self.logits(histories).double() / temperature
        best = logits.topk(min(top, logits.shape[1]), dim=1)
        return best.indices, (best.values - logits.logsumexp(1, keepdim=True)).exp()

    @torch.inference_mode()
    def logits(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Compute the logits [B, N] float32 of the next item.

        Raises:
            UserError: A history is empty, so it has no position with a state.
        """
        if any(len(h) == 0 for h in histories):
            raise UserError(
                f"{self.config.model} cannot rank for an empty history", fix="use popularity for those users"
            )
        table = self.model.items.weight
        items, lengths = pad_histories(histories, self.config.max_length)
        states = self.model(items.to(table.device), lengths.to(table.device), newest=True)  # [B, D]
        logits: Tensor = states @ table.T
        return logits

    def save(self, folder: Path | str) -> None:
        """Write ``dense.safetensors`` and ``dense.json``."""
        folder = Path(folder)
        files.save_tensors(self.model.state_dict(), folder / WEIGHTS)
        about: dict[str, Any] = {"num_items": self.model.items.num_embeddings, "config": asdict(self.config)}
        about |= {"targets_sha256": self.targets, "weights_sha256": file_digest(folder / WEIGHTS)}
        files.write_json(folder / ABOUT, signed(about))

    @classmethod
    def load(cls, folder: Path | str) -> DenseRanker:
        """Read what ``save`` wrote. Raises UserError where it is missing, damaged or too old."""
        folder = Path(folder)
        path, weights = folder / ABOUT, folder / WEIGHTS
        if not path.exists():
            if (folder / EARLIER).exists():
                cause = "it counts positions from the oldest item, this version from the newest"
                raise UserError(f"{folder} has a SASRec of an earlier version", cause=cause, fix=TRAIN)
            raise UserError(f"{folder} has no trained SASRec or BSARec", fix=f"train one: {TRAIN}")
        fix = f"restore it from a copy, or train again: {TRAIN}"
        record = read_json(path, dict[str, Any], fix=fix)
        about = read_json(path, _About, fix=fix)
        check_signature(record, name=str(path), fix=fix)
        if file_digest(weights, fix=fix) != about.weights_sha256:
            cause = "its sha256 differs from that in the manifest"
            raise DamagedError(f"{weights} is damaged", cause=cause, fix=fix)
        model = SequenceEncoder(about.num_items, about.config)
        spec = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
        model.load_state_dict(read_tensors(weights, spec, fix=fix))
        return cls(model.eval(), about.config, about.targets_sha256)

    def check_data(self, folder: Path | str, split: Split) -> None:
        """Raise UserError if the model, which was read from ``folder``, was trained on another split."""
        items, targets = int(split.fingerprint["items"]), str(split.fingerprint["targets_sha256"])
        cause = None
        if self.model.items.num_embeddings != items:
            cause = f"it was trained on {self.model.items.num_embeddings:,} items, this run has {items:,}"
        elif self.targets not in ("", targets):
            cause = (
                "its training had other users, items or test targets, so it may have seen those of this run"
            )
        if cause is not None:
            name, new = self.config.model, shlex.quote(f"{folder}-2")
            raise UserError(
                f"{folder} was not trained on the data of this run",
                cause=cause,
                fix=f"python -m cemg.baselines --data DATA --model {name} --run {new} --out {name}.json",
            )


@dataclass(frozen=True, slots=True)
class _About:
    """The content of ``dense.json``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_items: PositiveInt
    config: DenseConfig
    weights_sha256: str
    sha256: str
    targets_sha256: str = ""  # earlier versions did not record it
