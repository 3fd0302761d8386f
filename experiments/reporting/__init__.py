"""The HTML report of a search: what is counted, the figures, and the page."""

from experiments.reporting.page import write_report

__all__ = ["write_report"]
