"""`compare` and its command: what was found, judged, saved and told."""
