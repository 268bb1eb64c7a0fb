"""The cases, one a file, in the order in which they are run and reported."""

ORDER = (
    "parity",
    "kernels",
    "memory",
    "training_step",
    "inference",
    "attention",
    "reversible_layers",
    "numerics",
    "quality",
    "scaling",
)
