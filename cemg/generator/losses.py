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
from cemg.generator.item_tokens import ItemVectors
from cemg.generator.vocabulary import Vocabulary
from cemg_kernels import Trie

NEGATIVES = 2048  # items drawn per step for the item loss


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

    @property
    def depths(self) -> Tensor:
        """Number of codes of each item that the loss reads, from the first on: [N], at least 1."""
        levels = torch.arange(1, self.codes.shape[1] + 1, device=self.codes.device)
        last = (self.branches if self.config.loss == "valid" else torch.ones_like(self.branches)) * levels
        return last.amax(1).clamp_min(1)

    def __call__(self, predictions: Predictions, items: Tensor) -> Tensor:
        """The loss of the target items [n], catalog rows."""
        if self.config.loss == "valid":
            return self._over_valid_codes(predictions, items)
        return F.cross_entropy(
            self._cooled(predictions.logits().flatten(0, 1)), self.tokens[items].flatten(),
            label_smoothing=self.config.label_smoothing,
        )  # fmt: skip

    def _cooled(self, logits: Tensor) -> Tensor:
        """Logits in float32, divided by the temperature."""
        logits = logits.float()
        return logits if self.config.temperature == 1 else logits / self.config.temperature

    def _over_valid_codes(self, predictions: Predictions, items: Tensor) -> Tensor:
        """The softmax runs over the codes that continue a prefix in the trie. A single one costs nothing."""
        codes, nodes, branches = self.codes[items], self.nodes[items], self.branches[items]
        total = torch.zeros((), device=items.device)
        for level in range(codes.shape[1]):
            chosen = branches[:, level].nonzero().flatten()
            logits = self._cooled(predictions.code_logits(level, chosen))  # [c, K]
            valid = self.trie.mask(nodes[chosen, level])
            log_probs = logits.masked_fill(~valid, float("-inf")).log_softmax(-1)
            own = log_probs.gather(1, codes[chosen, level, None])[:, 0]
            if self.config.label_smoothing:
                mean = log_probs.masked_fill(~valid, 0).sum(1) / valid.sum(1)
                own = torch.lerp(own, mean, self.config.label_smoothing)
            total = total - own.sum()
        return total / codes.numel()


class ItemLoss:
    """Mean cross-entropy of the target items in a softmax over all items, whose sum is estimated.

    The logit of an item is the product of its vector (see ``ItemVectors``) and the state that predicts the
    first code. Each step draws NEGATIVES items, which stand for all items other than the target.
    """

    def __init__(self, vectors: ItemVectors) -> None:
        self.vectors = vectors

    def __call__(self, predictions: Predictions, items: Tensor) -> Tensor:
        """The loss of the target items [n], catalog rows."""
        total = self.vectors.count
        drawn = torch.randperm(total, device=items.device)[:NEGATIVES]
        states = predictions.states[:, 0].float()  # [n, D]
        own = (states * self.vectors(items)).sum(1, keepdim=True)  # [n, 1]
        is_own = items[:, None] == drawn  # [n, NEGATIVES]
        counted = (len(drawn) - is_own.sum(1, keepdim=True)).clamp_min(1)
        others = states @ self.vectors(drawn).t() + ((total - 1) / counted).clamp_min(1).log()
        others = others.masked_fill(is_own, float("-inf"))
        return (torch.cat((own, others), 1).logsumexp(1) - own[:, 0]).mean()
