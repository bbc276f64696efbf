"""The report of a run: one HTML page that opens from disk, drawn from the files that the stages wrote."""

from cemg.report.logs import read_log
from cemg.report.page import write_report
from cemg.report.sections import fusion_facts

__all__ = ["fusion_facts", "read_log", "write_report"]
