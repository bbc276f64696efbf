"""Baselines under one protocol: rankers ``(histories, top) -> [B, top]`` for ``cemg.evaluation.evaluate``."""

from cemg.baselines.cross_entropy import linear_cross_entropy
from cemg.baselines.sasrec import Sasrec, SasrecConfig, SasrecRanker
from cemg.baselines.sasrec_training import train_sasrec

__all__ = [
    "Sasrec",
    "SasrecConfig",
    "SasrecRanker",
    "linear_cross_entropy",
    "train_sasrec",
]
