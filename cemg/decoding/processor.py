"""``TrieLogitsProcessor``: the trie as a logits processor, for those who stay with ``generate``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from cemg.errors import UserError
from cemg_kernels import Trie


class TrieLogitsProcessor(LogitsProcessor):
    """Leaves the codes that continue an item of the trie; every other token gets −inf.

    For ``generate(..., logits_processor=[TrieLogitsProcessor(trie, start)], max_new_tokens=trie.levels)``
    with any number of beams, greedy search or sampling. Code c of level m is token
    ``code_token_start + m·K + c``. All rows at once, on the model's device, without a Python loop.

    The prompt is what the first call sees. One processor serves one ``generate`` after the other.
    """

    def __init__(self, trie: Trie, code_token_start: int) -> None:
        self.trie, self.code_token_start = trie, code_token_start
        self.prompt = self.length = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` [R, S + m] after m codes and ``scores`` [R, V] -> [R, V].

        A row that is the prefix of no item, a beam that ``generate`` keeps at −1e9 to fill up, is left with
        code 0, so that a softmax over it stays finite. Raises UserError where V is too small for the codes.
        """
        level = self._level(input_ids.shape[1])
        size = self.trie.codebook_size
        first = self.code_token_start + level * size
        if first + size > scores.shape[1]:
            raise UserError(
                f"the codes of level {level} are tokens {first} … {first + size - 1}, "
                f"the model has {scores.shape[1]}",
                fix="pass the code_token_start of the vocabulary that the model was trained with",
            )
        if self.trie.device != scores.device:
            self.trie = self.trie.to(scores.device)
        begins = torch.arange(level, device=input_ids.device) * size + self.code_token_start
        nodes = self.trie.lookup(input_ids[:, self.prompt :] - begins)  # [R]
        allowed = self.trie.mask(nodes)  # [R, K]
        allowed[:, 0] |= nodes < 0
        out = torch.full_like(scores, float("-inf"))
        out[:, first : first + size] = scores[:, first : first + size].masked_fill(~allowed, float("-inf"))
        return out

    def _level(self, length: int) -> int:
        """How many codes stand after the prompt; what does not go on from the last call is a new prompt."""
        if length != self.length + 1 or length - self.prompt >= self.trie.levels:
            self.prompt = length
        self.length = length
        return length - self.prompt
