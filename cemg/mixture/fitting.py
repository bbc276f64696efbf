"""Fitting a gate for NDCG@10 on validation users, from the candidates that searches found for them.

U users, C candidates of each, S sources, E = 1 + S experts (the generator first), F features. The likelihood
of the targets is not used: it prefers much smaller weights for the sources than HR and NDCG do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cemg.mixture.gate import Gate, feature_names

DEPTH = 10  # of the NDCG that is maximized
POWERS = (1.0, 1.3, 1.6, 2.0, 2.5, 3.2)
STEP = {2: 0.05, 3: 0.1}  # of the weights that are tried, by number of experts
PENALTIES = (3e-4, 1e-3, 4e-3)  # on the squares of the slopes
FOLDS = 5
STEPS, RATE = 100, 0.05  # of the optimizer of the slopes
COMPARED = 64  # candidates per user, the best of the average of all experts, that the slopes are fitted on
SMOOTH = 0.15  # score difference that the smooth rank counts as a half
LOWEST = -1e4  # in place of the logarithm of 0, whose gradient is not a number; its exponential is 0
LEAST = 0.02  # weight that the slopes start from at least, so that a gradient exists


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the searches found for users whose target is among the candidates.

    Attributes:
        generator: Log-probabilities of the generator, [U, C] float32, -inf at padding.
        masses: Logarithms of the sources' masses, [U, C, S] float32, -inf where a source has none.
        totals: Logarithms of the sums of masses to each of POWERS, [U, S, len(POWERS)].
        target: Position of the target among the candidates, [U] int64.
        features: [U, F] float64.
        present: Whether each source says something about the history, [U, S] bool.
        users: Number of users that were searched, U of which have a target among their candidates.
    """

    generator: Tensor
    masses: Tensor
    totals: Tensor
    target: Tensor
    features: np.ndarray
    present: np.ndarray
    users: int

    def experts(self, powers: Sequence[float]) -> Tensor:
        """Return the logarithms of the experts' probabilities with these powers, [U, C, E] float32."""
        columns = [self.generator]
        for source, power in enumerate(powers):
            total = self.totals[:, source, POWERS.index(power)]
            columns.append(power * self.masses[:, :, source] - total[:, None])
        return torch.stack(columns, dim=2).masked_fill(self.generator[:, :, None].isneginf(), float("-inf"))

    def take(self, rows: np.ndarray) -> Candidates:
        """Return some of the users."""
        at = torch.from_numpy(rows)
        return Candidates(
            self.generator[at], self.masses[at], self.totals[at], self.target[at], self.features[rows],
            self.present[rows], len(rows),
        )  # fmt: skip


def gains_of(experts: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Return the NDCG@10 of each user, [U] float64.

    Args:
        experts: Log-probabilities, [U, C, E].
        weights: [U, E] or [E].
        target: [U].
    """
    scores = mixed(experts, weights)
    own = scores.gather(1, target[:, None])
    ranks = (scores > own).sum(1)
    listed = (ranks < DEPTH) & ~own[:, 0].isneginf()  # a list has no items of probability 0
    return listed / torch.log2(ranks.double() + 2)


def mixed(experts: Tensor, weights: Tensor) -> Tensor:
    """Return the logarithms of the mixture, [U, C]."""
    logs = weights.to(experts.dtype).log()
    return torch.logsumexp(experts + (logs if logs.ndim == 1 else logs[:, None]), dim=2)


def fit_gate(found: Candidates, sources: Sequence[str], *, memory: str, log: Any = None) -> Gate:
    """Fit the constant mixture and the gate.

    The slopes of the gate are penalized. Cross-validation over users chooses the penalty, and whether the
    gate weighs experts without a weight in the constant mixture. It keeps the constant mixture, with its
    weights of 0 and 1, where no gate is better.
    """
    weights, powers = best_constant(found)
    experts = found.experts(powers)
    means, scales = found.features.mean(0), np.maximum(found.features.std(0), 1e-6)
    features = torch.from_numpy((found.features - means) / scales).float()
    present = torch.from_numpy(found.present)
    used = sum(weight > 0 for weight in weights)
    tried = list(itertools.product(PENALTIES, (True, False) if 1 < used < len(weights) else (False,)))
    held_out = dict.fromkeys(tried, 0.0)  # of ties, the first is kept: with fewer experts
    constant = 0.0
    for train, test in folds(len(found.target)):
        own, _ = best_constant(found.take(train), powers)
        constant += total_gain(experts, found.target, test, masked(torch.tensor(own), present))
        for penalty, narrow in tried:
            bias, slopes = fit_slopes(
                experts[train], found.target[train], features[train], present[train], own, penalty,
                narrow=narrow,
            )  # fmt: skip
            gates = masked(torch.softmax(bias + features @ slopes, 1), present)
            held_out[penalty, narrow] += total_gain(experts, found.target, test, gates)
    best = max(tried, key=lambda one: held_out[one])
    gated = held_out[best] > constant
    bias, slopes = (
        fit_slopes(experts, found.target, features, present, weights, best[0], narrow=best[1])
        if gated
        else (exact_logits(weights), torch.zeros(features.shape[1], len(weights)))
    )
    alone = {
        name: float(gains_of(experts, masked(one, present), found.target).sum()) / found.users
        for name, one in zip(("generator", *sources), torch.eye(len(weights)), strict=True)
    }
    reached = held_out[best] if gated else constant
    fit = {
        "users": found.users, "users_with_target": len(found.target), "penalty": best[0] if gated else None,
        "ndcg10": {**alone, "constant": constant / found.users, "gate": reached / found.users},
    }  # fmt: skip
    return Gate(
        sources=list(sources), powers=list(powers), constant=weights, bias=bias.tolist(),
        slopes=slopes.tolist(), means=means.tolist(), scales=scales.tolist(), memory=memory, fit=fit,
    )  # fmt: skip


def default_gate(sources: Sequence[str], *, memory: str) -> Gate:
    """Return equal weights for all experts, for data on which nothing can be fitted."""
    experts, features = 1 + len(sources), len(feature_names(sources))
    return Gate(
        sources=list(sources), powers=[POWERS[2]] * len(sources), constant=[1 / experts] * experts,
        bias=[0.0] * experts, slopes=[[0.0] * experts] * features, means=[0.0] * features,
        scales=[1.0] * features, memory=memory,
    )  # fmt: skip


def best_constant(
    found: Candidates, powers: tuple[float, ...] | None = None
) -> tuple[list[float], tuple[float, ...]]:
    """Return the weights [E] and powers [S] with the best NDCG@10; the first wins ties.

    Args:
        found: The candidates.
        powers: The powers; None tries one power for all sources, then others for one source at a time.
    """
    sources = found.masses.shape[2]
    if powers is not None:
        return _best_weights(found, powers)[1], powers
    gain, weights, powers = max(
        (_best_weights(found, (power,) * sources) for power in POWERS), key=lambda tried: tried[0]
    )
    for source in range(sources if sources > 1 else 0):
        for power in POWERS:
            tried = (*powers[:source], power, *powers[source + 1 :])
            own = _best_weights(found, tried)
            if own[0] > gain:
                gain, weights, powers = own
    return weights, powers


def _best_weights(
    found: Candidates, powers: tuple[float, ...]
) -> tuple[float, list[float], tuple[float, ...]]:
    """Return the best NDCG@10 on the grid of weights, summed over users, its weights, and the powers."""
    experts, present = found.experts(powers), torch.from_numpy(found.present)
    tried = list(simplex(experts.shape[2]))
    gains = [
        float(gains_of(experts, masked(torch.tensor(weights), present), found.target).sum())
        for weights in tried
    ]
    best = max(range(len(tried)), key=gains.__getitem__)
    return gains[best], tried[best], powers


def simplex(experts: int) -> Iterator[list[float]]:
    """Iterate over weights [E] that sum to 1, in steps of STEP."""
    steps = round(1 / STEP.get(experts, 0.2))
    for parts in itertools.product(range(steps + 1), repeat=experts - 1):
        if sum(parts) <= steps:
            yield [(steps - sum(parts)) / steps, *(part / steps for part in parts)]


def masked(weights: Tensor, present: Tensor) -> Tensor:
    """Return weights [U, E] that are 0 for absent sources and sum to 1; all of it may be the generator's."""
    allowed = weights.expand(len(present), -1) * torch.cat((torch.ones(len(present), 1), present), dim=1)
    total = allowed.sum(1, keepdim=True)
    alone = torch.eye(weights.shape[-1])[0]
    return torch.where(total > 0, allowed / total.clamp_min(1e-12), alone)


def starting_logits(weights: Sequence[float]) -> Tensor:
    """Return logits [E] whose softmax is the weights, each at least LEAST."""
    logits = torch.tensor(weights).clamp_min(LEAST).log()
    return logits - logits.mean()


def exact_logits(weights: Sequence[float]) -> Tensor:
    """Return logits [E] whose softmax is the weights, those of 0 among them."""
    logits = torch.tensor(weights, dtype=torch.float64).log()
    return logits.clamp_min(LOWEST)


def fit_slopes(
    experts: Tensor, target: Tensor, features: Tensor, present: Tensor, start: Sequence[float],
    penalty: float, *, narrow: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Maximize a smooth NDCG@10 by Adam, from the constant weights ``start``.

    With ``narrow``, experts of weight 0 keep it. Returns the bias [E] and the slopes [F, E].
    """
    experts, target = narrowed(experts, target)
    unused = torch.tensor([narrow and weight == 0 for weight in start])
    bias = starting_logits(start).requires_grad_()
    slopes = torch.zeros(features.shape[1], len(start), requires_grad=True)
    optimizer = torch.optim.Adam([bias, slopes], lr=RATE)
    for _ in range(STEPS):
        logits = (bias + features @ slopes).masked_fill(unused, LOWEST)
        weights = masked(torch.softmax(logits, dim=1), present)
        loss = penalty * slopes.square().sum() - smooth_gain(experts, weights, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bias.detach().masked_fill(unused, LOWEST), slopes.detach()


def narrowed(experts: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target and the best other candidates of each user, and the position of the target, 0."""
    average = mixed(experts, torch.full((experts.shape[2],), 1 / experts.shape[2]))
    average = average.scatter(1, target[:, None], float("inf"))
    best = average.topk(min(COMPARED, average.shape[1]), dim=1).indices  # the target comes first
    chosen = experts.gather(1, best[:, :, None].expand(-1, -1, experts.shape[2]))
    return chosen.clamp_min(LOWEST), torch.zeros_like(target)


def smooth_gain(experts: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Return a differentiable NDCG@10, [U]: ranks count other candidates by a sigmoid of the difference."""
    scores = torch.logsumexp(experts + weights.clamp_min(1e-9).log()[:, None], dim=2)  # [U, C]
    own = scores.gather(1, target[:, None])
    ranks = torch.sigmoid((scores - own) / SMOOTH).sum(1) - 0.5  # without the target itself
    return torch.sigmoid(DEPTH - 0.5 - ranks) / torch.log2(ranks + 2)


def total_gain(experts: Tensor, target: Tensor, rows: np.ndarray, weights: Tensor) -> float:
    """Return the sum of the NDCG@10 of some users."""
    at = torch.from_numpy(rows)
    return float(gains_of(experts[at], weights[at], target[at]).sum())


def folds(users: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over FOLDS pairs of rows to fit on and rows to test on."""
    order = np.random.default_rng(seed).permutation(users)
    for part in np.array_split(order, FOLDS):
        yield np.setdiff1d(order, part), np.sort(part)
