"""Evaluation: HR and NDCG over the whole catalog, the protocol, result files and tables."""

from cemg.evaluation.metrics import (
    CUTOFFS,
    MISS,
    Metrics,
    bootstrap_interval,
    gains,
    hr,
    hr_interval,
    intervals_at,
    metrics_at,
    ndcg,
    paired_differences,
    ranks_of_targets,
)
from cemg.evaluation.paper import PrintedRow, printed_rows
from cemg.evaluation.popularity import PopularityRanker
from cemg.evaluation.protocol import COLD, Evaluation, Rank, evaluate, evaluate_lists, seeded_sample
from cemg.evaluation.results import (
    differences_of,
    hardware,
    ranks_of,
    read_result,
    restrict,
    results_of,
    write_result,
)
from cemg.evaluation.sample import Sample
from cemg.evaluation.tables import ResultRows, result_markdown, result_rows, result_table

__all__ = [
    "COLD",
    "CUTOFFS",
    "MISS",
    "Evaluation",
    "Metrics",
    "PopularityRanker",
    "PrintedRow",
    "Rank",
    "ResultRows",
    "Sample",
    "bootstrap_interval",
    "differences_of",
    "evaluate",
    "evaluate_lists",
    "gains",
    "hardware",
    "hr",
    "hr_interval",
    "intervals_at",
    "metrics_at",
    "ndcg",
    "paired_differences",
    "printed_rows",
    "ranks_of",
    "ranks_of_targets",
    "read_result",
    "restrict",
    "result_markdown",
    "result_rows",
    "result_table",
    "results_of",
    "seeded_sample",
    "write_result",
]
