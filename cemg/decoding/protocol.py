"""The interface between the search and a model: a plan per model, a state per batch, logits per step.

B users, W beams, S prompt tokens, K codes per level, V vocabulary, M levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from cemg.decoding.timings import Stage
from cemg.errors import UserError
from cemg_kernels.attention.logsumexp import row_logsumexp
from cemg_kernels.constrained.prior import PriorTensors
from cemg_kernels.constrained.softmax import Normalize
from cemg_kernels.trie.arrays import TrieArrays
from cemg_kernels.trie.filter_tensors import FilterTensors


class Unsupported(Exception):
    """A plan cannot run this model; the message says why."""


class LogitsRequest(NamedTuple):
    """The logits that a step returns.

    ``num_codes`` columns from token ``first_token`` on; with ``logsumexp``, also the log-sum-exp over the
    vocabulary. ``tokens`` [num_codes] int64 replaces ``first_token`` where the codes' tokens are not
    consecutive; -1 gives a column of -inf. ``rows`` [B, W] bool: the beams whose logits are needed, None for
    all. The logits of other beams are arbitrary finite numbers, and no later beam may extend them.
    """

    first_token: int
    num_codes: int
    logsumexp: bool
    rows: Tensor | None = None
    tokens: Tensor | None = None

    def columns_of(self, logits: Tensor) -> Tensor:
        """The columns [..., num_codes] of logits [..., V]."""
        if self.tokens is None:
            return logits[..., self.first_token : self.first_token + self.num_codes]
        return logits[..., self.tokens.clamp_min(0)].masked_fill(self.tokens < 0, float("-inf"))


class Logits(NamedTuple):
    """``values`` [B, W, K] float32 and, if requested, ``logsumexp`` [B, W] float32 over the vocabulary."""

    values: Tensor
    logsumexp: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, request: LogitsRequest) -> Logits:
        """The requested part of logits [B, W, V]."""
        total = row_logsumexp(logits.flatten(0, 1)).view(logits.shape[:2]) if request.logsumexp else None
        return cls(request.columns_of(logits).float().contiguous(), total)

    def scatter(self, rows: Tensor) -> Logits:
        """Logits of the rows where ``rows`` [B, W] is true, moved to their positions; 0 elsewhere."""

        def scatter(part: Tensor) -> Tensor:
            return part.new_zeros(rows.shape + part.shape[1:]).masked_scatter_(
                rows.view(rows.shape + (1,) * (part.ndim - 1)), part
            )

        return Logits(scatter(self.values), None if self.logsumexp is None else scatter(self.logsumexp))


class DecoderState(Protocol):
    """The KV cache of one batch: logits after the prompts, then after each decode step."""

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        """Logits [B, 1, K] after prompts [B, S].

        ``num_tokens`` is an upper bound on the tokens of all prompts, so that padding need not be computed.
        It is None where only a GPU knows the count; states that compute padding ignore it.
        """
        ...

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        """Logits [B, W, K] after ``tokens`` [B, W], which extend the previous beams ``parents`` [B, W]."""
        ...

    def reset_to_prefill(self) -> None:
        """Drop all decode steps; the next one is the first after the same prompts."""
        ...


class SearchTimings(NamedTuple):
    """Seconds of the prefill, all decode steps and all selections, and the number of rows in these steps."""

    prefill: float
    decode_steps: float
    selection: float
    rows: int

    def by_stage(self) -> dict[Stage, float]:
        """The seconds, for ``record_timings``."""
        return {"prefill": self.prefill, "decode_steps": self.decode_steps, "selection": self.selection}


class SearchOutput(NamedTuple):
    """``scores`` [B, W], ``leaves`` [B, W], ``codes`` [B, W, M], best first; ``pruned`` [B]: the best score
    that was pruned; ``timings`` of the search."""

    scores: Tensor
    leaves: Tensor
    codes: Tensor
    pruned: Tensor
    timings: SearchTimings


class DecoderPlan(Protocol):
    """A model, arranged for decoding: its weights, and what the engine may do with them.

    Plans read weights when they are built. After further training, build a new plan.
    """

    uses_model_forward: ClassVar[bool] = False  # runs the model's own forward, not a reimplementation
    steps_in_torch: ClassVar[bool] = False  # PyTorch steps of our own: skip padding, fit a CUDA graph
    searches_in_one_call: ClassVar[bool] = False  # has a ``beam_search``
    max_tokens: int | None = None  # bound of the learned positions on a sequence; None: no known bound

    def describe(self) -> str:
        """The path in words, for ``Decoder.path``."""
        ...

    def new_state(self) -> DecoderState:
        """A state for one batch."""
        ...

    def fits(self, tokens: int) -> bool:
        """Whether the model has a position for each of so many tokens."""
        return self.max_tokens is None or tokens <= self.max_tokens

    def check_fits(self, tokens: int) -> None:
        """Raises UserError where it does not."""
        if not self.fits(tokens):
            raise UserError(
                f"{tokens} tokens do not fit the model's {self.max_tokens} positions",
                fix="cut the histories",
            )

    def beam_search(
        self, input_ids: Tensor, attention_mask: Tensor, *, beams: int, trie: TrieArrays,
        filter: FilterTensors | None, normalize: Normalize, requests: Sequence[LogitsRequest],
        code_tokens: Tensor | None = None, prior: PriorTensors | None = None,
    ) -> SearchOutput:  # fmt: skip
        """A whole search over prompts [B, S] in one call, where ``searches_in_one_call``.

        ``requests``: one per level. ``code_tokens`` [M, K] int64 where tokens of codes are not consecutive.
        """
        raise Unsupported(f"{self.describe()} has no search in one call")
