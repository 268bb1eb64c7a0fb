"""The convex coupling of DESIGN §1 (IDM, "wiring"): y1 = (1−v)·F + v·x2, its inverse and its gradient.

`F` is what the body made of x1 and may be float16/bfloat16 under autocast; the streams x2, y1 are float32 or float64. All
arithmetic is in the stream's dtype. `v` has one element. Any shape and memory format; F and the stream have one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.ops.arguments import check_dtype, check_floating, check_number, check_shape
from idm_fast.ops.layout import laid_out_like
from idm_fast.ops.registry import define_op, register_gradient


def couple_reference(F: Tensor, x2: Tensor, v: Tensor) -> Tensor:
    return laid_out_like(torch.lerp(F.to(x2.dtype), x2, v.to(x2.dtype).reshape(())), x2)


def decouple_reference(y1: Tensor, F: Tensor, v: Tensor) -> Tensor:
    w = v.to(y1.dtype).reshape(())
    return laid_out_like((F.to(y1.dtype) * (w - 1)).add_(y1).div_(w), y1)


def couple_backward_reference(d1: Tensor, F: Tensor, x2: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = v.to(d1.dtype).reshape(())
    dv = (x2 - F).mul_(d1).sum().to(v.dtype).reshape(v.shape)
    return laid_out_like(d1 * (1 - w), F, F.dtype), laid_out_like(d1 * w, d1), dv


def uncouple_reference(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x2 = decouple_reference(y1, F, v)
    return x2, *couple_backward_reference(d1, F, x2, v)


def uncouple_inplace_reference(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = v.to(y1.dtype).reshape(())
    x2 = y1.add_(F.to(y1.dtype) * (w - 1)).div_(w)
    return couple_backward_reference(d1, F, x2, v)


def check_coupling(F: Tensor, v: Tensor, **streams: Tensor) -> None:
    """F and v of any floating dtype; streams of F's shape and of one floating dtype."""
    check_floating("F", F.dtype)
    check_number("v", v)
    dtype = next(iter(streams.values())).dtype
    for name, stream in streams.items():
        check_floating(name, stream.dtype)
        check_dtype(name, stream, dtype)
        check_shape(name, stream, F.shape)


couple_op = define_op(
    "couple(Tensor F, Tensor x2, Tensor v) -> Tensor",
    couple_reference,
    lambda F, x2, v: torch.empty_like(x2),
    lambda F, x2, v: check_coupling(F, v, x2=x2),
)
decouple_op = define_op(
    "decouple(Tensor y1, Tensor F, Tensor v) -> Tensor",
    decouple_reference,
    lambda y1, F, v: torch.empty_like(y1),
    lambda y1, F, v: check_coupling(F, v, y1=y1),
)
couple_backward_op = define_op(
    "couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v) -> (Tensor, Tensor, Tensor)",
    couple_backward_reference,
    lambda d1, F, x2, v: (torch.empty_like(F), torch.empty_like(d1), torch.empty_like(v)),
    lambda d1, F, x2, v: check_coupling(F, v, x2=x2, d1=d1),
)
uncouple_op = define_op(
    "uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)",
    uncouple_reference,
    lambda y1, F, d1, v: (torch.empty_like(y1), torch.empty_like(F), torch.empty_like(d1), torch.empty_like(v)),
    lambda y1, F, d1, v: check_coupling(F, v, y1=y1, d1=d1),
)

uncouple_inplace_op = define_op(
    "uncouple_(Tensor(a!) y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor)",
    uncouple_inplace_reference,
    lambda y1, F, d1, v: (torch.empty_like(F), torch.empty_like(d1), torch.empty_like(v)),
    lambda y1, F, d1, v: check_coupling(F, v, y1=y1, d1=d1),
)
"""`uncouple` with x2 written over y1; returns dF, dx2, dv. Not differentiable."""


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _couple_gradient(ctx, d1: Tensor):
    F, x2, v = ctx.saved_tensors
    return couple_backward_op(d1, F, x2, v)


def _decouple_gradient(ctx, dx2: Tensor):
    # x2 = (y1 − (1−v)·F)/v, so dx2/dy1 = 1/v, dx2/dF = −(1−v)/v, dx2/dv = (F − x2)/v.
    y1, F, v = ctx.saved_tensors
    w = v.to(dx2.dtype).reshape(())
    dy1 = dx2 / w
    x2 = decouple_op(y1, F, v)
    dv = ((F - x2) * dy1).sum().to(v.dtype).reshape(v.shape)
    return dy1, (dy1 * (w - 1)).to(F.dtype), dv


register_gradient("couple", _couple_gradient, _save_inputs)
register_gradient("decouple", _decouple_gradient, _save_inputs)


def couple(F: Tensor, x2: Tensor, v: Tensor) -> Tensor:
    """y1 = (1−v)·F + v·x2.

    Args:
        F: what the body made of x1; any floating dtype.
        x2: the other stream, float32 or float64, the shape of F.
        v: one element.

    Raises:
        ValueError: shapes differ, or v has more than one element.
    """
    _check(F, x2, v, "x2")
    return couple_op(F, x2, v)


def decouple(y1: Tensor, F: Tensor, v: Tensor) -> Tensor:
    """The inverse of `couple` in its second argument: x2 = (y1 − (1−v)·F)/v. Shapes and errors as there."""
    _check(F, y1, v, "y1")
    return decouple_op(y1, F, v)


def uncouple(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Invert the coupling and take its gradient in one pass.

    Args:
        y1: output of `couple`. F: the body's output, recomputed. d1: gradient of y1. v: one element.

    Returns:
        x2; dF = (1−v)·d1 in F's dtype; dx2 = v·d1; dv = <d1, x2 − F>, of v's shape.

    Raises:
        ValueError: shapes differ, or v has more than one element.
    """
    _check(F, y1, v, "y1")
    _check(F, d1, v, "d1")
    return uncouple_op(y1, F, d1, v)


def _check(F: Tensor, stream: Tensor, v: Tensor, name: str) -> None:
    if F.shape != stream.shape:
        raise ValueError(f"F has shape {tuple(F.shape)} and {name} {tuple(stream.shape)}; the body must preserve the shape")
    if v.numel() != 1:
        raise ValueError(f"v has shape {tuple(v.shape)}, expected one element")
