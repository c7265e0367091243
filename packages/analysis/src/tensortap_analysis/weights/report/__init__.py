"""A scan as one HTML file: what is wrong, spectra, formats, histograms, every layer."""

from tensortap_analysis.weights.report.page import write_scan_report
from tensortap_analysis.weights.report.spread import Histogram, histograms

__all__ = ["Histogram", "histograms", "write_scan_report"]
