"""The models without a neural network: popularity, the floor, and the item memory, the bar."""

from __future__ import annotations

import dataclasses

from cemg.baselines.registry import Fitted, Job
from cemg.evaluation import PopularityRanker, evaluate
from cemg.memory import MemoryConfig, build


@dataclasses.dataclass(frozen=True, slots=True)
class PopularityConfig:
    """Popularity has no settings."""


def fit_popularity(job: Job) -> Fitted:
    """Rank items by their number of training interactions, the same list for everyone."""
    job.config(PopularityConfig)
    return Fitted(PopularityRanker.fit(job.data.split()), {"model": "popularity"})


def fit_memory(job: Job) -> Fitted:
    """Build the item memory, whose constants are chosen on validation users."""
    config, split = job.config(MemoryConfig), job.data.split()
    memory = build.fit_memory(job.data, split, config=config)
    found = evaluate(memory.ranker(), split, part="valid")
    valid = {"metrics": found.metrics, "metrics_history_removed": found.metrics_history_removed}
    constants = dataclasses.asdict(memory.constants)
    about = {"model": "memory", **dataclasses.asdict(memory.config)}
    return Fitted(memory.ranker(), about, {"constants": constants, "validation": valid})
