"""The user–item graph and its collaborative embeddings (paper §3.2.2).

Training is in ``cemg.graph.lightgcn``, which inference does not import.
"""

from cemg.graph.config import GraphConfig

__all__ = ["GraphConfig"]
