"""The item softmax of a generator: the next item's probabilities from one forward pass, without a search.

``generator.item_loss`` trains it. The logit of an item is the product of its token's embedding and the hidden
state after the prompt.

B histories, N items, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.generator.prompts import Prompter


@dataclass(frozen=True, slots=True)
class ItemSoftmax:
    """The probabilities of the next item, as a source of item priors.

    Attributes:
        model: A model with tokens of items, see `with_item_tokens`.
        prompter: Builds its prompts.
    """

    model: PreTrainedModel
    prompter: Prompter

    @torch.no_grad()
    def prior(self, histories: Sequence[np.ndarray], top: int = 1000) -> tuple[Tensor, Tensor]:
        """The most probable items of each history.

        Args:
            histories: Catalog rows, oldest first.
            top: Number of items per history, at most N.

        Returns:
            Catalog rows [B, top] int64, best first, and their probabilities [B, top] float64. As an item
            prior: ``ItemPrior(items.tolist(), mass.tolist())``.
        """
        table = cast(Tensor, self.model.get_input_embeddings().weight)
        vectors = table[self.prompter.vocabulary.item_token_start :]  # [N, D]
        ids, mask = (part.to(table.device) for part in self.prompter.batch(histories))
        logits = (self._states(ids, mask) @ vectors.t()).double()
        mass, items = logits.softmax(1).topk(min(top, len(vectors)), dim=1)
        return items, mass

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, D] that predict the first code."""
        model: Any = self.model
        read = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if model.config.is_encoder_decoder:
            start = torch.full((len(ids), 1), model.config.decoder_start_token_id, device=ids.device)
            out = model(**read, decoder_input_ids=start, output_hidden_states=True)
            return cast(Tensor, out.decoder_hidden_states[-1][:, -1])
        positions = (mask.cumsum(1) - 1).clamp_min(0)  # the padding is on the left
        return cast(Tensor, model.base_model(**read, position_ids=positions).last_hidden_state[:, -1])
