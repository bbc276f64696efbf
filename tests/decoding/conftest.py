"""Tiny random models of three families, with large weights so that scores differ, and a catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from cemg.decoding import Recommendations
from cemg.tokenizer import Catalog
from cemg_kernels.runtime.ranges import ranges_enabled, use_ranges

LEVELS, SIZE, START, VOCABULARY = (
    3,
    6,
    3,
    24,
)  # tokens 0 … 2 are special, 3 … 20 are codes, 21 … 23 are unused
Family = Literal["t5", "gpt2", "llama"]
FAMILIES: tuple[Family, ...] = ("t5", "gpt2", "llama")


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, a catalog of N items, and helpers that most tests need."""

    model: PreTrainedModel
    catalog: Catalog

    @property
    def seq2seq(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def prompts(self, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random prompts of these lengths, [B, S], padded on the right for an encoder, else on the left."""
        generator = torch.Generator().manual_seed(seed)
        longest = max(lengths)
        ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            place = slice(0, length) if self.seq2seq else slice(longest - length, longest)
            ids[row, place] = torch.randint(START, VOCABULARY - 3, (length,), generator=generator)
            mask[row, place] = 1
        return ids, mask

    @torch.no_grad()
    def log_probs(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced log-probabilities [n, LEVELS, V] after one prompt, along codes [n, LEVELS]."""
        tokens = codes + torch.arange(LEVELS) * SIZE + START  # [n, LEVELS]
        prompts = prompt.expand(len(codes), -1)
        if self.seq2seq:
            start = torch.full((len(codes), 1), self.model.config.decoder_start_token_id)
            logits = self.model(
                input_ids=prompts, decoder_input_ids=torch.cat((start, tokens[:, :-1]), dim=1)
            ).logits
        else:
            logits = self.model(input_ids=torch.cat((prompts, tokens[:, :-1]), dim=1)).logits[:, -LEVELS:]
        return logits.float().log_softmax(-1)

    def all_scores(self, prompt: Tensor, normalize: str) -> Tensor:
        """The score of every item by brute force, [N]; ``prompt`` [S] has no padding."""
        log_probs = self.log_probs(prompt, self.catalog.codes)  # [N, LEVELS, V]
        total = torch.zeros(len(self.catalog))
        rows = self.catalog.codes.tolist()
        for level in range(LEVELS):
            own = log_probs[:, level, START + level * SIZE : START + (level + 1) * SIZE]  # [N, SIZE]
            if normalize == "level":
                own = own.log_softmax(-1)
            if normalize == "valid":
                prefixes = {tuple(row[: level + 1]) for row in rows}
                legal = [[(*row[:level], code) in prefixes for code in range(SIZE)] for row in rows]
                own = own.masked_fill(~torch.tensor(legal), float("-inf")).log_softmax(-1)
            total += own.gather(1, self.catalog.codes[:, level : level + 1])[:, 0]
        return total


def make_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """Two layers of width 32, with weights ten times the usual size so that logits differ."""
    torch.manual_seed(seed)
    if family == "t5":
        model: PreTrainedModel = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
                eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
            )
        )  # fmt: skip
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0,
                bos_token_id=1, eos_token_id=1, tie_word_embeddings=False, initializer_range=0.2,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
                initializer_range=0.2,
            )
        )  # fmt: skip
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.normal_(0, 0.5)
    return model.eval()


def random_catalog(items: int, seed: int) -> Catalog:
    """``items`` different semantic IDs drawn from all 216, in random row order."""
    chosen = torch.randperm(SIZE**LEVELS, generator=torch.Generator().manual_seed(seed))[:items]
    codes = torch.stack([chosen // SIZE ** (LEVELS - 1 - level) % SIZE for level in range(LEVELS)], dim=1)
    return Catalog.from_codes(codes, SIZE)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Searches run step by step, as with named ranges, and not in one C++ call."""
    before = ranges_enabled()
    use_ranges(True)
    try:
        yield
    finally:
        use_ranges(before)


@pytest.fixture(scope="session")
def bench() -> Callable[[Family, int], Bench]:
    """``bench(family, items)``: a model, created once per session, and a catalog of that many items."""
    models: dict[str, PreTrainedModel] = {}

    def make(family: Family, items: int = 60, seed: int = 0) -> Bench:
        if family not in models:
            models[family] = make_model(family)
        return Bench(models[family], random_catalog(items, seed))

    return make


@pytest.fixture(scope="session")
def same_lists() -> Callable[[Recommendations, Recommendations], None]:
    """Asserts that two results agree: scores within 1e-4, and the order if scores differ by more.

    1e-4: both sum float32 log-probabilities of size < 32 whose rounding error is 32 * 2**-24 = 2e-6 each;
    the layers' sums of 64 terms in another order add ten times that.
    """

    def check(mine: Recommendations, other: Recommendations) -> None:
        assert mine.items.shape == other.items.shape
        live = other.items >= 0
        assert torch.equal(mine.items >= 0, live)
        torch.testing.assert_close(mine.scores[live], other.scores[live], rtol=0, atol=1e-4)
        for row in range(len(mine.items)):
            _same_row(mine, other, row, int(live[row].sum()))

    return check


def _same_row(mine: Recommendations, other: Recommendations, row: int, count: int) -> None:
    scores = other.scores[row, :count].tolist()
    for place in range(count):
        apart = all(abs(scores[place] - s) > 1e-4 for i, s in enumerate(scores) if i != place)
        at_the_edge = count == mine.items.shape[1] and abs(scores[place] - scores[-1]) <= 1e-4
        if apart or (place == count - 1 and not at_the_edge):
            assert int(mine.items[row, place]) == int(other.items[row, place])
    ties = {
        i for i, s in zip(other.items[row, :count].tolist(), scores, strict=True) if s - scores[-1] > 1e-4
    }
    assert ties <= set(mine.items[row, :count].tolist())
