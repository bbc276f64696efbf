"""The data of a search: prompts, beams and recommendations.

B users, W beams, S prompt tokens, M levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cemg.errors import UserError
from cemg_kernels import ItemFilter, RequestFilter, Trie
from cemg_kernels.constrained.beam_step import BeamStep, MixedStep

Filter = ItemFilter | RequestFilter
MAX_BEAMS = 100_000  # per prompt; every tensor of a search has one row per beam
MARGIN = 1e-4  # a result is certified if it beats every pruned score by more than this


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The results of a search, best first.

    Attributes:
        items: int64 [B, top], catalog rows or integer item ids; -1 past the last item.
        scores: float32 [B, top], sums of log-probabilities, or scores of the mixture with a prior; -inf past
            the last item.
        codes: int64 [B, top, M], the semantic IDs; -1 past the last item.
        certified: int64 [B], the number of leading results that are proven to be the true top.
        ids: B lists of ``top`` item ids, None past the last item. Set by ``Recommender``, else empty.
        titles: B lists of ``top`` titles, None where there is none. Set by ``Recommender``, else empty.
        ranked_by: What ranked each list: B of "generator", "mixture" and "popularity". Set by
            ``Recommender``, else empty.
        shares: What the probability of each item is from: float64 [B, top] by "generator" and by source
            ("memory", "softmax", "dense", "popularity", or "prior" for that of the caller). They sum to 1,
            and are 0 past the last item. Set by ``Recommender`` if it is called with ``shares=True``.
    """

    items: Tensor
    scores: Tensor
    codes: Tensor
    certified: Tensor
    ids: list[list[int | str | None]] = field(default_factory=list, kw_only=True)
    titles: list[list[str | None]] = field(default_factory=list, kw_only=True)
    ranked_by: list[str] = field(default_factory=list, kw_only=True)
    shares: dict[str, Tensor] | None = field(default=None, kw_only=True)

    @classmethod
    def empty(cls, top: int, levels: int) -> Recommendations:
        """The results of a batch without users."""
        items = torch.empty(0, top, dtype=torch.int64)
        codes = torch.empty(0, top, levels, dtype=torch.int64)
        return cls(items, items.float(), codes, torch.empty(0, dtype=torch.int64))

    def without(self, histories: Sequence[Sequence[int]]) -> Recommendations:
        """The lists without the ``items`` of each of B histories; ``certified`` counts the remaining ones."""
        keep = torch.stack(
            [
                ~torch.isin(row, torch.tensor(list(own), dtype=row.dtype))
                for row, own in zip(self.items, histories, strict=True)
            ]
        ) & (self.items >= 0)  # [B, top]
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)  # kept ones first, in their order
        gone = ~keep.gather(1, order)
        lead = torch.arange(keep.shape[1])[None] < self.certified[:, None]
        return Recommendations(
            self.items.gather(1, order).masked_fill(gone, -1),
            self.scores.gather(1, order).masked_fill(gone, float("-inf")),
            self.codes.gather(1, order[:, :, None].expand_as(self.codes)).masked_fill(gone[:, :, None], -1),
            (keep & lead).sum(1),
        )

    @classmethod
    def of_leaves(
        cls, trie: Trie, scores: Tensor, leaves: Tensor, codes: Tensor, pruned: Tensor
    ) -> Recommendations:
        """The results of a finished search, on its device.

        Args:
            trie: The trie that was searched.
            scores: float32 [B, W], best first.
            leaves: int32 [B, W], nodes of the trie; -1 for dead beams.
            codes: int64 [B, W, M].
            pruned: float32 [B], the best score that the search pruned.
        """
        alive = leaves >= 0
        certified = (scores > pruned[:, None] + MARGIN) & alive  # scores descend, so these lead their row
        items = trie.items(leaves.flatten()).reshape(leaves.shape)
        return cls(items, scores, codes.masked_fill(~alive[:, :, None], -1), certified.sum(1))

    def top(self, count: int) -> Recommendations:
        """The first ``count`` results of each row, without ids and titles."""
        items, scores, codes = (part[:, :count] for part in (self.items, self.scores, self.codes))
        return Recommendations(items, scores, codes, self.certified.clamp_max(count))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``items``, ``scores``, ``codes`` and ``certified``."""
        return self.items, self.scores, self.codes, self.certified

    def cpu(self) -> Recommendations:
        """The same results on the CPU. From a GPU, all tensors are copied with one synchronization."""
        if not self.items.is_cuda:
            return Recommendations(*(part.cpu() for part in self.tensors()))
        pinned = [torch.empty_like(part, device="cpu", pin_memory=True) for part in self.tensors()]
        for target, part in zip(pinned, self.tensors(), strict=True):
            target.copy_(part, non_blocking=True)
        torch.cuda.current_stream(self.items.device).synchronize()
        return Recommendations(*(part.clone() for part in pinned))  # the pinned memory is used again

    def padded(self, count: int) -> Recommendations:
        """At least ``count`` entries per row; the added ones have no item."""
        missing = max(count - self.items.shape[1], 0)
        pad = torch.nn.functional.pad
        items = pad(self.items, (0, missing), value=-1)
        scores = pad(self.scores, (0, missing), value=float("-inf"))
        return Recommendations(items, scores, pad(self.codes, (0, 0, 0, missing), value=-1), self.certified)


@dataclass(slots=True)
class Beams:
    """The prefixes that a search keeps, best first.

    ``scores`` [B, W]; ``nodes`` [B, W] of the trie, -1 for dead beams; ``codes`` [B, W, m] so
    far; ``parents`` [B, W], the beams that they extend; ``pruned`` [B], the best score pruned so far. With a
    prior these are scores of the mixture, and ``generator_scores`` [B, W] the generator's own.
    """

    scores: Tensor
    nodes: Tensor
    codes: Tensor
    parents: Tensor
    pruned: Tensor
    generator_scores: Tensor

    @classmethod
    def at_root(cls, batch: int, device: torch.device) -> Beams:
        """One empty prefix per user."""
        scores = torch.zeros(batch, 1, device=device)
        return cls(
            scores=scores,
            generator_scores=scores,
            nodes=torch.zeros(batch, 1, dtype=torch.int32, device=device),  # node 0 is the root
            codes=torch.empty(batch, 1, 0, dtype=torch.int64, device=device),
            parents=torch.zeros(batch, 1, dtype=torch.int64, device=device),
            pruned=torch.full((batch,), float("-inf"), device=device),
        )

    def extend(self, step: BeamStep | MixedStep) -> None:
        """Extend the prefixes by one code."""
        self.scores, self.parents, codes, self.nodes, pruned = step[:5]
        self.generator_scores = step.generator_scores if isinstance(step, MixedStep) else step.scores
        parents = self.parents[:, :, None].expand(-1, -1, self.codes.shape[2])
        self.codes = torch.cat((self.codes.gather(1, parents), codes[:, :, None]), dim=2)
        self.pruned = torch.maximum(self.pruned, pruned)

    def prune_below(self, threshold: Tensor) -> None:
        """Keep only prefixes that score at least ``threshold`` [B]."""
        alive = self.scores >= threshold[:, None]  # scores descend, so these lead their row
        best_below = self.scores.masked_fill(alive, float("-inf")).amax(1)
        self.pruned = torch.maximum(self.pruned, best_below)
        count = max(int(alive.sum(1).max()), 1)
        self.scores = self.scores.masked_fill(~alive, float("-inf"))[:, :count]
        self.nodes = self.nodes.masked_fill(~alive, -1)[:, :count]
        self.parents, self.codes = self.parents[:, :count], self.codes[:, :count]
        self.generator_scores = self.generator_scores[:, :count]

    def results(self, trie: Trie) -> Recommendations:
        """The items at the leaves that the search reached."""
        return Recommendations.of_leaves(trie, self.scores, self.nodes, self.codes, self.pruned)


def check_beams(beams: int) -> None:
    """Raises UserError unless 1 <= ``beams`` <= MAX_BEAMS."""
    if not 1 <= beams <= MAX_BEAMS:
        raise UserError(f"beams must be within 1 … {MAX_BEAMS:,}, got {beams:,}")


def check_prompts(
    input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None = None
) -> None:
    """Check prompts before a search.

    Raises:
        UserError: For a number of beams out of range, for prompts and mask of different shapes, for a filter
            of another number of requests, and on the CPU for a prompt without tokens.
    """
    check_beams(beams)
    if input_ids.shape != attention_mask.shape or input_ids.ndim != 2:
        shapes = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        raise UserError(f"input_ids and attention_mask must have one shape [B, S], got {shapes}")
    if isinstance(filter, RequestFilter) and filter.num_requests != len(input_ids):
        raise UserError(f"a filter of {filter.num_requests} requests for {len(input_ids)} prompts")
    if attention_mask.device.type == "cpu" and not bool(attention_mask.any(1).all()):
        row = int((~attention_mask.bool().any(1)).nonzero()[0])
        raise UserError(f"prompt {row} has no tokens", fix="leave it out, or give it a history")


def token_count(mask: Tensor) -> int | None:
    """The number of tokens in a mask [B, S]; None on a GPU, to avoid a synchronization."""
    return int((mask != 0).sum()) if mask.device.type == "cpu" else None


def trim_padding(input_ids: Tensor, attention_mask: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Prompts [B, S] as every path reads them, without columns that hold no token.

    With ``causal``, for decoder-only models, padding moves to the left. For an encoder it moves to the right,
    so that tokens have the positions that they have in a prompt alone. Results do not depend on where the
    padding was. On a GPU no column is dropped, to avoid a synchronization.
    """
    pad = pad_left if causal else pad_right
    if attention_mask.device.type != "cpu":
        return pad(input_ids, attention_mask)
    is_token = (attention_mask != 0).numpy()  # at this size NumPy's calls cost a fraction of torch's
    if np.count_nonzero(is_token) == is_token.size:
        return input_ids, attention_mask
    before, after = (is_token[:, :-1], is_token[:, 1:]) if causal else (is_token[:, 1:], is_token[:, :-1])
    if np.count_nonzero(before > after):
        input_ids, attention_mask = pad(input_ids, attention_mask)
        is_token = (attention_mask != 0).numpy()
    if np.count_nonzero(is_token[:, 0]) and np.count_nonzero(is_token[:, -1]):
        return input_ids, attention_mask
    used = attention_mask.any(0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return input_ids[:, columns], attention_mask[:, columns]


def pad_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same prompts [B, S] with their padding on the left; tokens keep their order."""
    return _sort_padding(input_ids, attention_mask, tokens_first=False)


def pad_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same prompts [B, S] with their padding on the right; tokens keep their order."""
    return _sort_padding(input_ids, attention_mask, tokens_first=True)


def _sort_padding(input_ids: Tensor, attention_mask: Tensor, *, tokens_first: bool) -> tuple[Tensor, Tensor]:
    order = (attention_mask != 0).byte().argsort(dim=1, stable=True, descending=tokens_first)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
