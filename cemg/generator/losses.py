"""Losses of the generator's training, from the predictions at the positions before the targets' codes.

n target items, L levels, K codes per level, D width of the hidden states, V tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cemg.generator.config import GeneratorConfig
from cemg.generator.vocabulary import Vocabulary
from cemg_kernels import Trie


class Predictions(ABC):
    """The model's predictions of the codes of n target items."""

    @property
    @abstractmethod
    def states(self) -> Tensor:
        """Last hidden states that predict the codes: [n, L, D]; level 0 has read only the history."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Logits of all tokens: [n, L, V]."""

    @abstractmethod
    def code_logits(self, level: int, chosen: Tensor) -> Tensor:
        """Logits of the codes of one level for some target items.

        Args:
            level: The level.
            chosen: Indices of target items, int64 [c].

        Returns:
            [c, K].
        """


@dataclass(frozen=True, slots=True)
class FullPredictions(Predictions):
    """Predictions of a model that computes the logits of all tokens: ``rows`` [n, L, V]."""

    rows: Tensor
    hidden: Tensor
    vocabulary: Vocabulary

    @property
    def states(self) -> Tensor:
        return self.hidden

    def logits(self) -> Tensor:
        return self.rows

    def code_logits(self, level: int, chosen: Tensor) -> Tensor:
        size = self.vocabulary.codebook_size
        first = self.vocabulary.code_token_start + level * size
        return self.rows[chosen, level, first : first + size]


class CodeLoss:
    """Mean cross-entropy over the codes of the targets (paper equation 5)."""

    def __init__(
        self, item_tokens: Tensor, trie: Trie, vocabulary: Vocabulary, config: GeneratorConfig
    ) -> None:
        """``item_tokens`` [N, L] are the tokens of the catalog's items, whose trie is ``trie``."""
        self.config, self.trie = config, trie
        starts = vocabulary.tokens(torch.zeros(vocabulary.levels, dtype=torch.int64))  # [L]
        self.tokens = item_tokens.to(trie.device)
        self.codes = (item_tokens - starts).to(trie.device)
        nodes = [trie.lookup(self.codes[:, :level]) for level in range(vocabulary.levels + 1)]
        below = torch.stack(
            [trie.interval(node).diff(dim=1).flatten() for node in nodes], 1
        )  # [N, L + 1] items
        self.nodes = torch.stack(nodes[:-1], 1)  # [N, L]: the prefix of each code
        self.branches = below[:, :-1] > below[:, 1:]  # [N, L]: another code continues the prefix, too

    def __call__(self, predictions: Predictions, items: Tensor) -> Tensor:
        """The loss of the target items [n], catalog rows."""
        if self.config.loss == "valid":
            return self._over_valid_codes(predictions, items)
        return F.cross_entropy(
            predictions.logits().flatten(0, 1).float(), self.tokens[items].flatten(),
            label_smoothing=self.config.label_smoothing,
        )  # fmt: skip

    def _over_valid_codes(self, predictions: Predictions, items: Tensor) -> Tensor:
        """The softmax runs over the codes that continue a prefix in the trie. A single one costs nothing."""
        codes, nodes, branches = self.codes[items], self.nodes[items], self.branches[items]
        total = torch.zeros((), device=items.device)
        for level in range(codes.shape[1]):
            chosen = branches[:, level].nonzero().flatten()
            logits = predictions.code_logits(level, chosen).float()  # [c, K]
            masked = logits.masked_fill(~self.trie.mask(nodes[chosen, level]), float("-inf"))
            total = total + F.cross_entropy(masked, codes[chosen, level], reduction="sum")
        return total / codes.numel()
