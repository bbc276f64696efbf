"""The yardstick: ``transformers``' own constrained beam search over a Python trie, as its users run it today."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cemg.decoding.engine import Normalize, Recommendations
from cemg.errors import UserError
from cemg.tokenizer import Catalog

Children = dict[int, "Children"]


class TransformersDecoder:
    """The interface of ``Decoder``, served by ``generate(prefix_allowed_tokens_fn=…)``. No certificate: zeros."""

    def __init__(
        self, model: PreTrainedModel, catalog: Catalog, code_token_start: int, normalize: Normalize = "vocab"
    ) -> None:
        self.model, self.catalog, self.code_token_start, self.normalize = model, catalog, code_token_start, normalize
        offset = torch.arange(catalog.levels) * catalog.codebook_size + code_token_start
        self.tokens = catalog.codes + offset  # [N, levels]
        self.root = dict_trie(self.tokens)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> Recommendations:
        """As ``Decoder.decode``, for unfiltered prompts [B, S]; ``beams`` may not exceed the number of items."""
        if beams > len(self.catalog):
            raise UserError(f"{beams} beams for {len(self.catalog)} items: generate() would fill up with illegal ones")
        prompt = 1 if self.model.config.is_encoder_decoder else input_ids.shape[1]
        processors = LogitsProcessorList()
        if self.normalize == "level":
            processors.append(LevelOnly(prompt, self.code_token_start, self.catalog.codebook_size))
        out = self.model.generate(
            input_ids=input_ids.to(self.model.device), attention_mask=attention_mask.to(self.model.device),
            do_sample=False, num_beams=beams, num_return_sequences=beams, length_penalty=0.0,
            max_new_tokens=self.catalog.levels, min_new_tokens=self.catalog.levels,
            temperature=None, top_k=None, top_p=None, repetition_penalty=None, early_stopping=False,
            prefix_allowed_tokens_fn=self._allowed(prompt), logits_processor=processors,
            renormalize_logits=self.normalize == "valid", return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        tokens = out.sequences[:, prompt:].cpu().reshape(len(input_ids), beams, -1)
        return self._results(tokens, out.sequences_scores.cpu().reshape(len(input_ids), beams))

    def _allowed(self, prompt: int) -> Callable[[int, Tensor], list[int]]:
        def allowed(_: int, tokens: Tensor) -> list[int]:
            node = self.root
            for token in tokens[prompt:].tolist():
                node = node.get(token, {})
            return list(node) or [self.code_token_start]  # a finished beam: whatever it adds is cut off

        return allowed

    def _results(self, tokens: Tensor, scores: Tensor) -> Recommendations:
        offset = torch.arange(self.catalog.levels) * self.catalog.codebook_size + self.code_token_start
        codes = tokens - offset  # [B, W, levels]
        nodes = self.catalog.trie.lookup(codes.reshape(-1, self.catalog.levels)).reshape(scores.shape)
        dead = (nodes < 0) | ~scores.isfinite()
        items = self.catalog.trie.items(nodes.masked_fill(dead, -1).flatten()).reshape(scores.shape)
        return Recommendations(
            items, scores.masked_fill(dead, float("-inf")), codes.masked_fill(dead[:, :, None], -1),
            torch.zeros(len(scores), dtype=torch.int64),
        )  # fmt: skip


class LevelOnly(LogitsProcessor):
    """Log-probabilities over the K codes of the level that comes next, for ``normalize="level"``."""

    def __init__(self, prompt: int, code_token_start: int, codebook_size: int) -> None:
        self.prompt, self.start, self.size = prompt, code_token_start, codebook_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = self.start + (input_ids.shape[1] - self.prompt) * self.size
        out = torch.full_like(scores, float("-inf"))
        out[:, first : first + self.size] = scores[:, first : first + self.size].log_softmax(1)
        return out


def dict_trie(rows: Tensor) -> Children:
    """A trie of nested dicts over rows [N, levels]: the structure most people use, and the tests' oracle."""
    root: Children = {}
    for row in rows.tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root
