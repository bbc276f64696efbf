"""Catalogs whose items share semantic IDs: from the IDs that a search finds to all of their items.

B users, W beams, N items, P items of all semantic IDs that were found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cemg.decoding.beams import Filter, Recommendations
from cemg.errors import UserError
from cemg.tokenizer import Catalog, SharedFilter
from cemg_kernels import Trie


def leaf_filter(filter: Filter | SharedFilter | None, catalog: Catalog, trie: Trie) -> Filter | None:
    """The filter of the trie's leaves that a search under ``filter`` uses.

    Raises:
        UserError: For a filter that does not belong to ``catalog``.
    """
    if not isinstance(filter, SharedFilter):
        if filter is not None and catalog.shared is not None:
            raise UserError(
                "items of this catalog share semantic IDs, but the filter is a filter of semantic IDs",
                fix="make it with catalog.only(item_ids) or catalog.excluding(histories)",
            )
        return filter
    if filter.ids is not catalog.shared:
        raise UserError("the filter belongs to another catalog", fix="make it with this catalog's only()")
    return filter.leaves(trie)


def expand_shared_ids(
    results: Recommendations, catalog: Catalog, filter: Filter | SharedFilter | None, top: int
) -> Recommendations:
    """The items of all semantic IDs found, each with the score of its ID, at most ``top`` per row.

    Results of a catalog without shared semantic IDs are returned unchanged.

    Args:
        results: [B, W]; its ``items`` are numbers of semantic IDs.
        catalog: The catalog that was searched.
        filter: Items that it does not allow are dropped.
        top: The number of items per row.
    """
    shared = catalog.shared
    if shared is None:
        return results
    allowed = filter.allowed if isinstance(filter, SharedFilter) else None
    sizes = shared.begins.diff()[results.items.clamp_min(0)].masked_fill(results.items < 0, 0)  # [B, W]
    rows, beams, items = _items_of(results.items, sizes, shared.begins, shared.members)  # [P] each
    if allowed is not None:
        keep = allowed[items] if allowed.ndim == 1 else allowed[rows, items]
        rows, beams, items = rows[keep], beams[keep], items[keep]
    counts = torch.bincount(rows, minlength=len(sizes))  # [B]
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # [P] within its row
    kept = rank < top
    certified = torch.bincount(rows[kept & (beams < results.certified[rows])], minlength=len(sizes))
    rows, beams, items, rank = rows[kept], beams[kept], items[kept], rank[kept]
    shape = len(sizes), top
    out_items, scores = torch.full(shape, -1), torch.full(shape, float("-inf"))
    codes = torch.full((*shape, results.codes.shape[2]), -1)
    out_items[rows, rank] = items if catalog.named else torch.tensor(catalog.item_ids)[items]
    scores[rows, rank] = results.scores[rows, beams]
    codes[rows, rank] = results.codes[rows, beams]
    return Recommendations(out_items, scores, codes, certified)


def _items_of(
    leaves: Tensor, sizes: Tensor, begins: Tensor, members: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The row, the beam and the catalog row of each item of the leaves [B, W], in order; [P] each."""
    counts = sizes.flatten()
    leaf = torch.arange(len(counts)).repeat_interleave(counts)  # [P] index into the flattened leaves
    within = torch.arange(len(leaf)) - (counts.cumsum(0) - counts)[leaf]  # [P] index among its leaf's items
    items = members[begins[leaves.flatten()[leaf]] + within]
    beams = max(leaves.shape[1], 1)
    return leaf // beams, leaf % beams, items
