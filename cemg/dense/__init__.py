"""SASRec and BSARec, which score every item of the catalog by a dot product.

This layer has the models. ``cemg.baselines`` trains them.
"""

from cemg.dense.config import DenseConfig
from cemg.dense.cross_entropy import linear_cross_entropy
from cemg.dense.encoder import SequenceEncoder
from cemg.dense.histories import pad_histories
from cemg.dense.ranker import DENSE_FILES, DenseRanker

__all__ = [
    "DENSE_FILES",
    "DenseConfig",
    "DenseRanker",
    "SequenceEncoder",
    "linear_cross_entropy",
    "pad_histories",
]
