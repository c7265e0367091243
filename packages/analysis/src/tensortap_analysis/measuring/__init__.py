"""Measuring a pair: values where both runs have them, else samples, else statistics."""
