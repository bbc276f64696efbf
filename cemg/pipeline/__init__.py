"""All stages of a run: what is built, what is reused, and what a retraining replaces."""

from cemg.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
