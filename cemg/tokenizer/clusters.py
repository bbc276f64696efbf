"""Clusters of equal size of the codes of a level, and the diversity loss that reads them.

A code is pulled to the other codes of its cluster, so that the codes spread evenly.

Source: LETTER, https://arxiv.org/abs/2405.07314, section 3.2, diversity regularization.

B items, K codes of width Z, C clusters.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 10  # assignments of balanced k-means


def balanced_clusters(codebook: Tensor, clusters: int, *, seed: int) -> Tensor:
    """The cluster of each code, int64 [K], by k-means whose clusters differ in size by at most one.

    Each round assigns the codes [K, Z] to the centers at minimum total cost, where each center has a fixed
    number of places, and moves the centers to the means of their codes.
    """
    from scipy.optimize import linear_sum_assignment  # not needed at inference
    from sklearn.cluster import kmeans_plusplus

    codes = codebook.detach().cpu().double().numpy()
    count = min(clusters, len(codes))
    centers = kmeans_plusplus(codes, count, random_state=seed)[0]  # [C, Z]
    places = np.arange(len(codes)) % count  # the cluster of each place
    labels = np.full(len(codes), -1)
    for _ in range(ROUNDS):
        distance = np.square(codes[:, None] - centers).sum(2)  # [K, C]
        before, labels = labels, places[linear_sum_assignment(distance[:, places])[1]]
        if np.array_equal(before, labels):
            break
        centers = np.stack([codes[labels == cluster].mean(0) for cluster in range(count)])
    return torch.from_numpy(labels).long().to(codebook.device)


def cluster_loss(codes: Tensor, codebook: Tensor, clusters: Tensor) -> Tensor:
    """The mean of −log softmax_k(⟨v_c, v_k⟩), k ≠ c, at a random other code of the cluster of c.

    Items whose code is alone in its cluster do not count; if no item is left, the loss is 0. The random codes
    are drawn from torch's global generator.

    Args:
        codes: int64 [B], the code c of each item.
        codebook: [K, Z], the vectors v.
        clusters: int64 [K], the cluster of each code.
    """
    is_own = F.one_hot(codes, len(codebook)).bool()  # [B, K]
    partners = (clusters[codes, None] == clusters) & ~is_own
    has_partner = partners.any(1)
    if not bool(has_partner.any()):
        return codebook.new_zeros(())
    drawn = torch.multinomial(partners[has_partner].float(), 1)[:, 0]
    logits = F.embedding(codes[has_partner], codebook) @ codebook.t()
    return F.cross_entropy(logits.masked_fill(is_own[has_partner], float("-inf")), drawn)
