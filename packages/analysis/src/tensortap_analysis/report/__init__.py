"""`tensortap report`: runs, alone or against a reference, as one HTML file that opens offline."""

from tensortap_analysis.report.writing import Report, write_report

__all__ = ["Report", "write_report"]
