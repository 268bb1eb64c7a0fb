"""The two halves of an injector (DESIGN §1): read an image off the features, write three images back onto them.

    read:  z   = Conv1x1(PixelShuffle_r(h)), one channel, full image size
    write: out = h + PixelUnshuffle_r(Conv1x1([z, AᵀA z, Aᵀy]))
    inject_couple: y1 = (1−v)·out + v·x2, the coupling of a reversible chain behind it; `inject_uncouple` is its inverse with
           the gradients. `out` is then never in memory.

Both are contractions over channels at low resolution: PixelShuffle then 1×1 to one channel sums C/r² channels and shuffles
r² planes; 1×1 then PixelUnshuffle spreads the unshuffled 3·r² planes over the channels. h is (B, C, H/r, W/r) with C = c·r²,
in any memory format; what has its shape has its format too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from idm_fast.ops.arguments import check_dtype, check_floating, check_number, check_shape
from idm_fast.ops.coupling import check_coupling, couple_backward_reference, couple_reference
from idm_fast.ops.layout import laid_out_like
from idm_fast.ops.registry import define_op, register_gradient

CoupledGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""dh, dz, dgz, daty, dweight, dbias, dx2, dv."""

_IMAGES = "Tensor z, Tensor gz, Tensor aty"
_WRITE = "Tensor weight, Tensor bias"


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _features(h: Tensor, r: int) -> Tensor:
    """(B, c·r², h, w) as (B, c, r²·h·w)."""
    B, C, height, width = h.shape
    return h.reshape(B, C // (r * r), r * r * height * width)


def _planes(images: Tensor, r: int) -> Tensor:
    """(B, k, H, W) as (B, k, r²·h·w): the order that PixelUnshuffle gives the positions."""
    B, k, H, W = images.shape
    return images.reshape(B, k, H // r, r, W // r, r).permute(0, 1, 3, 5, 2, 4).reshape(B, k, H * W)


def _contract(weight: Tensor, x: Tensor) -> Tensor:
    """(k, c), (B, c, n) → (B, k, n). What torch.matmul makes of it, and how it rounds, depends on requires_grad, which a replay
    of a reversible chain may not find as it was."""
    return torch.bmm(weight.to(x.dtype).expand(x.shape[0], *weight.shape), x)


def inject_read_reference(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    B, _, height, width = h.shape
    z = _contract(weight.reshape(1, -1), _features(h, r)) + bias.to(h.dtype)
    return F.pixel_shuffle(z.view(B, r * r, height, width), r)


def inject_read_backward_reference(
    dz: Tensor, h: Tensor, weight: Tensor, r: int, through: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    planes = _planes(dz, r)
    dh = laid_out_like(_contract(weight.reshape(-1, 1), planes).view(h.shape), h)
    dw = torch.matmul(_features(h, r), planes.transpose(1, 2)).sum(0)
    dh = dh if through is None else dh.add_(through)
    return dh, dw.to(weight.dtype).reshape(weight.shape), dz.sum().to(weight.dtype).reshape(1)


def inject_write_reference(
    h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int
) -> Tensor:
    planes = _planes(torch.cat([z, gz, aty], dim=1), r)
    out = _contract(weight.flatten(1), planes).add_(bias.to(h.dtype)[:, None])
    return laid_out_like(out.view(h.shape), h).add_(h)


def inject_write_backward_reference(
    dout: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, _, height, width = dout.shape
    d = _features(dout, r)
    dplanes = _contract(weight.flatten(1).t(), d)
    dimages = F.pixel_shuffle(dplanes.reshape(B, 3 * r * r, height, width), r)
    dz, dgz, daty = (t.contiguous() for t in dimages.split(1, dim=1))
    planes = _planes(torch.cat([z, gz, aty], dim=1), r)
    dw = torch.matmul(d, planes.transpose(1, 2)).sum(0)
    return dz, dgz, daty, dw.to(weight.dtype).reshape(weight.shape), d.sum((0, 2)).to(weight.dtype)


def inject_couple_reference(
    h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> Tensor:
    out = inject_write_reference(h, z, gz, aty, weight, bias, r)
    return laid_out_like(couple_reference(out, x2, v), x2)


def inject_couple_backward_reference(
    d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> CoupledGradients:
    out = inject_write_reference(h, z, gz, aty, weight, bias, r)
    dh, dx2, dv = couple_backward_reference(d1, out, x2, v)
    del out
    of_images_and_weights = inject_write_backward_reference(dh, z, gz, aty, weight, r)
    return laid_out_like(dh, h), *of_images_and_weights, laid_out_like(dx2, d1), dv


def inject_uncouple_inplace_reference(
    y1: Tensor, d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, v: Tensor, r: int
) -> CoupledGradients:
    w = v.to(y1.dtype).reshape(())
    out = inject_write_reference(h, z, gz, aty, weight, bias, r).to(y1.dtype)
    dv = (y1 - out).mul_(d1).sum().div_(w).to(v.dtype).reshape(v.shape)  # x2 − out = (y1 − out)/v
    y1.addcmul_(out, w - 1).div_(w)
    del out
    dh, dx2 = (d1 * (1 - w)).to(h.dtype), d1 * w
    of_images_and_weights = inject_write_backward_reference(dh, z, gz, aty, weight, r)
    return laid_out_like(dh, h), *of_images_and_weights, laid_out_like(dx2, d1), dv


def inject_uncouple_reference(y1: Tensor, *others: Any) -> tuple[Tensor, ...]:
    x2 = torch.empty_like(y1).copy_(y1)
    return x2, *inject_uncouple_inplace_reference(x2, *others)


def _fake_read(h, weight, bias, r):
    B, _, height, width = h.shape
    return h.new_empty(B, 1, height * r, width * r)


def _fake_read_backward(dz, h, weight, r, through):
    return torch.empty_like(h), torch.empty_like(weight), weight.new_empty(1)


def _fake_write_backward(dout, z, gz, aty, weight, r):
    images = (z.new_empty(z.shape), gz.new_empty(gz.shape), aty.new_empty(aty.shape))
    return *images, torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _fake_couple_backward(d1, h, z, gz, aty, weight, bias, x2, v, r):
    of_images_and_weights = _fake_write_backward(h, z, gz, aty, weight, r)
    return torch.empty_like(h), *of_images_and_weights, torch.empty_like(d1), torch.empty_like(v)


def _check_features(h: Tensor, weight: Tensor, channels: int, r: int) -> None:
    if h.ndim != 4 or r < 1 or channels < 1 or h.shape[1] != channels * r * r:
        expected = f"(B, {channels * r * r}, H/r, W/r)"
        raise ValueError(f"h is {tuple(h.shape)}; with r={r} and weight {tuple(weight.shape)} it must be {expected}")


def _check_images(h: Tensor, r: int, **images: Tensor) -> None:
    expected = (h.shape[0], 1, h.shape[2] * r, h.shape[3] * r)
    for name, image in images.items():
        if image.shape != expected or image.dtype != h.dtype:
            raise ValueError(f"{name} is {tuple(image.shape)} {image.dtype}, expected {expected} {h.dtype} as h and r={r} say")


def _check_read(h: Tensor, weight: Tensor, r: int) -> None:
    _check_features(h, weight, weight.numel(), r)
    check_floating("h", h.dtype)
    check_floating("weight", weight.dtype)


def _check_read_op(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> None:
    _check_read(h, weight, r)
    check_number("bias", bias)


def _check_read_backward(dz: Tensor, h: Tensor, weight: Tensor, r: int, through: Tensor | None) -> None:
    _check_read(h, weight, r)
    _check_images(h, r, dz=dz)
    if through is not None:
        check_shape("through", through, h.shape)
        check_dtype("through", through, h.dtype)


def _check_write(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int) -> None:
    channels = weight.shape[0] if weight.ndim else 0
    _check_features(h, weight, channels, r)
    _check_images(h, r, z=z, gz=gz, aty=aty)
    if weight.ndim < 2 or weight.numel() != 3 * channels:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected ({channels}, 3, 1, 1)")
    check_floating("h", h.dtype)
    check_floating("weight", weight.dtype)


def _check_write_op(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int) -> None:
    _check_write(h, z, gz, aty, weight, r)
    check_floating("bias", bias.dtype)
    check_shape("bias", bias, weight.shape[:1])


def _check_couple(h, z, gz, aty, weight, bias, v, r, **streams: Tensor) -> None:
    _check_write_op(h, z, gz, aty, weight, bias, r)
    check_coupling(h, v, **streams)


inject_read_op = define_op(
    "inject_read(Tensor h, Tensor weight, Tensor bias, int r) -> Tensor", inject_read_reference, _fake_read, _check_read_op
)
inject_read_backward_op = define_op(
    "inject_read_backward(Tensor dz, Tensor h, Tensor weight, int r, Tensor? through) -> (Tensor, Tensor, Tensor)",
    inject_read_backward_reference,
    _fake_read_backward,
    _check_read_backward,
)
inject_write_op = define_op(
    "inject_write(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, int r) -> Tensor",
    inject_write_reference,
    lambda h, z, gz, aty, weight, bias, r: torch.empty_like(h),
    _check_write_op,
)
inject_write_backward_op = define_op(
    "inject_write_backward(Tensor dout, Tensor z, Tensor gz, Tensor aty, Tensor weight, int r)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    inject_write_backward_reference,
    _fake_write_backward,
    _check_write,
)
inject_couple_op = define_op(
    f"inject_couple(Tensor h, {_IMAGES}, {_WRITE}, Tensor x2, Tensor v, int r) -> Tensor",
    inject_couple_reference,
    lambda h, z, gz, aty, weight, bias, x2, v, r: torch.empty_like(x2),
    lambda h, z, gz, aty, weight, bias, x2, v, r: _check_couple(h, z, gz, aty, weight, bias, v, r, x2=x2),
)
inject_couple_backward_op = define_op(
    f"inject_couple_backward(Tensor d1, Tensor h, {_IMAGES}, {_WRITE}, Tensor x2, Tensor v, int r) -> ({_tensors(8)})",
    inject_couple_backward_reference,
    _fake_couple_backward,
    lambda d1, h, z, gz, aty, weight, bias, x2, v, r: _check_couple(h, z, gz, aty, weight, bias, v, r, x2=x2, d1=d1),
)
"""Gradients of all tensors of `inject_couple`, in their order."""
inject_uncouple_op = define_op(
    f"inject_uncouple(Tensor y1, Tensor d1, Tensor h, {_IMAGES}, {_WRITE}, Tensor v, int r) -> ({_tensors(9)})",
    inject_uncouple_reference,
    lambda y1, d1, h, z, gz, aty, weight, bias, v, r: (
        torch.empty_like(y1), *_fake_couple_backward(d1, h, z, gz, aty, weight, bias, y1, v, r)
    ),
    lambda y1, d1, h, z, gz, aty, weight, bias, v, r: _check_couple(h, z, gz, aty, weight, bias, v, r, y1=y1, d1=d1),
)  # fmt: skip
"""x2, and the gradients as of `inject_couple_backward`. Not differentiable."""
inject_uncouple_inplace_op = define_op(
    f"inject_uncouple_(Tensor(a!) y1, Tensor d1, Tensor h, {_IMAGES}, {_WRITE}, Tensor v, int r) -> ({_tensors(8)})",
    inject_uncouple_inplace_reference,
    lambda y1, d1, h, z, gz, aty, weight, bias, v, r: _fake_couple_backward(d1, h, z, gz, aty, weight, bias, y1, v, r),
    lambda y1, d1, h, z, gz, aty, weight, bias, v, r: _check_couple(h, z, gz, aty, weight, bias, v, r, y1=y1, d1=d1),
)
"""`inject_uncouple` with x2 written over y1; returns the gradients."""


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


def _setup_couple(ctx, inputs, output) -> None:
    *tensors, ctx.r = inputs
    ctx.save_for_backward(*tensors)


def _gradient_couple(ctx, d1: Tensor):
    return *inject_couple_backward_op(d1, *ctx.saved_tensors, ctx.r), None


register_gradient("inject_read", _gradient_read, _setup_read)
register_gradient("inject_write", _gradient_write, _setup_write)
register_gradient("inject_couple", _gradient_couple, _setup_couple)


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


@register_flop_formula(torch.ops.idm_fast.inject_couple)
def _flop_couple(h, *args, out_shape=None, **kwargs) -> int:
    return 6 * _numel(h)


@register_flop_formula(
    [torch.ops.idm_fast.inject_couple_backward, torch.ops.idm_fast.inject_uncouple, torch.ops.idm_fast.inject_uncouple_]
)
def _flop_couple_backward(stream, *args, out_shape=None, **kwargs) -> int:
    return 18 * _numel(stream)


def inject_read(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """Conv1x1(PixelShuffle_r(h)): (B, C, H/r, W/r) → (B, 1, H, W).

    Args:
        h: features, C a multiple of r².
        weight: (1, C/r², 1, 1). bias: (1,).

    Raises:
        ValueError: C, weight and r do not fit together.
    """
    _check_read(h, weight, r)
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
    _check_read(h, weight, r)
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
    _check_write(h, z, gz, aty, weight, r)
    return inject_write_op(h, z, gz, aty, weight, bias, r)


def inject_couple(
    h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> Tensor:
    """(1−v)·inject_write(h, z, gz, aty, weight, bias, r) + v·x2, in x2's dtype.

    Args:
        x2: the other stream, float32 or float64, the shape of h. v: one element. Others, and errors, as in `inject_write`.
    """
    _check_write(h, z, gz, aty, weight, r)
    if x2.shape != h.shape or v.numel() != 1:
        found = f"x2 is {tuple(x2.shape)} and v has {v.numel()} elements"
        raise ValueError(f"{found}; expected {tuple(h.shape)}, the shape of h, and one")
    return inject_couple_op(h, z, gz, aty, weight, bias, x2, v, r)
