"""An item prior: a sparse distribution over the items per request, which a search mixes with the generator.

Items are sorted by their rank in the trie, and the items below a node are an interval of ranks. So the mass
below a node is a difference of two prefix sums.

    mass(node) = sums[lower_bound(ranks, hi)] - sums[lower_bound(ranks, lo)]        for the ranks [lo, hi)
    score      = log((1 - weight) * exp(generator_score) + weight * mass(node))

Masses are rounded up to multiples of 2**-52. Sums of such numbers up to 2 are exact in float64, so prefix
sums and their differences do not depend on the order of additions, and the masses of the children of a node
sum to exactly its own. A positive mass stays positive.
B requests, Z items per request at most, W beams, K codes per level, N items in the trie.

Source: interpolation with a distribution from memory, Khandelwal et al. 2020
(https://arxiv.org/abs/1911.00172), here over items and at each node of the trie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.dispatch import native, pick
from ..runtime.operands import tensor_of
from ..trie import ops as trie_ops
from ..trie.arrays import TrieArrays
from ..trie.filter_tensors import Filter, FilterTensors
from ..trie.trie import Trie

UNIT = 2.0**-52  # of the masses: the spacing of float64 between 1 and 2
LARGE = 2.0**960  # masses up to it have finite sums
NO_ITEM = -1
NEG_INF = float("-inf")


class PriorTensors(NamedTuple):
    """The masses of the items of each request, as the kernels read them.

    Args:
        ranks: int32 [B, Z], ascending, padded with N. Equal ranks may repeat: items that share a leaf.
        sums: float64 [B, Z + 1], sums[b, z] is the mass of the first z items, a multiple of 2**-52. The last
            sum of a request is 1 up to Z * 2**-52, or 0 if the request has no mass.
        weight: float64 [B], the share of the prior in the mixture, 0 to 1; 0 where the request has no mass.
    """

    ranks: Tensor
    sums: Tensor
    weight: Tensor

    @classmethod
    def of(cls, ranks: Tensor, mass: Tensor, weight: Tensor, num_items: int) -> PriorTensors:
        """Sorts, normalises and sums the masses of each request.

        Args:
            ranks: Integers [B, Z] in any order; negative for no item.
            mass: float64 [B, Z], 0 or larger, with finite sums; 0 where there is no item.
            weight: float64 [B], 0 to 1.
            num_items: N.
        """
        ordered, order = _sorted(ranks, num_items)
        units = mass.gather(1, order)
        total = units.sum(1, keepdim=True)
        empty, positive = total == 0, units > 0
        units.div_(total.masked_fill_(empty, 1.0)).mul_(1 / UNIT).ceil_()
        units = torch.maximum(units, positive.double())  # the quotient of a tiny mass may be 0
        sums = torch.zeros(len(mass), mass.shape[1] + 1, dtype=torch.float64, device=mass.device)
        torch.cumsum(units, 1, out=sums[:, 1:])
        return cls(ordered, sums.mul_(UNIT), weight.masked_fill(empty[:, 0], 0.0))

    def select(self, requests: Tensor | slice) -> PriorTensors:
        """Returns the tensors of some requests."""
        return PriorTensors(*(tensor[requests] for tensor in self))

    def to(self, device: str | torch.device) -> PriorTensors:
        """Returns the tensors on another device."""
        return PriorTensors(*(tensor.to(device) for tensor in self))

    def view(self) -> Any:
        """Returns the C++ PriorView of the tensors, which must be contiguous; it does not keep them alive."""
        ranks, sums, weight = (tensor.data_ptr() for tensor in self)
        return native().PriorView(ranks=ranks, sums=sums, weight=weight, size=self.ranks.shape[1])

    def masses_of(self, ranks: Tensor) -> Tensor:
        """Returns the masses below rank intervals int32 [B, Y, 2], half open: float64 [B, Y]."""
        flat = ranks.reshape(len(ranks), ranks.shape[1] * 2).contiguous()
        sums = self.sums.gather(1, torch.searchsorted(self.ranks, flat)).view(ranks.shape)
        return sums[..., 1] - sums[..., 0]

    def by_rank(self, num_items: int) -> Tensor:
        """Returns the mass of the item at each rank: float64 [B, N]."""
        mass = self.sums.new_zeros(len(self.sums), num_items + 1)  # the last one is of the padding
        return mass.scatter_add_(1, self.ranks.long(), self.sums.diff(dim=1))[:, :num_items]


class ItemPrior:
    """A sparse distribution over items, one per request: a retriever's scores as probabilities.

    Args:
        items: B sequences of item ids, as the leaves of the trie name them; or one sequence for one request.
            A request without items has no prior: the generator alone ranks.
        mass: Numbers 0 or larger, in the same form. They need not sum to 1; each request is normalised.

    Raises:
        ValueError: Lengths differ, a mass is negative, NaN or infinite, or all masses of a request are 0.

    Example:
        >>> prior = ItemPrior([[7, 2], [5]], [[3.0, 1.0], [1.0]])  # two requests
        >>> len(prior), prior.mass.tolist()
        (2, [3.0, 1.0, 1.0])
    """

    def __init__(self, items: Any, mass: Any) -> None:
        self.items, self.counts = _flat("items", items)
        masses, counts = _flat("mass", mass)
        if not np.array_equal(counts, self.counts):
            raise ValueError(
                f"items and mass must have one shape, got {_shown(self.counts)} items and {_shown(counts)} "
                "masses per request"
            )
        self.mass = _checked_mass(masses, self.counts)

    def __len__(self) -> int:
        """Returns the number of requests, B."""
        return len(self.counts)

    def renamed(self, items: Sequence[int] | np.ndarray) -> ItemPrior:
        """Returns the same masses for other names of the same items, [P] over all requests."""
        other = object.__new__(ItemPrior)
        other.items, other.counts, other.mass = np.asarray(items, dtype=np.int64), self.counts, self.mass
        return other

    def padded(self) -> tuple[Tensor, Tensor]:
        """Returns items int64 [B, Z], -1 for none, and masses float64 [B, Z].

        Raises:
            ValueError: The items are not integers.
        """
        if self.items.dtype != np.int64:
            raise ValueError(
                f"the items of a prior must be integers, got {self.items.tolist()[0]!r}; pass ids of the trie"
            )
        shape = len(self), max(1, int(self.counts.max(initial=0)))
        if self.items.size == shape[0] * shape[1]:
            return torch.from_numpy(self.items).view(shape), torch.from_numpy(self.mass).view(shape)
        used = np.arange(shape[1]) < self.counts[:, None]
        items, mass = np.full(shape, NO_ITEM, dtype=np.int64), np.zeros(shape)
        items[used], mass[used] = self.items, self.mass
        return torch.from_numpy(items), torch.from_numpy(mass)

    def on(
        self, trie: Trie, weight: float | Sequence[float] | Tensor, filter: Filter | None = None
    ) -> PriorTensors:
        """Returns the tensors of a search, renormalised over the items that the filter allows.

        Args:
            trie: The trie that is searched.
            weight: The share of the prior in the mixture, 0 to 1: one number, or B.
            filter: The filter of the search.

        Raises:
            ValueError: An item is unknown or occurs twice in a request, ``weight`` is not within 0 to 1, or
                the filter has another number of requests.
        """
        weights = checked_weights(weight, len(self))
        allowed = trie.filter_tensors(filter, len(self))
        if pick("trie_beam_step", trie.device) == "native":
            built = self._built_natively(trie, weights, allowed)
            if built is not None:
                return built
        items, mass = (part.to(trie.device) for part in self.padded())
        ranks = trie.ranks_of(items)
        self._check_known(items, ranks)
        if allowed is not None:
            mass = mass * allowed.allows(ranks.clamp_min(0) + trie.arrays.num_inner)
        tensors = PriorTensors.of(ranks, mass, weights.to(trie.device), trie.num_items)
        self._check_distinct(items, ranks, tensors.ranks, trie.num_items)
        return tensors

    def _built_natively(
        self, trie: Trie, weights: Tensor, filter: FilterTensors | None
    ) -> PriorTensors | None:
        """Returns the same from one call of C++; None if ``on`` has to name what is wrong."""
        if self.items.dtype != np.int64:
            return None
        known, rank_of = trie.by_id
        requests, size = len(self), max(1, int(self.counts.max(initial=0)))
        ranks = torch.empty(requests, size, dtype=torch.int32)
        sums = torch.empty(requests, size + 1, dtype=torch.float64)
        items, mass, weights = np.ascontiguousarray(self.items), self.mass, weights.clone()
        valid = native().build_prior(
            items=items.ctypes.data, mass=mass.ctypes.data, counts=self.counts.ctypes.data,
            known=0 if known is None else known.data_ptr(), rank_of=rank_of.data_ptr(),
            num_items=trie.num_items, num_inner=trie.arrays.num_inner,
            filter=None if filter is None else filter.view(requests), requests=requests, size=size,
            ranks=ranks.data_ptr(), sums=sums.data_ptr(), weight=weights.data_ptr(),
        )  # fmt: skip
        return PriorTensors(ranks, sums, weights) if valid else None

    def _check_known(self, items: Tensor, ranks: Tensor) -> None:
        """Raises ValueError if one of ``items`` [B, Z] has no rank; the message names it."""
        if int((ranks >= 0).sum()) != self.items.size:
            used = torch.arange(ranks.shape[1]) < torch.from_numpy(self.counts)[:, None]
            row, column = ((ranks.cpu() < 0) & used).nonzero()[0].tolist()
            raise ValueError(
                f"request {row} of the prior has the item {int(items[row, column])}, which the trie does not "
                "have; pass ids of its items"
            )

    def _check_distinct(self, items: Tensor, ranks: Tensor, ordered: Tensor, num_items: int) -> None:
        """Raises ValueError if a request has an item twice, given its sorted ranks ``ordered`` [B, Z]."""
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < num_items)
        if bool(repeated.any()):
            row, column = repeated.nonzero()[0].tolist()
            item = int(items[row, ranks[row] == ordered[row, column]][0])
            raise ValueError(
                f"request {row} of the prior has the item {item} twice; pass each item once, with its mass"
            )


def _sorted(ranks: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Returns the sorted ranks of each request, ``num_items`` for negative ones, and their columns.

    Sorts keys that hold both. On a CPU, NumPy's vectorised sort is ten times faster than torch's.
    """
    columns = torch.arange(ranks.shape[1], device=ranks.device)
    keys = (torch.where(ranks < 0, num_items, ranks.long()) << 32) | columns
    keys = keys.sort(dim=1).values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return (keys >> 32).to(torch.int32), keys & 0xFFFFFFFF


def checked_weights(weight: float | Sequence[float] | Tensor, requests: int) -> Tensor:
    """Returns the weight of each request: float64 [B].

    Raises:
        ValueError: A weight is not within 0 to 1, or there are neither 1 nor B of them.
    """
    try:
        weights = torch.as_tensor(weight, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the weight of a prior must be a number or {requests} numbers: {error}") from error
    if weights.ndim and list(weights.shape) != [requests]:
        raise ValueError(
            f"the weight of a prior must be one number or {requests}, one per request, "
            f"got {list(weights.shape)}"
        )
    wrong = weights[~((weights >= 0) & (weights <= 1))]
    if wrong.numel():
        raise ValueError(f"the weight of a prior must be within 0 to 1, got {float(wrong.flatten()[0])}")
    return weights.expand(requests).contiguous()


def child_masses(trie: TrieArrays, prior: PriorTensors, nodes: Tensor) -> Tensor:
    """Returns the mass below each child of ``nodes`` int32 [B, W], by code: float64 [B, W, K].

    0 for codes that do not continue the node.
    """
    (users, beams), size = nodes.shape, trie.codebook_size
    codes, children = trie_ops.children(trie, None, nodes.flatten())  # [R, K]
    ranks = trie_ops.interval(trie, None, children.flatten())
    mass = prior.masses_of(ranks.view(users, beams * size, 2)).view(users * beams, size)
    by_code = mass.new_zeros(users * beams, size + 1)
    column = torch.where(codes < 0, size, codes).long()  # missing children go to the last column, cut off
    return by_code.scatter_(1, column, mass)[:, :size].view(users, beams, size)


def mixed_scores(generator_scores: Tensor, mass: Tensor, weight: Tensor) -> Tensor:
    """The definition of the mixture: log((1 - weight) * exp(generator_scores) + weight * mass), float32.

    Where the weight is 0, the result has the bits of ``generator_scores``.

    Args:
        generator_scores: float32 [B, ...], log-probabilities.
        mass: float64, of the same shape.
        weight: float64 [B].
    """
    weight = weight.view(-1, *[1] * (mass.ndim - 1))
    generator = torch.log1p(-weight) + generator_scores.double()
    mixed = torch.logaddexp(generator, torch.log(weight) + torch.log(mass)).float()
    return torch.where(weight == 0, generator_scores, mixed)


def check_prior(
    prior: PriorTensors | None, scores: Tensor | None, nodes: Tensor
) -> tuple[PriorTensors, Tensor]:
    """Returns a prior and the generator's scores after a check against ``nodes`` [B, W].

    Raises:
        ValueError: One of them is missing, or a shape, dtype or device does not fit.
    """
    if prior is None or scores is None:
        raise ValueError("prior and generator_scores, the generator's own score of each beam, go together")
    if not isinstance(prior, PriorTensors):
        raise TypeError(f"prior must be PriorTensors, got {type(prior).__name__}; make it with ItemPrior.on")
    users, device = nodes.shape[0], nodes.device
    width = prior.ranks.shape[-1] if isinstance(prior.ranks, Tensor) and prior.ranks.ndim else 0
    kinds = (torch.int32, torch.float64, torch.float64)
    shapes = ([users, width], [users, width + 1], [users])
    for name, tensor, dtype, shape in zip(PriorTensors._fields, prior, kinds, shapes, strict=True):
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device == device
        if not dense or tensor.dtype != dtype or list(tensor.shape) != shape:
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else str(type(tensor))
            raise ValueError(f"{name} of the prior must be dense {dtype} {shape} on {device}, got {got}")
    return PriorTensors(*(tensor.contiguous().resolve_neg() for tensor in prior)), scores


def _flat(name: str, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of all requests in one array [P], and the number per request [B]."""
    try:
        rows = [_row(row) for row in _rows(values)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} of a prior must be one sequence, or one per request, got {type(values).__name__}: "
            f"{error}"
        ) from error
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    filled = [row for row in rows if len(row)]
    flat = np.concatenate(filled) if len(filled) > 1 else filled[0] if filled else np.empty(0, dtype=np.int64)
    return flat.astype(np.int64) if flat.dtype.kind in "iu" else flat, counts


def _rows(values: Any) -> list[Any]:
    """Returns one entry per request; a single sequence of numbers or names is one request."""
    if isinstance(values, str | bytes | dict | set | frozenset):
        raise TypeError("it is not an ordered sequence of numbers")
    if isinstance(values, np.ndarray | Tensor):
        return list(values) if values.ndim > 1 else [values]
    rows = list(values)
    nested = [isinstance(row, np.ndarray | Tensor | Sequence) and not isinstance(row, str) for row in rows]
    if any(nested) and not all(nested):
        raise TypeError("some entries are sequences, others are not")
    return rows if any(nested) else [rows]


def _row(values: Any) -> np.ndarray:
    row = (
        tensor_of("a prior", values).detach().cpu().numpy()
        if isinstance(values, Tensor)
        else np.asarray(values)
    )
    if row.ndim != 1:
        raise ValueError(f"a request must be one-dimensional, got {list(row.shape)}")
    return row


def _checked_mass(mass: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the masses as float64 [P], each request scaled if its sum would overflow."""
    if mass.dtype.kind not in "fiu" and mass.size:
        raise ValueError(f"the masses of a prior must be numbers, got {mass.dtype}")
    mass = mass.astype(np.float64)
    valid = (mass >= 0) & (mass < np.inf)
    if not valid.all():
        at = int(np.flatnonzero(~valid)[0])
        row = int(np.searchsorted(counts.cumsum(), at, side="right"))
        raise ValueError(
            f"request {row} of the prior has the mass {mass[at]}; masses are 0 or larger, finite"
        )
    if not mass.size:
        return mass
    filled = counts > 0
    begins = (counts.cumsum() - counts)[filled]
    highest = np.maximum.reduceat(mass, begins)
    if not highest.all():
        row = int(np.flatnonzero(filled)[int(np.flatnonzero(highest == 0)[0])])
        raise ValueError(
            f"the masses of request {row} of the prior sum to 0; pass a positive mass, or no items"
        )
    if highest.max() > LARGE:  # so that no sum overflows; a power of two keeps the digits
        scaled = mass * np.repeat(np.where(highest > LARGE, 2.0**-64, 1.0), counts[filled])
        mass = np.where((scaled == 0) & (mass > 0), np.finfo(np.float64).smallest_subnormal, scaled)
    return mass


def _shown(counts: np.ndarray) -> str:
    return str(counts.tolist() if len(counts) < 9 else [*counts[:8].tolist(), "…"])
