"""The trie inside vLLM: a logits processor of its v1 engine that handles all requests of a batch at once.

R rows of the batch, r of them at one level, K codes per level, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cemg.tokenizer.tokens import CodeTokens
from cemg_kernels import Trie, trie_softmax

SETTINGS = "cemg"  # in the engine's ``additional_config``: trie (a file), code_token_start, normalize
PROMPT = "cemg_prompt"  # in a request's ``extra_args``: the number of tokens before its first code


class Request(NamedTuple):
    """A request's code tokens: those at the end of its prompt, and those that the engine appends."""

    in_prompt: list[int]
    output: list[int]

    def tokens(self) -> list[int]:
        return self.in_prompt + self.output


class TrieProcessor:
    """Replaces logits by log-probabilities of the codes that continue an item; other tokens get -inf.

    vLLM loads it by name (``vllm_plugin.py``), with ``additional_config={"cemg": {"trie": path,
    "code_token_start": …, "normalize": …}}``; ``vllm serve`` takes the same. Requests with
    ``SamplingParams(extra_args={"cemg_prompt": n}, max_tokens=trie.levels)`` get codes after their first n
    tokens. Other requests, and those that have all their codes, are unchanged. Code c of level m is token
    ``code_token_start + m·K + c``, or entry [m][c] of ``code_token_start`` if it is a list of lists.

    With ``logprobs_mode="processed_logits"``, vLLM reports these log-probabilities for each ``normalize``.
    Its own modes report "vocab" before the mask, where the best W tokens need not be codes, or "valid" after
    it. Sampling is unaffected, since a softmax does not change when a row shifts by a constant.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        settings = vllm_config.additional_config[SETTINGS]
        self.trie = Trie.load(settings["trie"]).to(device)
        sizes = [self.trie.codebook_size] * self.trie.levels
        self.tokens = CodeTokens.of(settings["code_token_start"], sizes).to(device)
        self.normalize = settings["normalize"]
        vocabulary, span = vllm_config.model_config.get_vocab_size(), self.tokens.span
        if span.stop > vocabulary:
            raise ValueError(
                f"the codes are tokens {span.start} … {span.stop - 1}, the model has {vocabulary}; "
                "pass the code_token_start of the vocabulary that the model was trained with"
            )
        self.requests: dict[int, Request] = {}  # by row of the batch

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for an invalid prompt length."""
        prompt = (sampling_params.extra_args or {}).get(PROMPT)
        if prompt is not None and (not isinstance(prompt, int) or prompt < 0):
            raise ValueError(f"extra_args[{PROMPT!r}] must be a number of tokens, got {prompt!r}")

    def is_argmax_invariant(self) -> bool:
        """False: the best token may not continue an item."""
        return False

    def update_state(self, batch_update: Any | None) -> None:
        """Track the requests that the engine removes, adds and moves, in this order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self.requests.pop(row, None)
            start = (params.extra_args or {}).get(PROMPT)
            if start is not None:
                self.requests[row] = Request((prompt or [])[start:], output)
        for source, target, direction in batch_update.moved:
            moved, other = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if other is not None and direction.name == "SWAP":
                self.requests[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Change logits [R, V] float32 in place, in one pass per level that occurs."""
        levels: dict[int, list[int]] = {}
        for row, request in self.requests.items():
            levels.setdefault(len(request.in_prompt) + len(request.output), []).append(row)
        constrained = {level: rows for level, rows in levels.items() if level < self.trie.levels}
        totals = logits.logsumexp(1) if constrained and self.normalize == "vocab" else None  # [R]
        for level, rows in constrained.items():
            self._constrain(logits, rows, level, totals)
        return logits

    def _constrain(self, logits: Tensor, rows: list[int], level: int, totals: Tensor | None) -> None:
        """Constrain the rows at one level.

        A row that is not a prefix of any item keeps the first code, so that a softmax over it is finite.
        """
        tokens = [self.requests[row].tokens() for row in rows]
        prefixes = torch.tensor(tokens, dtype=torch.int64, device=logits.device).reshape(len(rows), level)
        nodes = self.trie.lookup(self.tokens.codes_of(prefixes))  # [r]
        index = torch.tensor(rows, device=logits.device)
        total = None if totals is None else totals[index]
        columns = self.tokens.columns(level, logits[index]).contiguous()
        log_probs = trie_softmax(columns, nodes, self.trie, self.normalize, total)  # [r, K]
        log_probs[:, self.tokens.first_codes[level]].masked_fill_(nodes < 0, 0.0)
        constrained = torch.full_like(logits[index], float("-inf"))
        self.tokens.spread(level, log_probs.to(logits.dtype), constrained)
        logits[index] = constrained
