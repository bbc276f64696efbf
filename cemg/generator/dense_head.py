"""The item softmax of a generator: the next item's probabilities from one forward pass, without a search.

It is trained by ``generator.item_loss`` and reads the model of ``with_item_tokens``: the logit of an item is
the product of its token's embedding and the hidden state after the prompt.

B histories, N items, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.generator.prompts import Prompter
from cemg.generator.vocabulary import Vocabulary


@torch.no_grad()
def dense_ranking(
    model: PreTrainedModel, vocabulary: Vocabulary, prompter: Prompter, histories: Sequence[np.ndarray], *,
    top: int = 1000, exclude: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The most probable items of each history.

    Args:
        model: A model with tokens of items.
        vocabulary: Its vocabulary.
        prompter: Builds the prompts.
        histories: Catalog rows, oldest first.
        top: Number of items per history; at most N.
        exclude: Whether the items of the history have no probability.

    Returns:
        Catalog rows [B, top] int64, best first, and their probabilities [B, top] float32, on the CPU. As an
        item prior: ``ItemPrior(items.tolist(), mass.tolist())``.
    """
    table = cast(Tensor, model.get_input_embeddings().weight)[vocabulary.item_token_start :]  # [N, D]
    states = _last_states(model, *(part.to(table.device) for part in prompter.batch(histories)))
    logits = states @ table.t()
    if exclude:
        for row, history in zip(logits, histories, strict=True):
            row[torch.as_tensor(np.asarray(history, dtype=np.int64), device=table.device)] = float("-inf")
    mass, items = logits.softmax(1).topk(min(top, len(table)), dim=1)
    return items.cpu(), mass.cpu()


def _last_states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, D] that predict the first code."""
    if model.config.is_encoder_decoder:
        start = torch.full((len(ids), 1), cast(Any, model.config).decoder_start_token_id, device=ids.device)
        out = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        return cast(Tensor, out.decoder_hidden_states[-1][:, -1])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = cast(Any, model).base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    )
    return cast(Tensor, out.last_hidden_state[:, -1])
