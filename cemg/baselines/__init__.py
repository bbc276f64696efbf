"""Baselines under the same protocol as CEMG: their rankers are arguments of ``cemg.evaluation.evaluate``."""

from cemg.baselines.dense import train_dense

__all__ = ["train_dense"]
