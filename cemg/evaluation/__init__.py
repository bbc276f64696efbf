"""Evaluation: HR and NDCG over the whole catalog, the leave-one-out protocol, result files and tables."""

from cemg.evaluation.metrics import (
    CUTOFFS,
    MISS,
    Metrics,
    bootstrap_interval,
    gains,
    hr,
    hr_interval,
    metrics_at,
    ndcg,
    ranks_of_targets,
)
from cemg.evaluation.paper import PrintedRow, printed_rows
from cemg.evaluation.popularity import PopularityRanker
from cemg.evaluation.protocol import COLD, Evaluation, Rank, evaluate, evaluate_lists, seeded_sample
from cemg.evaluation.results import (
    ResultRows,
    hardware,
    read_result,
    result_markdown,
    result_rows,
    result_table,
    results_of,
    write_result,
)

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
    "bootstrap_interval",
    "evaluate",
    "evaluate_lists",
    "gains",
    "hardware",
    "hr",
    "hr_interval",
    "metrics_at",
    "ndcg",
    "printed_rows",
    "ranks_of_targets",
    "read_result",
    "result_markdown",
    "result_rows",
    "result_table",
    "results_of",
    "seeded_sample",
    "write_result",
]
