"""Measurement operators. Any object with `A`, `A_adjoint` (and `A_dagger` where A Aᵀ ≠ I) serves; the ones here are fast."""

from idm_fast.physics.block_cs import BlockCompressedSensing, measurements_per_block, sensing_matrix, sensing_sequence

__all__ = ["BlockCompressedSensing", "measurements_per_block", "sensing_matrix", "sensing_sequence"]
