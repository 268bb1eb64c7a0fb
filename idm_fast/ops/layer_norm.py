"""LayerNorm over the last dimension: statistics in float32 (float64 for float64 input), the output in the dtype asked for.

Under autocast PyTorch makes a float32 copy of a half-precision input, keeps it, and writes a float32 output that the next layer
converts; here only x, the mean and the reciprocal deviation are kept, and the output is what the next layer wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.ops.arguments import check_dtype, check_floating, check_shape, unless_own
from idm_fast.ops.group_norm import as_read, statistics_dtype
from idm_fast.ops.registry import define_op, register_gradient


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError(f"x is {tuple(x.shape)}, expected (…, C)")
    check_floating("x", x.dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_floating(name, parameter.dtype)
        check_shape(name, parameter, x.shape[-1:])


def _check_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    _check_norm(x, weight, bias)
    if dtype is not None:
        check_floating("dtype", dtype)


def _check_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _check_norm(x, weight, bias)
    check_floating("dout", dout.dtype)
    check_shape("dout", dout, x.shape)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_shape(name, statistic, (*x.shape[:-1], 1))
        check_dtype(name, statistic, statistics_dtype(x.dtype))


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    exact = statistics_dtype(x.dtype)
    w, b = as_read(weight, exact), as_read(bias, exact)
    out, mean, rstd = torch.native_layer_norm(x.to(exact), weight.shape, w, b, eps)
    return out.to(dtype or x.dtype), mean, rstd


def layer_norm_backward_reference(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    exact = statistics_dtype(x.dtype)
    w, b = as_read(weight, exact), as_read(bias, exact)
    mean, rstd = (as_read(t.expand(*x.shape[:-1], 1), exact) for t in (mean, rstd))
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dout.expand_as(x).to(exact), x.to(exact), weight.shape, mean, rstd, w, b, [True, True, True]
    )
    return dx.to(x.dtype), dw.to(weight.dtype), db.to(bias.dtype)


def _fake(x, weight, bias, eps, dtype):
    statistics = x.new_empty(*x.shape[:-1], 1, dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


layer_norm_op = define_op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)",
    layer_norm_reference,
    _fake,
    _check_forward,
)
layer_norm_backward_op = define_op(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_backward_reference,
    lambda dout, x, weight, bias, mean, rstd: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        torch.empty_like(bias),
    ),
    _check_backward,
)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradient(ctx, dout: Tensor):
    return *layer_norm_backward_op(dout, *ctx.saved_tensors), None, None


register_gradient("layer_norm", _gradient, _setup)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """(x − mean)/√(variance + eps)·weight + bias over the last dimension.

    Args:
        x: (…, C), any floating dtype.
        weight, bias: (C,).
        eps: added to the variance.
        dtype: of the output; x's own when None. Under autocast the caller asks for the dtype that the next layer wants.

    Raises:
        ValueError: weight and bias are not (C,).
    """
    C = x.shape[-1]
    if weight.shape != (C,) or bias.shape != (C,):
        found = f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}"
        raise ValueError(f"{found} must both be ({C},), the last dimension of x")
    return layer_norm_op(x, weight, bias, eps, unless_own(dtype, x))[0]
