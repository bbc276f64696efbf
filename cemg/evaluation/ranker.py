"""The beam search of a run as a ranker for the evaluation protocol."""

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
    """Build a ranker that maps histories to catalog rows by beam search.

    Args:
        artifacts: The run.
        model: Its trained generator.
        vocabulary: The vocabulary of the generator.
        catalog: The items to rank.
        beams: Beams per history, and the largest length of a list.
        engine: "cemg", "free", "transformers" or "vllm".
        exclude_history: Whether the search excludes the items of each history, as
            ``Recommender.recommend(exclude_history=True)`` does. Only engine "cemg" supports it.
        removed: Catalog rows that are never listed.
    """
    prompter = artifacts.prompter(model, vocabulary, catalog)
    decoder = make_decoder(
        engine, model, catalog, vocabulary.code_token_start, artifacts.config.decoding.normalize
    )
    size = artifacts.config.decoding.batch_size
    not_removed = None
    if removed and isinstance(decoder, Decoder):
        allowed = torch.ones(len(catalog), dtype=torch.bool)
        allowed[list(removed)] = False
        not_removed = ItemFilter.from_mask(catalog.trie, allowed).to(decoder.trie.device)

    def rank(histories: list[np.ndarray], top: int) -> Tensor:
        model.eval()
        batches = [histories[i : i + size] for i in range(0, len(histories), size)]
        return torch.cat([search(batch) for batch in batches])[:, :top]

    def search(batch: list[np.ndarray]) -> Tensor:
        prompts, width = prompter.batch(batch), min(beams, len(catalog))
        if not isinstance(decoder, Decoder):
            items = decoder.decode(*prompts, width).items.cpu()
            is_removed = torch.isin(items, torch.tensor([*removed], dtype=torch.int64))
            return items.masked_fill(is_removed, -1)  # not counted as a rank
        if not exclude_history:
            return decoder.decode(*prompts, width, filter=not_removed).items
        unseen = RequestFilter.excluding(decoder.trie, [history.tolist() for history in batch])
        both = unseen if not_removed is None else unseen & not_removed
        return decoder.decode(*prompts, width, filter=both).items

    return rank
