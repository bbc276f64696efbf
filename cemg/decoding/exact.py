"""The score of every item: the whole catalog through the trie, each shared prefix once.

The prefixes of m codes are fed as the beams of step m, all of a level at once. A chunk is a run of ranks:
on every level its nodes are consecutive, so a chunk of n ranks holds n rows at most, whatever the trie.

B users, N items, n ranks of a chunk, P prefixes of a level in it, F of them fed, K codes a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cemg.decoding.beams import check_prompts, token_count
from cemg.decoding.engine import Decoder
from cemg.decoding.models.generic import GenericPlan
from cemg.decoding.models.layers import DecoderState, Logits
from cemg.decoding.models.rows import RowsPlan
from cemg.errors import UserError
from cemg_kernels import trie_softmax

ROWS = 4096  # prefixes times users that are held at once
GENERIC_ROWS = 512  # for a plan whose rows attend to all earlier rows under a mask, or keep a cache each


class Prefixes(NamedTuple):
    """The P different prefixes of one length in a chunk, by rank.

    ``nodes`` [P] int32, ``codes`` [P] their last codes, ``parents`` [P] the prefixes they extend, by place;
    ``of_rank`` [n] which of them each rank has; ``feeds`` [P] whether the model is asked what follows.
    """

    nodes: Tensor
    codes: Tensor
    parents: Tensor
    of_rank: Tensor
    feeds: Tensor


@torch.inference_mode()
def score_all(
    decoder: Decoder, input_ids: Tensor, attention_mask: Tensor, *, rows: int | None = None
) -> Tensor:
    """Scores [B, N] float32, by catalog row, of all items after prompts [B, S]: the exact ranking.

    The sums of log-probabilities that ``decoder.decode`` would give them with a beam for every item, up to
    rounding. ``rows`` bounds the prefixes times users that are held at once: a user's items are cut in
    chunks only where they are more. With normalize="valid" a prefix of one item is not fed: what follows it
    is certain. Raises UserError for fewer rows than one, and as ``decode`` does for prompts.
    """
    if rows is None:
        rows = GENERIC_ROWS if isinstance(decoder.plan, (GenericPlan, RowsPlan)) else ROWS
    if rows < 1:
        raise UserError(f"rows must be at least 1, got {rows}")
    check_prompts(input_ids, attention_mask, 1)
    if len(input_ids):
        decoder.check_positions(attention_mask)
    trie = decoder.trie
    users = max(1, rows // trie.num_items)
    codes = trie.codes_by_rank().long()  # [N, levels]
    scores = torch.empty(len(input_ids), len(codes), device=trie.device)
    for begin in range(0, len(input_ids), users):
        group = torch.arange(begin, min(begin + users, len(input_ids)))
        ids, mask = decoder.trimmed(input_ids[group], attention_mask[group])
        prompts = ids.to(trie.device), mask.to(trie.device)
        chunks = codes.split(max(1, rows // len(group)))
        parts = list(_score_runs(decoder, prompts, token_count(mask), chunks))
        scores[group[:, None].to(trie.device), trie.rows.long()] = torch.cat(parts, dim=1)
    found, shared = scores.cpu(), decoder.catalog.shared
    return found if shared is None else found[:, shared.leaf_of]


def _score_runs(
    decoder: Decoder, prompts: tuple[Tensor, Tensor], num_tokens: int | None, chunks: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Scores [B, n] of each chunk's consecutive ranks, their codes [n, levels]; the prompts are read once."""
    state = decoder.plan.new_state()
    first = state.prefill(*prompts, decoder.logits_request(0), num_tokens)
    for number, codes in enumerate(chunks):
        if number > 0:
            state.reset_to_prefill()
        yield _score_run(decoder, state, first, codes)


def _score_run(decoder: Decoder, state: DecoderState, first: Logits, codes: Tensor) -> Tensor:
    """Scores [B, n] of the consecutive ranks with ``codes`` [n, levels]; ``first`` follow the prompts."""
    logits: Logits | None = first
    before = _prefixes(decoder, codes, 0, None)
    row = before.of_rank[:1]  # [P] the row of each prefix before, −1 where it was not fed
    scores = torch.zeros(len(first.values), 1, device=codes.device)  # [B, P]
    for level in range(1, codes.shape[1] + 1):
        after = _prefixes(decoder, codes, level, before)
        scores = scores[:, after.parents]
        if logits is not None:
            scores = scores + _grown(decoder, logits, before.nodes[row >= 0], row[after.parents], after.codes)
        fed = after.feeds.nonzero()[:, 0]  # [F]
        parents, row = row[after.parents[fed]], torch.where(after.feeds, after.feeds.cumsum(0) - 1, -1)
        logits = None
        if level < codes.shape[1] and len(fed):
            tokens = decoder.tokens.of_level(level - 1, after.codes[fed])
            each = len(scores), len(fed)
            request = decoder.logits_request(level)
            logits = state.decode_step(tokens.expand(each), parents.expand(each), request)
        before = after
    return scores


def _grown(decoder: Decoder, logits: Logits, nodes: Tensor, row: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities [B, P] of ``codes`` [P] after the rows ``row`` [P]; 0, certain, where that is −1.

    ``logits`` are of the F rows at ``nodes`` [F].
    """
    users, total = len(logits.values), logits.logsumexp
    log_prob = trie_softmax(
        logits.values.flatten(0, 1), nodes.repeat(users), decoder.trie, decoder.normalize,
        None if total is None else total.flatten(),
    ).view_as(logits.values)  # fmt: skip
    return log_prob[:, row.clamp_min(0), codes].masked_fill(row < 0, 0.0)


def _prefixes(decoder: Decoder, codes: Tensor, length: int, shorter: Prefixes | None) -> Prefixes:
    """The prefixes of ``length`` codes of consecutive ranks, ``codes`` [n, levels]."""
    nodes = decoder.trie.lookup(codes[:, :length])  # [n], ascending
    new = nodes.diff(prepend=nodes[:1] - 1) > 0
    first = new.nonzero()[:, 0]  # [P] the first rank of each
    nodes = nodes[first]
    below = decoder.trie.interval(nodes)
    several = below[:, 1] - below[:, 0] > 1
    feeds = several if decoder.normalize == "valid" else torch.ones_like(several)
    last = codes[first, length - 1] if length else torch.zeros_like(first)
    parents = torch.zeros_like(first) if shorter is None else shorter.of_rank[first]
    return Prefixes(nodes, last, parents, new.cumsum(0) - 1, feeds)
