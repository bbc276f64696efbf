"""Attention of a beam decoder (shared prompt, tree of beams) and the streamed log-sum-exp of logits."""
