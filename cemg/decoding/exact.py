"""The exact ranking: the score of every item, with each shared prefix computed once.

The prefixes of m codes are the beams of decode step m, all of a level at once. Items are processed in chunks
of consecutive ranks, the order of the trie. The nodes of a chunk are consecutive on every level, so a chunk
of n ranks has at most n rows per level.

B users, N items, n ranks of a chunk, P prefixes of one length in a chunk, F of them computed, K codes per
level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cemg.decoding.beams import Filter, check_prompts, token_count
from cemg.decoding.engine import Decoder
from cemg.decoding.priors import PRIOR_WEIGHT
from cemg.decoding.protocol import DecoderState, Logits
from cemg.decoding.shared_ids import leaf_filter
from cemg.errors import UserError
from cemg.tokenizer import SharedFilter
from cemg.tokenizer.shared import SharedIds
from cemg_kernels import ItemPrior, RequestFilter, Trie, trie_softmax
from cemg_kernels.constrained.prior import mixed_scores

ROWS = 4096  # prefixes times users held at once
MODEL_FORWARD_ROWS = 512  # for the model's own forward, where masks and caches take more memory per row


class Prefixes(NamedTuple):
    """The P different prefixes of one length in a chunk, by rank.

    ``nodes`` [P] int32; ``codes`` [P], their last codes; ``parents`` [P], the indices of the prefixes that
    they extend; ``of_rank`` [n], the prefix of each rank; ``computed`` [P] bool, whether the model computes
    the next codes.
    """

    nodes: Tensor
    codes: Tensor
    parents: Tensor
    of_rank: Tensor
    computed: Tensor


@torch.inference_mode()
def score_all(
    decoder: Decoder, input_ids: Tensor, attention_mask: Tensor, *, rows: int | None = None,
    filter: Filter | SharedFilter | None = None, prior: ItemPrior | None = None,
    prior_weight: float | Sequence[float] = PRIOR_WEIGHT,
) -> Tensor:  # fmt: skip
    """The scores of all items after each prompt: the exact ranking.

    Equal, up to rounding, to the scores that ``decoder.decode`` returns with one beam per item. Under
    ``normalize="valid"``, a prefix with one item below is not computed: its further codes have the
    log-probability 0.

    Args:
        decoder: The model and its catalog.
        input_ids: Integers [B, S].
        attention_mask: [B, S], 0 at padding.
        rows: The largest number of prefixes times users held at once. None: 4096, or 512 for a model that
            runs its own forward.
        filter: As for ``decode``; items that do not pass have the score -inf.
        prior: As for ``decode``; the scores are then those of the mixture.
        prior_weight: As for ``decode``.

    Returns:
        float32 [B, N], by catalog row.

    Raises:
        UserError: For fewer than one row, and for prompts, filters and priors as ``decode`` does.
    """
    if rows is None:
        rows = MODEL_FORWARD_ROWS if decoder.plan.uses_model_forward else ROWS
    if rows < 1:
        raise UserError(f"rows must be at least 1, got {rows}")
    trie = decoder.trie
    leaves = leaf_filter(filter, decoder.catalog, trie)
    check_prompts(input_ids, attention_mask, 1, leaves)
    if len(input_ids):
        decoder.check_positions(attention_mask)
    masses = decoder.prior_tensors(prior, prior_weight, filter, len(input_ids))
    users = max(1, rows // trie.num_items)
    codes = trie.codes_by_rank().long()  # [N, levels]
    by_row = torch.empty(len(input_ids), len(codes), device=trie.device)
    for begin in range(0, len(input_ids), users):
        group = torch.arange(begin, min(begin + users, len(input_ids)))
        ids, mask = decoder.trim_padding(input_ids[group], attention_mask[group])
        prompts = ids.to(trie.device), mask.to(trie.device)
        chunks = codes.split(max(1, rows // len(group)))
        on_device = group.to(trie.device)
        own = leaves.select(on_device) if isinstance(leaves, RequestFilter) else leaves
        scores = torch.cat(list(_score_chunks(decoder, prompts, token_count(mask), chunks, own)), dim=1)
        if own is not None:
            scores = scores.masked_fill(~_allowed_ranks(trie, own, len(group)), float("-inf"))
        if masses is not None:
            share = masses.select(on_device)
            scores = mixed_scores(scores, share.by_rank(trie.num_items), share.weight)
        by_row[on_device[:, None], trie.rows.long()] = scores
    return _of_items(by_row.cpu(), decoder.catalog.shared, filter)


def _allowed_ranks(trie: Trie, filter: Filter, users: int) -> Tensor:
    """Which items pass a filter, by rank: bool [B, N]."""
    leaves = torch.arange(trie.arrays.num_inner, trie.num_nodes, device=trie.device)
    tensors = trie.filter_tensors(filter, users)
    assert tensors is not None
    return tensors.allows(leaves.repeat(users, 1))


def _of_items(scores: Tensor, shared: SharedIds | None, filter: Filter | SharedFilter | None) -> Tensor:
    """The scores [B, N] of the items that share the semantic IDs with ``scores`` [B, U]."""
    if shared is None:
        return scores
    scores = scores[:, shared.leaf_of]
    return scores.masked_fill(~filter.allowed, float("-inf")) if isinstance(filter, SharedFilter) else scores


def _score_chunks(
    decoder: Decoder, prompts: tuple[Tensor, Tensor], num_tokens: int | None, chunks: Sequence[Tensor],
    filter: Filter | None,
) -> Iterator[Tensor]:  # fmt: skip
    """Scores [B, n] of each chunk, given its codes [n, levels], after one prefill."""
    state = decoder.plan.new_state()
    logits = state.prefill(*prompts, decoder.logits_request(0), num_tokens)
    for number, codes in enumerate(chunks):
        if number > 0:
            state.reset_to_prefill()
        yield _score_chunk(decoder, state, logits, codes, filter)


def _score_chunk(
    decoder: Decoder, state: DecoderState, first_logits: Logits, codes: Tensor, filter: Filter | None
) -> Tensor:
    """Scores [B, n] of consecutive ranks with ``codes`` [n, levels]."""
    logits: Logits | None = first_logits
    prefixes = _prefixes(decoder, codes, 0, None)
    row = prefixes.of_rank[:1]  # [P] the row of each prefix in ``logits``, -1 if it was not computed
    scores = torch.zeros(len(first_logits.values), 1, device=codes.device)  # [B, P]
    for level in range(1, codes.shape[1] + 1):
        longer = _prefixes(decoder, codes, level, prefixes)
        scores = scores[:, longer.parents]
        if logits is not None:
            nodes = prefixes.nodes[row >= 0]
            places = row[longer.parents], longer.codes
            scores = scores + _log_probs(decoder, logits, nodes, *places, filter)
        computed = longer.computed.nonzero()[:, 0]  # [F]
        parents = row[longer.parents[computed]]
        row = torch.where(longer.computed, longer.computed.cumsum(0) - 1, -1)
        logits = None
        if level < codes.shape[1] and len(computed):
            tokens = decoder.tokens.of_level(level - 1, longer.codes[computed])
            shape = len(scores), len(computed)
            request = decoder.logits_request(level)
            logits = state.decode_step(tokens.expand(shape), parents.expand(shape), request)
        prefixes = longer
    return scores


def _log_probs(
    decoder: Decoder, logits: Logits, nodes: Tensor, row: Tensor, codes: Tensor, filter: Filter | None
) -> Tensor:
    """Log-probabilities [B, P] of ``codes`` [P] after the rows ``row`` [P] of the logits; 0 where it is -1.

    ``nodes`` [F]: the trie nodes of the logits' rows.
    """
    users, total = len(logits.values), logits.logsumexp
    log_prob = trie_softmax(
        logits.values.flatten(0, 1), nodes.repeat(users), decoder.trie, decoder.normalize,
        None if total is None else total.flatten(), filter,
    ).view_as(logits.values)  # fmt: skip
    return log_prob[:, row.clamp_min(0), codes].masked_fill(row < 0, 0.0)


def _prefixes(decoder: Decoder, codes: Tensor, length: int, shorter: Prefixes | None) -> Prefixes:
    """The prefixes of ``length`` codes of consecutive ranks with ``codes`` [n, levels]."""
    nodes = decoder.trie.lookup(codes[:, :length])  # [n], ascending
    new = nodes.diff(prepend=nodes[:1] - 1) > 0
    first = new.nonzero()[:, 0]  # [P] the first rank of each prefix
    nodes = nodes[first]
    ranks = decoder.trie.interval(nodes)
    several = ranks[:, 1] - ranks[:, 0] > 1
    computed = several if decoder.normalize == "valid" else torch.ones_like(several)
    last = codes[first, length - 1] if length else torch.zeros_like(first)
    parents = torch.zeros_like(first) if shorter is None else shorter.of_rank[first]
    return Prefixes(nodes, last, parents, new.cumsum(0) - 1, computed)
