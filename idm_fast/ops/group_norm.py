"""GroupNorm with an optional SiLU behind it: statistics in float32 (float64 for float64 input), only they and x are kept.

Any memory format; out has x's (the strides of `torch.empty_like(x)`), and so has the gradient of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.ops.arguments import check_dtype, check_floating, check_shape, unless_own
from idm_fast.ops.layout import laid_out_like
from idm_fast.ops.registry import define_op, register_gradient


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which an op accumulates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype` as PyTorch's group norm takes it: dense, NHWC on the CPU alone and where x is."""
    if x.ndim != 4 or x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return t.to(dtype).contiguous()
    # The stride of a dimension of size 1 may be anything, and is compared all the same.
    _, C, H, W = t.shape
    return t.to(dtype).contiguous(memory_format=torch.channels_last).as_strided(t.shape, (C * H * W, 1, W * C, C))


def as_read(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter or a statistic as PyTorch's norms read it: without a look at its strides or its size."""
    return t.to(dtype).contiguous()


def _check_groups(x: Tensor, groups: int) -> None:
    """PyTorch's group norm divides by what it is given."""
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: {groups} does not divide the {x.shape[1]} channels of x")


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    if x.ndim < 2 or x.shape[1] == 0:
        raise ValueError(f"x is {tuple(x.shape)}, expected (B, C, …)")
    _check_groups(x, groups)
    check_floating("x", x.dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_floating(name, parameter.dtype)
        check_shape(name, parameter, x.shape[1:2])


def _check_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype | None
) -> None:
    _check_norm(x, weight, bias, groups)
    if dtype is not None:
        check_floating("dtype", dtype)


def _check_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> None:
    _check_norm(x, weight, bias, groups)
    check_floating("dout", dout.dtype)
    check_shape("dout", dout, x.shape)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_shape(name, statistic, (x.shape[0], groups))
        check_dtype(name, statistic, statistics_dtype(x.dtype))


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    exact = statistics_dtype(x.dtype)
    B, C = x.shape[:2]
    out, mean, rstd = torch.native_group_norm(
        _dense(x, x, exact), as_read(weight, exact), as_read(bias, exact), B, C, x.numel() // max(B * C, 1), groups, eps
    )
    if silu:
        out = F.silu(out, inplace=True)
    return laid_out_like(out, x, dtype or x.dtype), mean, rstd


def group_norm_silu_backward_reference(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    exact = statistics_dtype(x.dtype)
    B, C = x.shape[:2]
    spatial = (1,) * (x.ndim - 2)
    xf, w, g = _dense(x, x, exact), as_read(weight, exact), _dense(dout, x, exact)
    if silu:
        scale = rstd.repeat_interleave(C // groups, dim=1) * w
        shift = bias.to(exact) - mean.repeat_interleave(C // groups, dim=1) * scale
        u = torch.addcmul(shift.view(B, C, *spatial), xf, scale.view(B, C, *spatial))
        g = torch.ops.aten.silu_backward(g, u)
    mean, rstd = (as_read(t.expand(B, groups), exact) for t in (mean, rstd))
    dx, dw, db = torch.ops.aten.native_group_norm_backward(
        g, xf, mean, rstd, w, B, C, x.numel() // max(B * C, 1), groups, [True, True, True]
    )
    return laid_out_like(dx, x, x.dtype), dw.to(weight.dtype), db.to(bias.dtype)


def _fake(x, weight, bias, groups, eps, silu, dtype):
    statistics = x.new_empty(x.shape[0], groups, dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x, dtype=dtype), statistics, statistics.clone()


group_norm_silu_op = define_op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, ScalarType? dtype)"
    " -> (Tensor, Tensor, Tensor)",
    group_norm_silu_reference,
    _fake,
    _check_forward,
)
group_norm_silu_backward_op = define_op(
    "group_norm_silu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups,"
    " bool silu) -> (Tensor, Tensor, Tensor)",
    group_norm_silu_backward_reference,
    lambda dout, x, weight, bias, mean, rstd, groups, silu: (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(bias),
    ),
    _check_backward,
)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradient(ctx, dout: Tensor):
    dx, dw, db = group_norm_silu_backward_op(dout, *ctx.saved_tensors, ctx.groups, ctx.silu)
    return dx, dw, db, None, None, None, None


register_gradient("group_norm_silu", _gradient, _setup)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """silu(group_norm(x)), or group_norm(x) with `silu=False`.

    Args:
        x: (B, C, …), any floating dtype.
        weight, bias: (C,).
        groups: divides C.
        eps: added to the variance.
        dtype: of the output; x's own when None. Under autocast the caller asks for the dtype that the next layer wants.

    Raises:
        ValueError: C is not a multiple of `groups`, or weight and bias are not (C,).
    """
    C = x.shape[1]
    _check_groups(x, groups)
    if weight.shape != (C,) or bias.shape != (C,):
        found = f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}"
        raise ValueError(f"{found} must both be ({C},), as x has {C} channels")
    return group_norm_silu_op(x, weight, bias, groups, eps, silu, unless_own(dtype, x))[0]
