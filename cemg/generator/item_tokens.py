"""Tokens of items: in a history, one token stands for an item in place of its codes.

The vector of an item is the sum of the embeddings of its codes and an embedding of its own. In training, both
are separate weights. For a search, the vectors are rows of the model's table of embeddings, behind the codes'
tokens, so every engine reads them as ordinary tokens. An item that was added later has no embedding of its
own, and its vector is the sum of those of its codes.

N items, L levels, D width of the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cemg.generator.pretrained import add_tokens

STD = 0.02  # of the initial embeddings of items


def add_item_embedding(model: PreTrainedModel, items: int) -> None:
    """Add an embedding of each item to a model that will be trained. It follows torch's seed."""
    width = cast(Tensor, model.get_input_embeddings().weight).shape[1]
    embedding = nn.Embedding(items, width)
    nn.init.normal_(embedding.weight, std=STD)
    model.item_embedding = embedding


class ItemVectors:
    """The vectors of items, from the weights of a model that `add_item_embedding` extended.

    Attributes:
        count: N.
    """

    def __init__(self, model: PreTrainedModel, item_tokens: Tensor, device: str | None = None) -> None:
        """``item_tokens`` [N, L] are the codes of the items as tokens; ``device``: see below.

        None is the device of the model. Divided weights are gathered on another one than the model is on.
        """
        self.model, self.count = model, len(item_tokens)
        self.item_tokens = item_tokens.to(device or model.device)

    def __call__(self, items: Tensor) -> Tensor:
        """The vectors [*, D] of catalog rows [*]."""
        own: Any = self.model.item_embedding
        codes = F.embedding(self.item_tokens[items], cast(Tensor, self.model.get_input_embeddings().weight))
        return codes.sum(-2) + F.embedding(items, own.weight)


@torch.no_grad()
def with_item_tokens(model: PreTrainedModel, item_tokens: Tensor) -> PreTrainedModel:
    """Returns a copy of a trained model whose table of embeddings has the vectors of items as its last rows.

    Args:
        model: A model that `add_item_embedding` extended.
        item_tokens: [N, L] the codes as tokens; items past those of the training have no embedding of their
            own.
    """
    table = cast(Tensor, model.get_input_embeddings().weight)
    vectors = F.embedding(item_tokens.to(table.device), table).sum(-2)
    own = cast(Any, model).item_embedding.weight
    vectors[: len(own)] += own
    served: Any = copy.deepcopy(model)
    del served.item_embedding
    start = len(table)
    add_tokens(served, start + len(vectors), similar=False)
    served.get_input_embeddings().weight[start:] = vectors
    return cast(PreTrainedModel, served.eval())


@torch.no_grad()
def keep_items(model: PreTrainedModel, start: int, rows: Sequence[int]) -> PreTrainedModel:
    """Returns a copy of a model of `with_item_tokens` with the tokens of some items only, in this order.

    Args:
        model: The model.
        start: The first token of an item.
        rows: The items that keep a token.
    """
    kept: Any = copy.deepcopy(model)
    table = kept.get_input_embeddings().weight
    vectors = table[start:][torch.tensor(rows, device=table.device)].clone()
    add_tokens(kept, start + len(vectors), similar=False)
    kept.get_input_embeddings().weight[start:] = vectors
    return cast(PreTrainedModel, kept)
