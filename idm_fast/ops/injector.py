"""The two halves of an injector (DESIGN §1): read an image off the features, write three images back onto them.

    read:  z   = Conv1x1(PixelShuffle_r(h)), one channel, full image size
    write: out = h + PixelUnshuffle_r(Conv1x1([z, AᵀA z, Aᵀy]))

Both are contractions over channels at low resolution: PixelShuffle then 1×1 to one channel sums C/r² channels and shuffles
r² planes; 1×1 then PixelUnshuffle spreads the unshuffled 3·r² planes over the channels. h is (B, C, H/r, W/r) with C = c·r²,
in any memory format; what has its shape has its format too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from idm_fast.ops.layout import laid_out_like
from idm_fast.ops.registry import define_op, register_gradient


def _features(h: Tensor, r: int) -> Tensor:
    """(B, c·r², h, w) as (B, c, r²·h·w)."""
    B, C, height, width = h.shape
    return h.reshape(B, C // (r * r), r * r * height * width)


def _planes(images: Tensor, r: int) -> Tensor:
    """(B, k, H, W) as (B, k, r²·h·w): the order that PixelUnshuffle gives the positions."""
    B, k, H, W = images.shape
    return images.reshape(B, k, H // r, r, W // r, r).permute(0, 1, 3, 5, 2, 4).reshape(B, k, H * W)


def inject_read_reference(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    B, _, height, width = h.shape
    z = torch.matmul(weight.to(h.dtype).reshape(1, -1), _features(h, r)) + bias.to(h.dtype)
    return F.pixel_shuffle(z.view(B, r * r, height, width), r)


def inject_read_backward_reference(
    dz: Tensor, h: Tensor, weight: Tensor, r: int, through: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    planes = _planes(dz, r)
    dh = laid_out_like(torch.matmul(weight.to(h.dtype).reshape(-1, 1), planes).view(h.shape), h)
    dw = torch.matmul(_features(h, r), planes.transpose(1, 2)).sum(0)
    dh = dh if through is None else dh.add_(through)
    return dh, dw.to(weight.dtype).reshape(weight.shape), dz.sum().to(weight.dtype).reshape(1)


def inject_write_reference(
    h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int
) -> Tensor:
    planes = _planes(torch.cat([z, gz, aty], dim=1), r)
    out = torch.matmul(weight.to(h.dtype).flatten(1), planes).add_(bias.to(h.dtype)[:, None])
    return laid_out_like(out.view(h.shape), h).add_(h)


def inject_write_backward_reference(
    dout: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, _, height, width = dout.shape
    d = _features(dout, r)
    dplanes = torch.matmul(weight.to(dout.dtype).flatten(1).t(), d)
    dimages = F.pixel_shuffle(dplanes.reshape(B, 3 * r * r, height, width), r)
    dz, dgz, daty = (t.contiguous() for t in dimages.split(1, dim=1))
    planes = _planes(torch.cat([z, gz, aty], dim=1), r)
    dw = torch.matmul(d, planes.transpose(1, 2)).sum(0)
    return dz, dgz, daty, dw.to(weight.dtype).reshape(weight.shape), d.sum((0, 2)).to(weight.dtype)


def _fake_read(h, weight, bias, r):
    B, _, height, width = h.shape
    return h.new_empty(B, 1, height * r, width * r)


def _fake_read_backward(dz, h, weight, r, through):
    return torch.empty_like(h), torch.empty_like(weight), weight.new_empty(1)


def _fake_write_backward(dout, z, gz, aty, weight, r):
    images = (z.new_empty(z.shape), gz.new_empty(gz.shape), aty.new_empty(aty.shape))
    return *images, torch.empty_like(weight), weight.new_empty(weight.shape[0])


inject_read_op = define_op(
    "inject_read(Tensor h, Tensor weight, Tensor bias, int r) -> Tensor", inject_read_reference, _fake_read
)
inject_read_backward_op = define_op(
    "inject_read_backward(Tensor dz, Tensor h, Tensor weight, int r, Tensor? through) -> (Tensor, Tensor, Tensor)",
    inject_read_backward_reference,
    _fake_read_backward,
)
inject_write_op = define_op(
    "inject_write(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, int r) -> Tensor",
    inject_write_reference,
    lambda h, z, gz, aty, weight, bias, r: torch.empty_like(h),
)
inject_write_backward_op = define_op(
    "inject_write_backward(Tensor dout, Tensor z, Tensor gz, Tensor aty, Tensor weight, int r)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    inject_write_backward_reference,
    _fake_write_backward,
)


def _setup_read(ctx, inputs, output) -> None:
    h, weight, _, ctx.r = inputs
    ctx.save_for_backward(h, weight)


def _gradient_read(ctx, dz: Tensor):
    return *inject_read_backward_op(dz, *ctx.saved_tensors, ctx.r, None), None


def _setup_write(ctx, inputs, output) -> None:
    _, z, gz, aty, weight, _, ctx.r = inputs
    ctx.save_for_backward(z, gz, aty, weight)


def _gradient_write(ctx, dout: Tensor):
    return dout, *inject_write_backward_op(dout, *ctx.saved_tensors, ctx.r), None


register_gradient("inject_read", _gradient_read, _setup_read)
register_gradient("inject_write", _gradient_write, _setup_write)


def _numel(shape) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


@register_flop_formula(torch.ops.idm_fast.inject_read)
def _flop_read(h, weight, bias, r, *args, out_shape=None, **kwargs) -> int:
    return 2 * _numel(h)


@register_flop_formula(torch.ops.idm_fast.inject_read_backward)
def _flop_read_backward(dz, h, weight, r, through, *args, out_shape=None, **kwargs) -> int:
    return 4 * _numel(h)


@register_flop_formula(torch.ops.idm_fast.inject_write)
def _flop_write(h, z, gz, aty, weight, bias, r, *args, out_shape=None, **kwargs) -> int:
    return 6 * _numel(h)


@register_flop_formula(torch.ops.idm_fast.inject_write_backward)
def _flop_write_backward(dout, z, gz, aty, weight, r, *args, out_shape=None, **kwargs) -> int:
    return 12 * _numel(dout)


def inject_read(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """Conv1x1(PixelShuffle_r(h)): (B, C, H/r, W/r) → (B, 1, H, W).

    Args:
        h: features, C a multiple of r².
        weight: (1, C/r², 1, 1). bias: (1,).

    Raises:
        ValueError: C, weight and r do not fit together.
    """
    _check(h, weight, weight.shape[1], r)
    return inject_read_op(h, weight, bias, r)


class _ReadThrough(torch.autograd.Function):
    """(z, h): what comes back to both reaches h in one pass over it, where autograd would make two gradients and add them."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor, r: int) -> tuple[Tensor, Tensor]:
        ctx.r = r
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight)
        return inject_read_op(h, weight, bias, r), h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor | None, dh: Tensor | None):
        if dz is None:
            return dh, None, None, None
        h, weight = ctx.saved_tensors
        return *inject_read_backward_op(dz, h, weight, ctx.r, dh), None


def inject_read_through(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`inject_read`, and h again, for whatever uses h besides. Arguments and errors as there."""
    _check(h, weight, weight.shape[1], r)
    return _ReadThrough.apply(h, weight, bias, r)


def inject_write(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """h + PixelUnshuffle_r(Conv1x1([z, gz, aty])).

    Args:
        h: features (B, C, H/r, W/r), C a multiple of r².
        z, gz, aty: images (B, 1, H, W) in h's dtype: what was read, AᵀA of it, and Aᵀy.
        weight: (C/r², 3, 1, 1). bias: (C/r²,).

    Raises:
        ValueError: C, weight and r do not fit together, or an image has another size or dtype.
    """
    _check(h, weight, weight.shape[0], r)
    expected = (h.shape[0], 1, h.shape[2] * r, h.shape[3] * r)
    for name, image in (("z", z), ("gz", gz), ("aty", aty)):
        if image.shape != expected or image.dtype != h.dtype:
            raise ValueError(f"{name} is {tuple(image.shape)} {image.dtype}, expected {expected} {h.dtype} as h and r={r} say")
    return inject_write_op(h, z, gz, aty, weight, bias, r)


def _check(h: Tensor, weight: Tensor, channels: int, r: int) -> None:
    if h.ndim != 4 or h.shape[1] != channels * r * r:
        expected = f"(B, {channels * r * r}, H/r, W/r)"
        raise ValueError(f"h is {tuple(h.shape)}; with r={r} and weight {tuple(weight.shape)} it must be {expected}")
