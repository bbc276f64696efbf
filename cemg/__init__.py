"""CEMG: collaborative-enhanced multimodal generative recommendation."""

__version__ = "0.1.0"
