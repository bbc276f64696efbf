"""Baselines under the same protocol as CEMG: their rankers are arguments of ``cemg.evaluation.evaluate``."""

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
