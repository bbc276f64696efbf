"""What a search goes through and what it returns: prompts, beams, recommendations.

B users, W beams, S prompt tokens, M levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cemg.errors import UserError
from cemg_kernels import ItemFilter, RequestFilter, Trie
from cemg_kernels.constrained.beam_step import BeamStep

Filter = ItemFilter | RequestFilter
MAX_BEAMS = 100_000  # per prompt; every tensor of a search has a row per beam
MARGIN = 1e-4  # a result is certified where it beats everything pruned by this much


@dataclass(frozen=True, slots=True)
class Recommendations:
    """Best first. ``items`` [B, top] int64 (−1: none), ``scores`` [B, top] float32 (−inf), ``codes``
    [B, top, M] int64 (−1), ``certified`` [B]: how many leading results are proven to be the true top.
    ``ids`` and ``titles``, B lists of ``top``, are filled by a ``Recommender``, with None where there is no
    item or no title; a ``Decoder`` leaves them empty.
    """

    items: Tensor
    scores: Tensor
    codes: Tensor
    certified: Tensor
    ids: list[list[int | str | None]] = field(default_factory=list, kw_only=True)
    titles: list[list[str | None]] = field(default_factory=list, kw_only=True)

    @classmethod
    def of_nobody(cls, top: int, levels: int) -> Recommendations:
        """For no user at all."""
        whole = torch.empty(0, top, dtype=torch.int64)
        codes = torch.empty(0, top, levels, dtype=torch.int64)
        return cls(whole, whole.float(), codes, torch.empty(0, dtype=torch.int64))

    @classmethod
    def of_leaves(
        cls, trie: Trie, scores: Tensor, leaves: Tensor, codes: Tensor, pruned: Tensor
    ) -> Recommendations:
        """Of what a search ended on, best first: ``scores`` [B, W], ``leaves`` [B, W] of the trie (-1: none),
        their ``codes`` [B, W, M], and the best score [B] that it ever cut; where they lie."""
        live = leaves >= 0
        proven = (scores > pruned[:, None] + MARGIN) & live  # sorted: they lead
        items = trie.items(leaves.flatten()).reshape(leaves.shape)
        return cls(items, scores, codes.masked_fill(~live[:, :, None], -1), proven.sum(1))

    def top(self, count: int) -> Recommendations:
        """The first ``count`` results of each row."""
        first = (self.items[:, :count], self.scores[:, :count], self.codes[:, :count])
        return Recommendations(*first, self.certified.clamp_max(count))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors, in their order."""
        return self.items, self.scores, self.codes, self.certified

    def cpu(self) -> Recommendations:
        """The same on the CPU; from a GPU all parts at once, which is waited for once."""
        if not self.items.is_cuda:
            return Recommendations(*(part.cpu() for part in self.parts()))
        pinned = [torch.empty_like(part, device="cpu", pin_memory=True) for part in self.parts()]
        for place, part in zip(pinned, self.parts(), strict=True):
            place.copy_(part, non_blocking=True)
        torch.cuda.current_stream(self.items.device).synchronize()
        return Recommendations(*(place.clone() for place in pinned))  # pinned memory is for the next

    def padded(self, count: int) -> Recommendations:
        """At least ``count`` places a row, the last ones without an item."""
        more = max(count - self.items.shape[1], 0)
        pad = torch.nn.functional.pad
        items, scores = pad(self.items, (0, more), value=-1), pad(self.scores, (0, more), value=float("-inf"))
        return Recommendations(items, scores, pad(self.codes, (0, 0, 0, more), value=-1), self.certified)


@dataclass(slots=True)
class Beams:
    """The living prefixes of a search, best first: ``scores`` [B, W], ``nodes`` [B, W] of the trie (-1:
    none), ``codes`` [B, W, m] so far, ``parents`` [B, W] that they grew from, ``pruned`` [B] the best score
    that was cut."""

    scores: Tensor
    nodes: Tensor
    codes: Tensor
    parents: Tensor
    pruned: Tensor

    @classmethod
    def at_the_root(cls, batch: int, device: torch.device) -> Beams:
        """One empty prefix a user."""
        return cls(
            torch.zeros(batch, 1, device=device),
            torch.zeros(batch, 1, dtype=torch.int32, device=device),  # the root
            torch.empty(batch, 1, 0, dtype=torch.int64, device=device),
            torch.zeros(batch, 1, dtype=torch.int64, device=device),
            torch.full((batch,), float("-inf"), device=device),
        )

    def grow(self, step: BeamStep) -> None:
        """By one code."""
        self.scores, self.parents, codes, self.nodes, cut = step
        grown_from = self.parents[:, :, None].expand(-1, -1, self.codes.shape[2])
        self.codes = torch.cat((self.codes.gather(1, grown_from), codes[:, :, None]), dim=2)
        self.pruned = torch.maximum(self.pruned, cut)

    def drop_below(self, floor: Tensor) -> None:
        """Only prefixes that score ``floor`` [B] or more live on."""
        alive = self.scores >= floor[:, None]  # the leading ones
        below = self.scores.masked_fill(alive, float("-inf")).amax(1)
        self.pruned = torch.maximum(self.pruned, below)
        count = max(int(alive.sum(1).max()), 1)
        self.scores = self.scores.masked_fill(~alive, float("-inf"))[:, :count]
        self.nodes = self.nodes.masked_fill(~alive, -1)[:, :count]
        self.parents, self.codes = self.parents[:, :count], self.codes[:, :count]

    def results(self, trie: Trie) -> Recommendations:
        """The items at the leaves that the search ended on."""
        return Recommendations.of_leaves(trie, self.scores, self.nodes, self.codes, self.pruned)


def check_beams(beams: int) -> None:
    """UserError for fewer beams than one, and for more than MAX_BEAMS."""
    if not 1 <= beams <= MAX_BEAMS:
        raise UserError(f"beams must be within 1 … {MAX_BEAMS:,}, got {beams:,}")


def check_prompts(
    input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None = None
) -> None:
    """UserError for fewer beams than one, for shapes that differ, for a filter of other requests, and on the
    CPU for a prompt without a token."""
    check_beams(beams)
    if input_ids.shape != attention_mask.shape or input_ids.ndim != 2:
        shapes = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        raise UserError(f"input_ids and attention_mask must be [B, S] alike, got {shapes}")
    if isinstance(filter, RequestFilter) and filter.num_requests != len(input_ids):
        raise UserError(f"a filter of {filter.num_requests} requests for {len(input_ids)} prompts")
    if attention_mask.device.type == "cpu" and not bool(attention_mask.any(1).all()):
        row = int((~attention_mask.bool().any(1)).nonzero()[0])
        raise UserError(f"prompt {row} holds no token", fix="leave it out, or give it a history")


def token_count(mask: Tensor) -> int | None:
    """How many tokens a mask [B, S] has; None where it lies on a GPU, which would have to be waited for."""
    return int((mask != 0).sum()) if mask.device.type == "cpu" else None


def trimmed(input_ids: Tensor, attention_mask: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Prompts [B, S] as every path reads them, without the columns that hold no token.

    ``causal``: prompts of a decoder-only model, whose padding is moved to the left; an encoder's is moved to
    the right, so that its tokens have the positions of a prompt alone. The answer does not depend on where
    the padding was. On a GPU, which would have to be waited for, no column is cut off.
    """
    pad = left_padded if causal else right_padded
    if attention_mask.device.type != "cpu":
        return pad(input_ids, attention_mask)
    held = (attention_mask != 0).numpy()  # NumPy's calls cost a fraction of torch's at this size
    if np.count_nonzero(held) == held.size:
        return input_ids, attention_mask
    before, after = (held[:, :-1], held[:, 1:]) if causal else (held[:, 1:], held[:, :-1])
    if np.count_nonzero(before > after):
        input_ids, attention_mask = pad(input_ids, attention_mask)
        held = (attention_mask != 0).numpy()
    if np.count_nonzero(held[:, 0]) and np.count_nonzero(held[:, -1]):
        return input_ids, attention_mask
    used = attention_mask.any(0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return input_ids[:, columns], attention_mask[:, columns]


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same prompts [B, S] with each one's tokens at the right end, in their order."""
    return _moved(input_ids, attention_mask, first=False)


def right_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same prompts [B, S] with each one's tokens at the left end, in their order."""
    return _moved(input_ids, attention_mask, first=True)


def _moved(input_ids: Tensor, attention_mask: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    order = (attention_mask != 0).byte().argsort(dim=1, stable=True, descending=first)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
