"""Results that lie in memory as an input does: NHWC stays NHWC."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_like(t: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`t` with the strides of `torch.empty_like(x)`, and in `dtype` (None: its own); one pass at most, none where it is so."""
    dtype = dtype or t.dtype
    if (t.dtype, t.stride()) == (dtype, x.stride()):
        return t
    like = torch.empty_like(x, dtype=dtype)
    return t if (t.dtype, t.stride()) == (dtype, like.stride()) else like.copy_(t)
