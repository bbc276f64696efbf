"""``TrieLogitsProcessor``: the trie as a logits processor, for those who stay with ``generate``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, TokenMap
from cemg_kernels import Trie


class TrieLogitsProcessor(LogitsProcessor):
    """Leaves the codes that continue an item of the trie; every other token gets −inf.

    For ``generate(..., logits_processor=[TrieLogitsProcessor(trie, start)], max_new_tokens=trie.levels)``
    with any number of beams, greedy search or sampling. ``trie`` is a catalog or its trie; the codes' tokens
    are the catalog's, or those that ``code_token_start`` names: code c of level m is token ``code_token_start
    + m·K + c``, or entry [m, c] of a table. All rows at once, on the model's device, without a Python loop.

    The prompt is what the first call sees. One processor serves one ``generate`` after the other.
    """

    def __init__(self, trie: Trie | Catalog, code_token_start: TokenMap | CodeTokens | None = None) -> None:
        if isinstance(trie, Catalog):
            self.trie, self.tokens = trie.trie, trie.code_tokens(code_token_start)
        elif code_token_start is None:
            raise UserError("code_token_start is missing", fix="pass it, or a catalog with a token map")
        else:
            self.trie = trie
            self.tokens = CodeTokens.of(code_token_start, [trie.codebook_size] * trie.levels)
        self.last_tokens = self.tokens.table.amax(1).tolist()
        self.prompt = self.length = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` [R, S + m] after m codes and ``scores`` [R, V] -> [R, V].

        A row that is the prefix of no item, a beam that ``generate`` keeps at −1e9 to fill up, is left with
        the first code, so that a softmax over it stays finite. Raises UserError where V is too small for the
        codes.
        """
        level = self._level(input_ids.shape[1])
        if self.trie.device != scores.device:
            self.trie, self.tokens = self.trie.to(scores.device), self.tokens.to(scores.device)
        self._check(level, scores.shape[1])
        nodes = self.trie.lookup(self.tokens.codes_of(input_ids[:, self.prompt :]))  # [R]
        allowed = self.trie.mask(nodes)  # [R, K]
        allowed[:, self.tokens.first_codes[level]] |= nodes < 0
        out = torch.full_like(scores, float("-inf"))
        codes = self.tokens.columns(level, scores).masked_fill(~allowed, float("-inf"))
        self.tokens.spread(level, codes, out)
        return out

    def _check(self, level: int, vocabulary: int) -> None:
        """UserError where the model lacks tokens of a level."""
        last = self.last_tokens[level]
        if last < vocabulary:
            return
        start, size = self.tokens.start, self.trie.codebook_size
        named = f"go up to token {last}" if start is None else f"are tokens {start + level * size} … {last}"
        raise UserError(
            f"the codes of level {level} {named}, the model has {vocabulary}",
            fix="pass the code_token_start of the vocabulary that the model was trained with",
        )

    def _level(self, length: int) -> int:
        """How many codes stand after the prompt; what does not go on from the last call is a new prompt."""
        if length != self.length + 1 or length - self.prompt >= self.trie.levels:
            self.prompt = length
        self.length = length
        return length - self.prompt
