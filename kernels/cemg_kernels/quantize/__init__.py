"""Residual quantization: finds the nearest code on every level."""
