"""Attention of a beam decoder (shared prompt, beam tree), and the log-sum-exp of logits."""

from .beam_tree import beam_tree_attention
from .logsumexp import row_logsumexp
from .shared_prefix import shared_prefix_attention

__all__ = ["beam_tree_attention", "row_logsumexp", "shared_prefix_attention"]
