"""What the ops ask of their arguments, in words that name the argument, what came and what was expected: ValueError.

The public functions of the other files check what users pass. Behind every op stands a check of all its arguments besides, for
implementations in Python, which would otherwise broadcast what does not fit, or read beyond it; the native ones have their
own (csrc/register).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def unless_own(dtype: torch.dtype | None, x: Tensor) -> torch.dtype | None:
    """`dtype`, or None where it is x's own: at an operator's call PyTorch takes microseconds for an argument of this type."""
    return None if dtype == x.dtype else dtype


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} is {tuple(x.shape)}, expected {tuple(expected)}")


def check_dtype(name: str, x: Tensor, expected: torch.dtype) -> None:
    if x.dtype != expected:
        raise ValueError(f"{name} is {x.dtype}, expected {expected}")


def check_floating(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}, expected float32, float64, bfloat16 or float16")


def check_number(name: str, x: Tensor) -> None:
    """One floating-point element, in any shape."""
    if x.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected one element")
    check_floating(name, x.dtype)
