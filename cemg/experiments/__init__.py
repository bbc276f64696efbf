"""The paper's experiments: which trainings a question needs, running them, and a report of their results."""

from cemg.experiments.plan import QUESTIONS, Task, plan
from cemg.experiments.report import write_experiment_report
from cemg.experiments.store import Store

__all__ = ["QUESTIONS", "Store", "Task", "plan", "write_experiment_report"]
