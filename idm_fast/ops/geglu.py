"""GEGLU as in diffusers: value · gelu(gate) with the exact (erf) GELU; the backward pass recomputes the gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.ops.arguments import check_floating, check_shape
from idm_fast.ops.registry import define_op, register_gradient


def geglu_reference(h: Tensor) -> Tensor:
    value, gate = h.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value).contiguous()


def geglu_backward_reference(dout: Tensor, h: Tensor) -> Tensor:
    value, gate = h.chunk(2, dim=-1)
    dh = torch.empty_like(h)
    dvalue, dgate = dh.chunk(2, dim=-1)
    dvalue.copy_(F.gelu(gate).mul_(dout))
    dgate.copy_(torch.ops.aten.gelu_backward(dout * value, gate))
    return dh


def _check_halves(h: Tensor) -> None:
    if h.ndim == 0 or h.shape[-1] % 2:
        raise ValueError(f"h is {tuple(h.shape)}, expected an even last dimension: value and gate side by side")


def _check_forward(h: Tensor) -> None:
    _check_halves(h)
    check_floating("h", h.dtype)


def _check_backward(dout: Tensor, h: Tensor) -> None:
    _check_forward(h)
    check_floating("dout", dout.dtype)
    check_shape("dout", dout, (*h.shape[:-1], h.shape[-1] // 2))


geglu_op = define_op(
    "geglu(Tensor h) -> Tensor",
    geglu_reference,
    lambda h: h.new_empty(*h.shape[:-1], h.shape[-1] // 2),
    _check_forward,
)
geglu_backward_op = define_op(
    "geglu_backward(Tensor dout, Tensor h) -> Tensor",
    geglu_backward_reference,
    lambda dout, h: torch.empty_like(h),
    _check_backward,
)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dout: Tensor) -> Tensor:
    return geglu_backward_op(dout, *ctx.saved_tensors)


register_gradient("geglu", _gradient, _setup)


def geglu(h: Tensor) -> Tensor:
    """value · gelu(gate) for `h = [value, gate]` along the last dimension: (…, 2d) → (…, d), dtype kept.

    Raises:
        ValueError: the last dimension is odd.
    """
    _check_halves(h)
    return geglu_op(h)
