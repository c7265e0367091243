"""Whether a measured difference is more than what must be accepted."""
