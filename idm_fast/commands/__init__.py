"""What the sub-commands of `idm-fast` do: one module each, with `run(arguments)`, imported on call."""
