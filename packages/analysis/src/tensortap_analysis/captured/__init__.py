"""Captured runs as analysis reads them: their tensors in execution order, and their own words."""
