"""``TrieLogitsProcessor``: the trie constraint as a logits processor for ``generate()``."""

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
    """Keeps the logits of codes that continue an item of the trie; every other token gets -inf.

    Works with any number of beams, greedy search and sampling. All rows are processed at once, on the model's
    device, without a Python loop. The prompt is what the first call receives; a processor may serve several
    ``generate()`` calls, one after the other.

    ``generate()`` also applies the checkpoint's ``generation_config``: sampling, penalties, banned and forced
    tokens. Call it within ``plain_generation(model)``, or the results may be wrong. The processor warns once
    if it sees the effect of such a setting.

    Args:
        trie: A catalog, or its trie.
        code_token_start: The first code token, or a table, as for ``Decoder``. None takes the token map of
            the catalog.

    Raises:
        UserError: If ``trie`` is a trie and ``code_token_start`` is None.

    Example:
        ```python
        processor = TrieLogitsProcessor(catalog, code_token_start)
        with plain_generation(model):
            tokens = model.generate(
                input_ids, num_beams=50, max_new_tokens=catalog.levels, logits_processor=[processor]
            )
        ```
    """

    def __init__(self, trie: Trie | Catalog, code_token_start: TokenMap | CodeTokens | None = None) -> None:
        if isinstance(trie, Catalog):
            self.trie, self.tokens = trie.trie, trie.code_tokens(code_token_start)
        elif code_token_start is None:
            raise UserError("code_token_start is missing", fix="pass it, or a catalog with a token map")
        else:
            self.trie = trie
            self.tokens = CodeTokens.of(code_token_start, [trie.codebook_size] * trie.levels)
        self.last_tokens: list[int] = self.tokens.table.amax(1).tolist()
        self.prompt = self.length = self.rows = -1
        self.warned = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Constrain the scores of the next code.

        ``generate()`` fills its beams with rows at -1e9 that are not a prefix of any item. They keep the
        first code, so that a softmax over them is finite.

        Args:
            input_ids: int64 [R, S + m], the prompts and m codes.
            scores: [R, V].

        Returns:
            [R, V], -inf for every token that does not continue an item.

        Raises:
            UserError: If V is too small for the codes.
        """
        level = self._level(*input_ids.shape)
        if self.trie.device != scores.device:
            self.trie, self.tokens = self.trie.to(scores.device), self.tokens.to(scores.device)
        self._check_vocabulary(level, scores.shape[1])
        nodes = self.trie.lookup(self.tokens.codes_of(input_ids[:, self.prompt :]))  # [R]
        allowed = self.trie.mask(nodes)  # [R, K]
        columns = self.tokens.columns(level, scores)
        if not self.warned:
            self._warn_of_interference(nodes, allowed & columns.isneginf())
        allowed[:, self.tokens.first_codes[level]] |= nodes < 0
        out = torch.full_like(scores, float("-inf"))
        self.tokens.spread(level, columns.masked_fill(~allowed, float("-inf")), out)
        return out

    def _check_vocabulary(self, level: int, vocabulary: int) -> None:
        """Raises UserError if the model lacks tokens of a level."""
        last = self.last_tokens[level]
        if last < vocabulary:
            return
        start, size = self.tokens.start, self.trie.codebook_size
        tokens = f"go up to token {last}" if start is None else f"are tokens {start + level * size} … {last}"
        raise UserError(
            f"the codes of level {level} {tokens}, the model has {vocabulary}",
            fix="pass the code_token_start of the vocabulary that the model was trained with",
        )

    def _warn_of_interference(self, nodes: Tensor, removed: Tensor) -> None:
        """Warn if another processor changed the scores.

        That is so if codes that continue an item are ``removed`` [R, K], or if a row at ``nodes`` [R] is not
        a prefix of any item and not one of those that ``generate()`` fills its beams with.
        """
        if bool(removed.any()):
            self._warn("another logits processor has removed codes that continue an item")
        elif not self._all_legal_or_filling(nodes):
            self._warn("a row is not a prefix of any item: its tokens were chosen from other scores")

    def _all_legal_or_filling(self, nodes: Tensor) -> bool:
        """Whether illegal rows only fill beams: then each prompt has all legal prefixes among its rows."""
        legal = nodes[nodes >= 0]
        if len(legal) == len(nodes):
            return True
        different = legal.unique()
        once, in_total = (self.trie.interval(part.int()).diff(dim=1).sum() for part in (different, legal))
        items = self.trie.num_items
        return bool(once == items) and bool(in_total * len(different) == items * len(legal))

    def _warn(self, what: str) -> None:
        self.warned = True
        warnings.warn(
            f"{what}; the results may be wrong. Settings of the model's generation_config "
            "(do_sample, top_k, penalties, forced or suppressed tokens, …) do this: call generate() within "
            "`with cemg.decoding.plain_generation(model):`",
            stacklevel=2,
        )

    def _level(self, rows: int, length: int) -> int:
        """The number of codes after the prompt. Any call that does not continue the last one starts anew."""
        continues = rows == self.rows and length == self.length + 1
        if not continues or length - self.prompt >= self.trie.levels:
            self.prompt = length
        self.rows, self.length = rows, length
        return length - self.prompt


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, ``generate()`` ignores the checkpoint's sampling, penalties and forced tokens.

    Only the special tokens of the model's ``generation_config`` stay. A ``generation_config`` passed to
    ``generate()`` does not do this, since its unset values come from the model's own. The model's is restored
    after the block; until then no other thread may generate with the model.

    Args:
        model: The model, with or without PEFT's wrapper.
    """
    wrapper: Any = model
    original: Any = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    settings = GenerationConfig(**{name: getattr(original, name) for name in names})
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    owners: list[Any] = [wrapper]
    if hasattr(wrapper, "get_base_model"):  # PEFT's wrapper passes its configuration to the wrapped model
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
