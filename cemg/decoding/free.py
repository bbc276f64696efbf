"""Beam search without the trie: it may generate codes that no item has, and drops them at the end.

It shows what the trie contributes. It runs on the decode steps of ``Decoder``.

B users, W beams, M levels, K codes per level, C = M * K code tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cemg.decoding.beams import Recommendations, check_prompts, token_count
from cemg.decoding.engine import Decoder
from cemg.decoding.protocol import Logits, LogitsRequest
from cemg.errors import UserError


class FreeDecoder:
    """Generates M code tokens per beam, of any level, and returns the beams that are items.

    The log-softmax runs over the vocabulary. Tokens that are no code are never chosen.

    Args:
        decoder: The decoder of the model and the catalog.

    Raises:
        UserError: If items share semantic IDs, or the tokens of the codes are not consecutive.
    """

    def __init__(self, decoder: Decoder) -> None:
        if decoder.catalog.shared is not None or decoder.tokens.start is None:
            raise UserError(
                "a search without the trie needs one semantic ID per item and consecutive tokens of codes",
                fix="use engine cemg",
            )
        self.decoder, self.catalog, self.model = decoder, decoder.catalog, decoder.model
        self.start = decoder.tokens.start
        self.request = LogitsRequest(self.start, self.catalog.levels * self.catalog.codebook_size, True)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> Recommendations:
        """The items among the ``beams`` best beams of each prompt.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 at padding, which may be anywhere.
            beams: The number of beams per prompt.

        Returns:
            Results [B, beams], best first; -1 past the last item. ``certified`` is 0.
        """
        scores, chosen = self.beams(input_ids, attention_mask, beams)
        return self._items(scores, chosen).cpu().padded(beams)

    @torch.inference_mode()
    def beams(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> tuple[Tensor, Tensor]:
        """Scores [B, W] and code tokens [B, W, M], counted from the first one, of the best beams."""
        check_prompts(input_ids, attention_mask, beams)
        ids, mask = self.decoder.trim_padding(input_ids, attention_mask)
        self.decoder.check_positions(mask)
        device = self.decoder.trie.device
        state = self.decoder.plan.new_state()
        tokens = token_count(mask) if self.decoder.plan.steps_in_torch else None
        logits = state.prefill(ids.to(device), mask.to(device), self.request, tokens)
        scores = torch.zeros(len(ids), 1, device=device)
        chosen = torch.empty(len(ids), 1, 0, dtype=torch.int64, device=device)  # [B, W, m] of 0 … C - 1
        for level in range(self.catalog.levels):
            scores, parents, codes = _best(scores, logits, beams)
            rows = parents[:, :, None].expand(-1, -1, chosen.shape[2])
            chosen = torch.cat((chosen.gather(1, rows), codes[:, :, None]), 2)
            if level + 1 < self.catalog.levels:
                logits = state.decode_step(self.start + codes, parents, self.request)
        return scores, chosen

    def _items(self, scores: Tensor, chosen: Tensor) -> Recommendations:
        """The beams that are items, in order, from code tokens [B, W, M]."""
        size, trie = self.catalog.codebook_size, self.decoder.trie
        codes = chosen - torch.arange(self.catalog.levels, device=chosen.device) * size
        own_level = ((codes >= 0) & (codes < size)).all(2)  # [B, W]
        leaves = trie.lookup(codes.clamp(0, size - 1).flatten(0, 1)).view(own_level.shape)
        leaves = leaves.masked_fill(~own_level, -1)
        order = (leaves < 0).byte().argsort(dim=1, stable=True)  # items first
        leaves, scores = leaves.gather(1, order), scores.gather(1, order)
        codes = codes.gather(1, order[:, :, None].expand_as(codes)).masked_fill((leaves < 0)[:, :, None], -1)
        items = trie.items(leaves.flatten()).view(leaves.shape)
        none = torch.zeros(len(items), dtype=torch.int64, device=items.device)
        return Recommendations(items, scores.masked_fill(leaves < 0, float("-inf")), codes, none)


def _best(scores: Tensor, logits: Logits, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, parents and code tokens [B, W] of the best continuations of beams with ``scores`` [B, W']."""
    assert logits.logsumexp is not None
    extended = scores[:, :, None] + logits.values - logits.logsumexp[:, :, None]  # [B, W', C]
    top, flat = extended.flatten(1).topk(min(beams, extended[0].numel()))
    return top, flat // extended.shape[2], flat % extended.shape[2]
