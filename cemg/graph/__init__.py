"""The user–item graph and its collaborative embeddings (SPEC §2.4)."""

from cemg.graph.lightgcn import Collaborative, GraphConfig, train_lightgcn

__all__ = ["Collaborative", "GraphConfig", "train_lightgcn"]
