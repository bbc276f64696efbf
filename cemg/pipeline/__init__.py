"""Building the stages of a run: pipeline, checks, dry run and retraining."""

from cemg.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
