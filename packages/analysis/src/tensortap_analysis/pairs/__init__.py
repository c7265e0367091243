"""Which tensors of two runs belong together, and how they are laid over each other."""
