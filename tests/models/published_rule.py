"""The rule by which the parity data's weights and probe vectors are made, so that 115 M weights need not be stored."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def _draw(name: str, shape: torch.Size, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) ^ salt) & 0x7FFFFFFF)
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()


def weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Value of the parameter whose first name in the published network is `name`, float64."""
    r = _draw(name, shape, seed * 2654435761)
    if name.endswith(".v") or name == "alpha":
        return 0.5 + 0.05 * r
    if "input_help_scale_factor" in name:
        return 1 + 0.1 * r
    if "merge_scale_factor" in name:
        return 0.3 * r
    if len(shape) >= 2:
        return r / r[0].numel() ** 0.5
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * r
    return 0.1 * r


def probe(name: str, numel: int) -> Tensor:
    """The vector whose inner product with the gradient is `grad_dot`."""
    return _draw(name, torch.Size([numel]))
