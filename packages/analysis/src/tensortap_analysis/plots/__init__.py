"""Pictures of runs: `tensortap plot`, and `plots.gallery.plot` from Python."""
