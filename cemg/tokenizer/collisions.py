"""Unique semantic IDs: three ways to separate items whose codes collide.

The methods are described in docs/method.md, "One semantic ID per item".

N items, M learned codebooks of K vectors, Z latent width. A *group* is the items that share their first M − 1
codes.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cemg.errors import UserError
from cemg_kernels import Trie

SINKHORN_EPSILON, SINKHORN_ITERATIONS, SINKHORN_ROUNDS, SINKHORN_GROUP = 0.003, 50, 20, 64


@dataclass(frozen=True, slots=True)
class Uniqueness:
    """Unique codes and what changed.

    Attributes:
        codes: [N, levels], all different.
        colliding_before: Items that shared their codes with another item.
        changed_codes: Learned codes that were changed.
        moved_items: Items that were moved to another prefix.
    """

    codes: Tensor
    colliding_before: int
    changed_codes: int
    moved_items: int

    @property
    def changed_share(self) -> float:
        """Changed codes as a share of all N × M learned codes."""
        return self.changed_codes / max(self.codes.numel(), 1)


def make_unique(codes: Tensor, z: Tensor, codebooks: Tensor, *, method: str = "assign") -> Uniqueness:
    """Give every item different codes.

    Args:
        codes: [N, M] int64, possibly colliding.
        z: [N, Z] latents.
        codebooks: [M, K, Z].
        method: "assign": the colliding items of a group get its free last codes at minimum total cost; a
            group of more than K items moves its surplus to the nearest prefix with free codes; all other
            items keep their codes. "sinkhorn": LETTER's optimal transport on the last level, then "assign".
            "suffix": one more code 0 … K−1, as in TIGER.

    Raises:
        UserError: N > K^M, or more than K items of one group with "suffix".
    """
    levels, size = codebooks.shape[:2]
    colliding = int(_colliding(codes, size).sum())
    if method == "suffix":
        return Uniqueness(_suffix(codes, size), colliding, 0, 0)
    if len(codes) > size**levels:
        raise UserError(
            f"{len(codes)} items do not fit {levels} levels of {size} codes",
            cause=f"there are {size**levels} semantic IDs",
            fix="increase tokenizer.levels or tokenizer.codebook_size",
        )
    unique = codes.clone()
    if method == "sinkhorn":
        _sinkhorn_rounds(unique, z, codebooks)
    elif method != "assign":
        raise UserError(f"tokenizer.unique must be assign, sinkhorn or suffix, got {method!r}")
    movable = _colliding(unique, size)
    moved = _spread_full_groups(unique, movable, z, codebooks)
    _assign_groups(unique, movable, z, codebooks)
    return Uniqueness(unique, colliding, int((unique != codes).sum()), moved)


def place_new(codes: Tensor, z: Tensor, codebooks: Tensor, *, taken: Trie, method: str = "assign") -> Tensor:
    """Unique codes for new items that do not occur in the trie ``taken``, [n, levels].

    Items are placed in order. Each takes the nearest free last code of its prefix (or the first free suffix);
    if there is none, that of the nearest prefix with a free code.

    Raises:
        UserError: No suffix is free.
    """
    size, suffix = codebooks.shape[1], method == "suffix"
    used: dict[tuple[int, ...], list[bool]] = {}  # last codes that are not free, by prefix
    placed = []
    for row, latent in zip(codes.tolist(), z, strict=True):
        options = ((*row, k) for k in range(size)) if suffix else _nearest_ids(row, latent, codebooks)
        for option in options:
            prefix, last = option[:-1], option[-1]
            if prefix not in used:
                nodes = taken.lookup(torch.tensor([prefix], dtype=torch.int64, device=taken.device))
                used[prefix] = taken.mask(nodes)[0].tolist()
            if not used[prefix][last]:
                used[prefix][last] = True
                placed.append(option)
                break
        else:
            raise UserError(f"no semantic ID is free for the codes {tuple(row)}", fix="train a new tokenizer")
    return torch.tensor(placed, dtype=torch.int64).reshape(len(placed), taken.levels)


def _is_packable(size: int, levels: int) -> bool:
    return bool(size**levels < 1 << 63)


def _keys(codes: Tensor, size: int) -> Tensor:
    """One integer per row of codes below ``size``, [N] int64; rows are equal if their integers are."""
    if not _is_packable(size, codes.shape[1]):
        inverse: Tensor = codes.unique(dim=0, return_inverse=True)[1]
        return inverse
    keys = torch.zeros(len(codes), dtype=torch.int64)
    for level in codes.T:
        keys = keys * size + level
    return keys


def _colliding(codes: Tensor, size: int) -> Tensor:
    """[N] bool: whether an item has the same codes as another one."""
    ordered, items = _keys(codes, size).sort()
    same = ordered[1:] == ordered[:-1]
    colliding = torch.zeros(len(codes), dtype=torch.bool)
    colliding[items[1:][same]] = True
    colliding[items[:-1][same]] = True
    return colliding


def _groups(codes: Tensor, size: int, movable: Tensor) -> dict[tuple[int, ...], list[int]]:
    """The items of each group with a movable item ([N] bool), in item order, by the first M − 1 codes.

    The groups are in the order of their first items. Of other groups, nothing is held.
    """
    keys = _keys(codes[:, :-1], size)
    ordered, order = keys.sort(stable=True)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), torch.nonzero(ordered.diff()).flatten() + 1))
    stops = torch.cat((starts[1:], torch.tensor([len(keys)])))
    before = torch.cat((torch.zeros(1, dtype=torch.int64), movable[order].cumsum(0)))
    wanted = torch.nonzero(before[stops] > before[starts]).flatten()
    wanted = wanted[order[starts[wanted]].argsort()]
    return {
        tuple(codes[order[start], :-1].tolist()): order[start:stop].tolist()
        for start, stop in zip(starts[wanted].tolist(), stops[wanted].tolist(), strict=True)
    }


class _Sizes(dict[tuple[int, ...], int]):
    """The number of items per group. Only the groups that were asked for are held as Python objects."""

    def __init__(self, keys: Tensor, size: int) -> None:
        self.keys_found, self.counts = keys.unique(return_counts=True)
        self.size = size

    def __missing__(self, prefix: tuple[int, ...]) -> int:
        key = functools.reduce(lambda key, code: key * self.size + code, prefix, 0)
        at = int(torch.searchsorted(self.keys_found, key))
        is_found = at < len(self.keys_found) and int(self.keys_found[at]) == key
        return int(self.counts[at]) if is_found else 0


def _sizes(codes: Tensor, size: int) -> dict[tuple[int, ...], int]:
    """The number of items per first M − 1 codes, 0 for those of no item."""
    if _is_packable(size, codes.shape[1] - 1):
        return _Sizes(_keys(codes[:, :-1], size), size)
    return Counter(map(tuple, codes[:, :-1].tolist()))


def _suffix(codes: Tensor, size: int) -> Tensor:
    """Append the number of earlier items with the same codes."""
    ordered, items = _keys(codes, size).sort(stable=True)
    _, counts = ordered.unique_consecutive(return_counts=True)
    if len(counts) and int(counts.max()) > size:
        row = codes[items[counts.cumsum(0)[counts.argmax()] - 1]]
        raise UserError(
            f"{int(counts.max())} items share the codes {tuple(row.tolist())}, but a suffix has only {size} "
            "values",
            fix="use tokenizer.unique=assign, or increase tokenizer.codebook_size",
        )
    suffix = torch.empty(len(codes), dtype=codes.dtype)
    suffix[items] = torch.arange(len(codes)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.cat([codes, suffix[:, None]], dim=1)


def _last_cost(z: Tensor, prefix: tuple[int, ...], codebooks: Tensor) -> Tensor:
    """Squared distances [n, K] from the residual of z [n, Z] after ``prefix`` to the last codebook."""
    residual = z.double()
    for level, code in enumerate(prefix):
        residual = residual - codebooks[level, code].double()
    return torch.cdist(residual, codebooks[len(prefix)].double()).square()


def _assign_groups(codes: Tensor, movable: Tensor, z: Tensor, codebooks: Tensor) -> None:
    """Assign the movable items ([N] bool) of each group to its free last codes at minimum cost, in place."""
    from scipy.optimize import linear_sum_assignment  # not needed at inference

    for prefix, members in _groups(codes, codebooks.shape[1], movable).items():
        group = torch.tensor(members)
        items, others = group[movable[group]], group[~movable[group]]
        if len(items) == 0:
            continue
        kept = set(codes[others, -1].tolist())
        free = [code for code in range(codebooks.shape[1]) if code not in kept]
        cost = _last_cost(z[items], prefix, codebooks)[:, free]
        rows, columns = linear_sum_assignment(cost.numpy())
        codes[items[rows], -1] = torch.tensor(free)[columns]


def _spread_full_groups(codes: Tensor, movable: Tensor, z: Tensor, codebooks: Tensor) -> int:
    """Move the surplus of groups with more than K items to the nearest prefix with free codes, in place.

    The movable items ([N] bool) with the largest distance go first. `_assign_groups` then sets their last
    codes. Returns the number of moved items.
    """
    size = codebooks.shape[1]
    full = {p: members for p, members in _groups(codes, size, movable).items() if len(members) > size}
    sizes = _sizes(codes, size) if full else {}
    moved = 0
    for prefix, members in full.items():
        candidates = [i for i in members if movable[i]]  # at most K − 1 others are fixed
        distance = _last_cost(z[candidates], prefix, codebooks).min(1).values
        for index in distance.argsort(descending=True, stable=True)[: len(members) - size].tolist():
            item = candidates[index]
            target = next(p for p in _nearest_prefixes(prefix, z[item], codebooks) if sizes[p] < size)
            sizes[prefix] -= 1
            sizes[target] += 1
            codes[item, :-1] = torch.tensor(target, dtype=codes.dtype)
            moved += 1
    return moved


def _nearest_prefixes(prefix: tuple[int, ...], z: Tensor, codebooks: Tensor) -> Iterator[tuple[int, ...]]:
    """Prefixes by distance to z [Z]: those that differ in the last code, then in the last two, …"""
    for kept in range(len(prefix) - 1, -1, -1):
        tails = list(itertools.product(range(codebooks.shape[1]), repeat=len(prefix) - kept))
        sums = sum(
            codebooks[kept + i, list(tail)].double() for i, tail in enumerate(zip(*tails, strict=True))
        )
        head = sum(
            (codebooks[m, c].double() for m, c in enumerate(prefix[:kept])), torch.zeros_like(z).double()
        )
        distance = (z.double() - head - sums).square().sum(1)
        for index in distance.argsort(stable=True).tolist():
            yield (*prefix[:kept], *tails[index])


def _nearest_ids(row: list[int], z: Tensor, codebooks: Tensor) -> Iterator[tuple[int, ...]]:
    """Semantic IDs by distance to z [Z]: those of its own prefix first, then of the nearest prefixes."""
    first = tuple(row[:-1])
    for prefix in itertools.chain([first], _nearest_prefixes(first, z, codebooks)):
        for code in _last_cost(z[None], prefix, codebooks)[0].argsort(stable=True).tolist():
            yield (*prefix, code)


def _sinkhorn_rounds(codes: Tensor, z: Tensor, codebooks: Tensor) -> None:
    """Choose new last codes for colliding items by entropic transport in small groups, in place."""
    for _ in range(SINKHORN_ROUNDS):
        items = torch.nonzero(_colliding(codes, codebooks.shape[1])).flatten()
        if len(items) == 0:
            return
        for group in items.split(SINKHORN_GROUP):
            residual = _residual_before_last(codes[group], z[group], codebooks)
            cost = torch.cdist(residual, codebooks[-1].double()).square()
            codes[group, -1] = _transport(cost).argmax(1)


def _residual_before_last(codes: Tensor, z: Tensor, codebooks: Tensor) -> Tensor:
    chosen = [codebooks[m, codes[:, m]].double() for m in range(len(codebooks) - 1)]
    return z.double() - sum(chosen, torch.zeros_like(z).double())


def _transport(cost: Tensor) -> Tensor:
    """Log of the balanced Sinkhorn plan [n, K], for costs scaled to −1 … 1."""
    middle, half = (cost.max() + cost.min()) / 2, ((cost.max() - cost.min()) / 2).clamp_min(1e-12)
    plan = -((cost - middle) / half) / SINKHORN_EPSILON
    for _ in range(SINKHORN_ITERATIONS):
        plan = plan - plan.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan
