"""`tensortap scan`: weights of a checkpoint measured, judged and shown."""
