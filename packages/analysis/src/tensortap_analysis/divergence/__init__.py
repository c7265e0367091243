"""Where two runs part: errors a layer adds, told from those that it inherits."""
