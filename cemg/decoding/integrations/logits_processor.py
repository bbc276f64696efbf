"""``TrieLogitsProcessor``: the trie as a logits processor, for those who stay with ``generate``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, TokenMap
from cemg_kernels import Trie


class TrieLogitsProcessor(LogitsProcessor):
    """Leaves the codes that continue an item of the trie; every other token gets −inf.

    For ``generate(..., logits_processor=[TrieLogitsProcessor(trie, start)], max_new_tokens=trie.levels)``
    with any number of beams, greedy search or sampling. ``trie`` is a catalog or its trie; the codes' tokens
    are the catalog's, or those that ``code_token_start`` names: code c of level m is token ``code_token_start
    + m·K + c``, or entry [m, c] of a table. All rows at once, on the model's device, without a Python loop.

    ``generate`` also applies what the checkpoint's generation_config names: sampling, penalties, banned and
    forced tokens. Call it within ``plain_generation(model)``, or results may be no items. The processor warns
    once where it sees the effect of such a setting.

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
        self.prompt = self.length = self.rows = -1
        self.warned = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` [R, S + m] after m codes and ``scores`` [R, V] -> [R, V].

        A row that is the prefix of no item, a beam that ``generate`` keeps at −1e9 to fill up, is left with
        the first code, so that a softmax over it stays finite. Raises UserError where V is too small for the
        codes.
        """
        level = self._level(*input_ids.shape)
        if self.trie.device != scores.device:
            self.trie, self.tokens = self.trie.to(scores.device), self.tokens.to(scores.device)
        self._check(level, scores.shape[1])
        nodes = self.trie.lookup(self.tokens.codes_of(input_ids[:, self.prompt :]))  # [R]
        allowed = self.trie.mask(nodes)  # [R, K]
        columns = self.tokens.columns(level, scores)
        if not self.warned:
            self._look_for_interference(nodes, allowed & columns.isneginf())
        allowed[:, self.tokens.first_codes[level]] |= nodes < 0
        out = torch.full_like(scores, float("-inf"))
        codes = columns.masked_fill(~allowed, float("-inf"))
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

    def _look_for_interference(self, nodes: Tensor, removed: Tensor) -> None:
        """Warn where codes that continue an item are ``removed`` [R, K], or a row that is the prefix of no
        item, at ``nodes`` [R], is not one that ``generate`` fills up with."""
        if bool(removed.any()):
            self._warn("another logits processor has removed codes that continue an item")
        elif not self._all_legal_or_filling(nodes):
            self._warn("a row is the prefix of no item: tokens were chosen from other scores than these")

    def _all_legal_or_filling(self, nodes: Tensor) -> bool:
        """Beam search fills up with illegal rows only where each prompt has all legal prefixes already."""
        live = nodes[nodes >= 0]
        if len(live) == len(nodes):
            return True
        different = live.unique()
        each, whole = (self.trie.interval(part.int()).diff(dim=1).sum() for part in (different, live))
        items = self.trie.num_items
        return bool(each == items) and bool(whole * len(different) == items * len(live))

    def _warn(self, what: str) -> None:
        self.warned = True
        warnings.warn(
            f"{what}; the results may be wrong or no items. Settings of the model's generation_config "
            "(do_sample, top_k, penalties, forced or suppressed tokens, …) do this: call generate() within "
            "`with cemg.decoding.plain_generation(model):`",
            stacklevel=2,
        )

    def _level(self, rows: int, length: int) -> int:
        """How many codes follow the prompt. A call that does not continue the last one has a new prompt."""
        continues = rows == self.rows and length == self.length + 1
        if not continues or length - self.prompt >= self.trie.levels:
            self.prompt = length
        self.rows, self.length = rows, length
        return length - self.prompt


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """``generate`` without the settings of the checkpoint: sampling, penalties, banned and forced tokens.

    A ``generation_config`` passed to ``generate`` does not do this: what it leaves open comes from the
    model's own. Of that one, only the special tokens stay. The model's is back afterwards; until then no
    other thread may generate with it.
    """
    wrapper: Any = model
    own: Any = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    settings = GenerationConfig(**{name: getattr(own, name) for name in names})
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    owners: list[Any] = [wrapper]
    if hasattr(wrapper, "get_base_model"):  # PEFT's wrapper hands its own to the model below
        owners.append(wrapper.get_base_model())
    before = [vars(owner).get("generation_config") for owner in owners]
    for owner in owners:
        owner.generation_config = settings
    try:
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            if config is None:
                del owner.generation_config
            else:
                owner.generation_config = config
