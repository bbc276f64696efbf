"""From semantic IDs to items, where several items share one.

B users, W beams, U semantic IDs, N items, P members of all IDs of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cemg.decoding.beams import Filter, Recommendations
from cemg.errors import UserError
from cemg.tokenizer import Catalog, SharedFilter
from cemg_kernels import Trie


def leaf_filter(filter: Filter | SharedFilter | None, catalog: Catalog, trie: Trie) -> Filter | None:
    """What a search under ``filter`` may walk through: the filter of the trie's leaves.

    Raises UserError for a filter of another kind than the catalog's.
    """
    if not isinstance(filter, SharedFilter):
        if filter is not None and catalog.shared is not None:
            raise UserError(
                "this catalog's items share semantic IDs, and the filter is one of IDs",
                fix="make it with catalog.only(item_ids) or catalog.excluding(histories)",
            )
        return filter
    if filter.ids is not catalog.shared:
        raise UserError("the filter belongs to another catalog", fix="make it with this catalog's only()")
    return filter.leaves(trie)


def with_members(
    found: Recommendations, catalog: Catalog, filter: Filter | SharedFilter | None, top: int
) -> Recommendations:
    """All items of the semantic IDs found [B, W], each with its ID's score, cut at ``top`` items per row.

    ``found.items`` are numbers of semantic IDs, as the trie of a shared catalog gives them; the results of
    other catalogs are returned as they are. Items that ``filter`` does not allow are dropped.
    ``certified`` counts items.
    """
    ids = catalog.shared
    if ids is None:
        return found
    allowed = filter.allowed if isinstance(filter, SharedFilter) else None
    sizes = ids.begins.diff()[found.items.clamp_min(0)].masked_fill(found.items < 0, 0)  # [B, W]
    rows, beams, members = _members(found.items, sizes, ids.begins, ids.members)
    if allowed is not None:
        keep = allowed[members] if allowed.ndim == 1 else allowed[rows, members]
        rows, beams, members = rows[keep], beams[keep], members[keep]
    counts = torch.bincount(rows, minlength=len(sizes))  # [B]
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # in its row
    first = place < top
    proven = torch.bincount(rows[first & (beams < found.certified[rows])], minlength=len(sizes))
    rows, beams, members, place = rows[first], beams[first], members[first], place[first]
    shape = len(sizes), top
    items, scores = torch.full(shape, -1), torch.full(shape, float("-inf"))
    codes = torch.full((*shape, found.codes.shape[2]), -1)
    items[rows, place] = members if catalog.named else torch.tensor(catalog.item_ids)[members]
    scores[rows, place] = found.scores[rows, beams]
    codes[rows, place] = found.codes[rows, beams]
    return Recommendations(items, scores, codes, proven)


def _members(leaves: Tensor, sizes: Tensor, begins: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each member of the leaves [B, W], in order: its row, its beam and its catalog row."""
    flat = sizes.flatten()
    leaf = torch.arange(len(flat)).repeat_interleave(flat)  # of each member, by place
    within = torch.arange(len(leaf)) - (flat.cumsum(0) - flat)[leaf]
    chosen = members[begins[leaves.flatten()[leaf]] + within]
    beams = max(leaves.shape[1], 1)
    return leaf // beams, leaf % beams, chosen
