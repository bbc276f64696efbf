"""The item prior of a search: from the caller's items and masses to the tensors that the search reads.

B prompts, Z items per prompt at most, N items of the catalog.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cemg.decoding.beams import Filter
from cemg.errors import UserError
from cemg.tokenizer import Catalog, SharedFilter
from cemg_kernels import ItemPrior, Trie
from cemg_kernels.constrained.prior import PriorTensors, checked_weights

PRIOR_WEIGHT = 0.5  # the share of a prior in the mixture, if the caller does not say


def prior_tensors(
    prior: ItemPrior | None, weight: float | Sequence[float], catalog: Catalog, trie: Trie,
    filter: Filter | SharedFilter | None, prompts: int,
) -> PriorTensors | None:  # fmt: skip
    """The tensors of a prior for a search; None if there is no prior, or if its weight is 0.

    Args:
        prior: Of B requests, with item ids as in ``Recommendations.items``.
        weight: The share of the prior, one number or B.
        catalog: The catalog of the search.
        trie: Its trie, on the device of the search.
        filter: The items that may be returned.
        prompts: B.

    Raises:
        UserError: For another number of requests, for unknown or repeated items, and for weights that are not
            within 0 to 1.
    """
    if prior is None:
        return None
    if not isinstance(prior, ItemPrior):
        raise UserError(
            f"prior must be an ItemPrior, got {type(prior).__name__}", fix="prior=ItemPrior(items, mass)"
        )
    if len(prior) != prompts:
        raise UserError(
            f"a prior of {len(prior)} requests for {prompts} prompts", fix="pass one list of items per prompt"
        )
    try:
        weights = checked_weights(weight, prompts)
        if not bool(weights.any()):
            return None
        if isinstance(filter, SharedFilter) or catalog.shared is not None:
            return _shared_tensors(prior, weights, catalog, trie, filter)
        return prior.on(trie, weights, filter)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def prior_of_rows(prior: ItemPrior | None, catalog: Catalog) -> ItemPrior | None:
    """The prior with its item ids as ``Recommendations.items``: the rows of a catalog of named items.

    Raises:
        UserError: The catalog does not have an item, or a request has one twice.
    """
    if not isinstance(prior, ItemPrior) or not catalog.named:
        return prior
    names = [str(item) for item in prior.items.tolist()]
    rows = catalog.rows_of(names)
    begin = 0
    for request, count in enumerate(prior.counts.tolist()):
        own = names[begin : begin + count]
        if len(set(own)) < count:
            raise _repeated(request, next(item for item in own if own.count(item) > 1))
        begin += count
    return prior.renamed(rows)


def _repeated(request: int, item: int | str) -> UserError:
    return UserError(
        f"request {request} of the prior has the item {item!r} twice",
        fix="pass each item once, with its mass",
    )


def _shared_tensors(
    prior: ItemPrior, weights: Tensor, catalog: Catalog, trie: Trie, filter: Filter | SharedFilter | None
) -> PriorTensors:
    """The tensors over semantic IDs; the mass of an ID is the sum of its allowed items' masses."""
    assert catalog.shared is not None
    items, mass = prior.padded()
    used = torch.arange(items.shape[1]) < torch.from_numpy(prior.counts)[:, None]
    rows = torch.full_like(items, -1)
    rows[used] = torch.from_numpy(_rows_of(catalog, items[used].numpy()))
    ordered = rows.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(repeated.any()):
        request, column = repeated.nonzero()[0].tolist()
        item = int(items[request, rows[request] == ordered[request, column]][0])
        raise _repeated(request, catalog.item_ids[item] if catalog.named else item)
    if isinstance(filter, SharedFilter):
        allowed = filter.allowed.expand(len(rows), -1).gather(1, rows.clamp_min(0))
        mass = mass * allowed
    leaf = torch.where(rows < 0, -1, catalog.shared.leaf_of[rows.clamp_min(0)]).to(trie.device)
    ranks = trie.ranks_of(leaf)
    return PriorTensors.of(ranks, mass.to(trie.device), weights.to(trie.device), trie.num_items)


def _rows_of(catalog: Catalog, items: np.ndarray) -> np.ndarray:
    """The catalog rows of items [P], as ``Recommendations.items`` names them."""
    if not catalog.named:
        return np.array(catalog.rows_of(items.tolist()), dtype=np.int64)
    outside = items[(items < 0) | (items >= len(catalog))]
    if outside.size:
        raise UserError(f"the prior has row {outside[0]}, the catalog has {len(catalog)} rows")
    return items
