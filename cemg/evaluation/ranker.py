"""A run's beam search as a ranker, for the evaluation protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.artifacts import RunArtifacts
from cemg.decoding import Decoder, make_decoder
from cemg.evaluation.protocol import Rank
from cemg.generator import Vocabulary
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter


def beam_ranker(
    artifacts: RunArtifacts,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    catalog: Catalog,
    *,
    beams: int,
    engine: str = "cemg",
    exclude_history: bool = False,
    removed: Sequence[int] = (),
) -> Rank:
    """Histories to ranked catalog rows through beam search; lists of ``beams`` at most.

    ``exclude_history`` keeps each history's items out of the search, as in ``Recommender.recommend``; of
    engine "cemg" alone. ``removed``: catalog rows that are never listed.
    """
    prompter = artifacts.prompter(model, vocabulary, catalog)
    decoder = make_decoder(
        engine, model, catalog, vocabulary.code_token_start, artifacts.config.decoding.normalize
    )
    size = artifacts.config.decoding.batch_size
    offered = None
    if removed and isinstance(decoder, Decoder):
        kept = torch.ones(len(catalog), dtype=torch.bool)
        kept[list(removed)] = False
        offered = ItemFilter.from_mask(catalog.trie, kept).to(decoder.trie.device)

    def rank(histories: list[np.ndarray], top: int) -> Tensor:
        model.eval()
        parts = [histories[i : i + size] for i in range(0, len(histories), size)]
        return torch.cat([search(part) for part in parts])[:, :top]

    def search(part: list[np.ndarray]) -> Tensor:
        prompts, width = prompter.batch(part), min(beams, len(catalog))
        if not isinstance(decoder, Decoder):
            items = decoder.decode(*prompts, width).items.cpu()
            gone = torch.isin(items, torch.tensor([*removed], dtype=torch.int64))
            return items.masked_fill(gone, -1)  # which holds no place
        if not exclude_history:
            return decoder.decode(*prompts, width, filter=offered).items
        own = RequestFilter.excluding(decoder.trie, [history.tolist() for history in part])
        return decoder.decode(*prompts, width, filter=own if offered is None else own & offered).items

    return rank
