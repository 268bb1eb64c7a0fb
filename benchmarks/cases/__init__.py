"""The cases, one a file, in the order in which they are run and reported."""

ORDER = ("parity", "memory", "training_step", "inference", "kernels", "reversible_layers", "numerics", "quality", "scaling")
