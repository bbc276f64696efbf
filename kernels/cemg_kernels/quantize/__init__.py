"""Residual quantization: the nearest code of every level."""
