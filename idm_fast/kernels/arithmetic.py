"""Arithmetic that the kernels share: the dtype in which they compute, and what Triton rounds worse than PyTorch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a kernel computes on `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def exact(x):
    """x in the dtype of the arithmetic, that of `arithmetic_dtype`."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def divide(a, b):
    """a / b rounded to nearest. Triton's `/` is that in float64 alone, and off by up to 2 units in float32."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """√x rounded to nearest; Triton's is approximate in float32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)
