"""The reference engine: constrained beam search of ``transformers`` over a Python trie."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
)

from cemg.decoding.beams import Recommendations, pad_left, pad_right
from cemg.decoding.engine import check_fit
from cemg.decoding.integrations.logits_processor import plain_generation
from cemg.decoding.models.eval_mode import evaluating
from cemg.decoding.shared_ids import expand_shared_ids
from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, TokenMap
from cemg_kernels.constrained.softmax import Normalize

Children = dict[int, "Children"]


class TransformersDecoder:
    """``Decoder`` without filters and certificates, run by ``generate()`` and its prefix constraint.

    It is the reference that tests and benchmarks compare ``Decoder`` with.

    Args:
        model: The generator, on any device.
        catalog: The items and their semantic IDs.
        code_token_start: As for ``Decoder``.
        normalize: As for ``Decoder``.

    Raises:
        UserError: If the model lacks a token of a code.
    """

    def __init__(
        self, model: PreTrainedModel, catalog: Catalog,
        code_token_start: TokenMap | CodeTokens | None = None, normalize: Normalize = "vocab",
    ) -> None:  # fmt: skip
        self.tokens = check_fit(model, catalog, code_token_start, normalize)
        self.code_token_start = self.tokens.start  # None for a token map
        self.model, self.catalog = model, catalog
        self.normalize = normalize
        self.root = dict_trie(self.tokens.of_codes(catalog.codes))
        self.lock = Lock()  # a search changes the model's configuration while it runs

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> Recommendations:
        """The ``beams`` best items that ``generate()`` finds for each prompt.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 at padding, which may be anywhere.
            beams: The number of beams and of results per prompt.

        Returns:
            Results [B, beams], best first; ``certified`` is 0.

        Raises:
            UserError: For more beams than items.
        """
        if beams > len(self.catalog):
            raise UserError(
                f"{beams} beams for {len(self.catalog)} items: generate() would return illegal items"
            )
        results = self._decode_leaves(input_ids, attention_mask, min(beams, self.catalog.num_ids))
        return expand_shared_ids(results, self.catalog, None, beams)

    def _decode_leaves(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> Recommendations:
        """The results of ``generate()``; ``items`` are what the trie's leaves hold."""
        device = self.model.device
        prompt = 1  # the decoder's start token
        if self.model.config.is_encoder_decoder:
            input_ids, attention_mask = pad_right(input_ids, attention_mask)
        else:
            input_ids, attention_mask = pad_left(input_ids, attention_mask)
            prompt = input_ids.shape[1]
        settings = GenerationConfig(
            do_sample=False, num_beams=beams, num_return_sequences=beams, early_stopping=False,
            max_new_tokens=self.catalog.levels, min_new_tokens=self.catalog.levels, output_scores=True,
            renormalize_logits=self.normalize == "valid", return_dict_in_generate=True,
            output_logits=beams == 1, **({} if beams == 1 else {"length_penalty": 0.0}),
        )  # fmt: skip
        with self.lock, plain_generation(self.model), evaluating(self.model):
            out: Any = cast(Any, self.model).generate(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device),
                generation_config=settings, logits_processor=self._processors(prompt, beams),
            )  # fmt: skip
        tokens = out.sequences[:, prompt:].cpu().reshape(len(input_ids), beams, -1)
        scores = self._greedy_scores(out, tokens) if beams == 1 else out.sequences_scores.cpu()
        return self._results(tokens, scores.reshape(len(input_ids), beams))

    def _processors(self, prompt: int, beams: int) -> LogitsProcessorList:
        """The trie's mask; for "level", the log-softmax over a level comes first, before the mask."""
        masked = PrefixConstrainedLogitsProcessor(self._allowed(prompt), beams)
        if self.normalize != "level":
            return LogitsProcessorList([masked])
        return LogitsProcessorList([LevelLogSoftmax(prompt, self.tokens.to(self.model.device)), masked])

    def _greedy_scores(self, out: Any, tokens: Tensor) -> Tensor:
        """Sums [B] for one beam: ``generate()`` then decodes greedily and returns no sums."""
        steps = [x.float().log_softmax(1) for x in out.logits] if self.normalize == "vocab" else out.scores
        chosen = [step.cpu().gather(1, tokens[:, :, level]) for level, step in enumerate(steps)]
        return torch.cat(chosen, dim=1).sum(1)

    def _allowed(self, prompt: int) -> Callable[[int, Tensor], list[int]]:
        def allowed(_: int, tokens: Tensor) -> list[int]:
            node = self.root
            for token in tokens[prompt:].tolist():
                node = node.get(token, {})
            return list(node) or [self.tokens.span.start]  # a finished beam: further tokens are cut off

        return allowed

    def _results(self, tokens: Tensor, scores: Tensor) -> Recommendations:
        codes = self.tokens.codes_of(tokens)  # [B, W, levels]
        nodes = self.catalog.trie.lookup(codes.reshape(-1, self.catalog.levels)).reshape(scores.shape)
        illegal = (nodes < 0) | ~scores.isfinite()
        items = self.catalog.trie.items(nodes.masked_fill(illegal, -1).flatten()).reshape(scores.shape)
        return Recommendations(
            items, scores.masked_fill(illegal, float("-inf")), codes.masked_fill(illegal[:, :, None], -1),
            torch.zeros(len(scores), dtype=torch.int64),
        )  # fmt: skip


class LevelLogSoftmax(LogitsProcessor):
    """Log-probabilities over the codes of the next level, for ``normalize="level"``."""

    def __init__(self, prompt: int, tokens: CodeTokens) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = input_ids.shape[1] - self.prompt
        out = torch.full_like(scores, float("-inf"))
        self.tokens.spread(level, self.tokens.columns(level, scores).log_softmax(1), out)
        return out


def dict_trie(rows: Tensor) -> Children:
    """A trie of nested dicts, the structure that most users of ``transformers`` build.

    Args:
        rows: Integers [N, levels].

    Returns:
        The children of the root, by token.
    """
    root: Children = {}
    for row in rows.tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root
