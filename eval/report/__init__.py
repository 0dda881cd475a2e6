"""Pages that show what continual runs learned and what they forgot."""

from eval.report.compare import compare, terminal_summary, write_comparison
from eval.report.page import write_report

__all__ = ["compare", "terminal_summary", "write_comparison", "write_report"]
