"""The transformer's gated feed-forward, out = geglu(x·W1ᵀ + b1)·W2ᵀ + b2, without ever holding its hidden layer whole.

The hidden layer is 8 times as wide as x (value and gate, 4·C each) and GEGLU's output 4 times; autograd keeps both, and their
gradients come on top. Here rows go through in chunks, forward and backward, and backward computes the hidden rows again:
16·C² of the 24·C² multiply-adds a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.ops.geglu import geglu, geglu_backward_op


class _ChunkedFeedForward(torch.autograd.Function):
    """x (rows, C), all tensors of one dtype. Gradients of the weights are summed over the chunks in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, w1, b1, w2)
        out = x.new_empty(x.shape[0], w2.shape[0])
        for chunk, part in zip(x.split(rows), out.split(rows), strict=True):
            torch.addmm(b2, geglu(F.linear(chunk, w1, b1)), w2.t(), out=part)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        x, w1, b1, w2 = ctx.saved_tensors
        dx = torch.empty_like(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        sums: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            for chunk, d, part in zip(x.split(ctx.rows), dout.split(ctx.rows), dx.split(ctx.rows), strict=True):
                terms = _chunk_backward(chunk, d, w1, b1, w2, part)
                sums = [s.add_(t) for s, t in zip(sums, terms, strict=True)] if sums else [t.to(exact) for t in terms]
        dw1, db1, dw2, db2 = (s.to(x.dtype) for s in sums)
        return dx, dw1, db1, dw2, db2, None


def _chunk_backward(x: Tensor, d: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, dx: Tensor) -> list[Tensor]:
    """Writes dx; returns this chunk's part of dW1, db1, dW2, db2."""
    h = F.linear(x, w1, b1)
    dw2 = d.t().mm(geglu(h))
    dh = geglu_backward_op(d.mm(w2), h)
    torch.mm(dh, w1, out=dx)
    return [dh.t().mm(x), dh.sum(0), dw2, d.sum(0)]


def chunked_feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: int) -> Tensor:
    """geglu(x·W1ᵀ + b1)·W2ᵀ + b2 with at most `rows` rows of the hidden layer alive; one gradient only, not two.

    Args:
        x: (…, C).
        w1: (2·D, C), value above gate. b1: (2·D,). w2: (C_out, D). b2: (C_out,).
        rows: positive.

    Returns:
        (…, C_out), in autocast's dtype where it is on, else x's.

    Raises:
        ValueError: rows is not positive.
    """
    if rows < 1:
        raise ValueError(f"rows: {rows} is not positive")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    tensors = (t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), w1, b1, w2, b2))
    with torch.autocast(device, enabled=False):
        out = _ChunkedFeedForward.apply(*tensors, rows)
    return out.view(*x.shape[:-1], w2.shape[0])
