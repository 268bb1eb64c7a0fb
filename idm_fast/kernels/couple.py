"""The convex coupling of `idm_fast.ops.coupling` in Triton: one pass over memory an op, forward and backward.

Streams are float32 or float64, F is any floating dtype; all arithmetic is in the stream's dtype. Tensors that lie in memory
alike, be they NCHW or NHWC, are one flat run of elements; one that lies otherwise is first copied to the stream's layout.
Every program loads all its inputs before it stores, so an output may lie exactly over an input of its own element size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import arithmetic_dtype, divide, exact
from idm_fast.kernels.configurations import configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, launch


@triton.jit
def couple_fwd_kernel(F, x2, v, y1, n, BLOCK: tl.constexpr):
    """y1 = (1−v)·F + v·x2, with the formula of torch.lerp: exact at both ends of v."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    x = exact(tl.load(x2 + start + i, mask, other=0.0))
    f = tl.load(F + start + i, mask, other=0.0).to(x.dtype)
    w = tl.load(v).to(x.dtype)
    y = tl.where(w < 0.5, f + w * (x - f), x - (1 - w) * (x - f))
    tl.store(y1 + start + i, y, mask)


@triton.jit
def couple_inverse_kernel(y1, F, v, x2, n, BLOCK: tl.constexpr):
    """x2 = (y1 − (1−v)·F)/v."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    y = exact(tl.load(y1 + start + i, mask, other=0.0))
    f = tl.load(F + start + i, mask, other=0.0).to(y.dtype)
    w = tl.load(v).to(y.dtype)
    tl.store(x2 + start + i, divide(y + (w - 1) * f, w), mask)


@triton.jit
def couple_bwd_kernel(stream, F, d1, v, x2, dF, dx2, partials, n, INVERT: tl.constexpr, BLOCK: tl.constexpr):
    """dF = (1−v)·d1, dx2 = v·d1 and this block's part of dv = <d1, x2 − F>.

    `stream` holds x2; with INVERT it holds y1, and x2 is recovered and stored on the way.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    x = exact(tl.load(stream + start + i, mask, other=0.0))
    d = tl.load(d1 + start + i, mask, other=0.0).to(x.dtype)
    f = tl.load(F + start + i, mask, other=0.0).to(x.dtype)
    w = tl.load(v).to(x.dtype)
    part = tl.sum(d * (x - f))
    if INVERT:
        part = divide(part, w)  # x2 − F = (y1 − F)/v, with fewer roundings than from x2
        tl.store(x2 + start + i, divide(x + (w - 1) * f, w), mask)
    tl.store(dF + start + i, (1 - w) * d, mask)
    tl.store(dx2 + start + i, w * d, mask)
    tl.store(partials + tl.program_id(0), part)


@triton.jit
def sum_kernel(partials, total, n, BLOCK: tl.constexpr):
    """total = Σ partials in float64, by one program, in an order that n alone decides."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        sums += tl.load(partials + start + i, i < n - start, other=0.0).to(tl.float64)
    tl.store(total, tl.sum(sums))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape lie in memory alike; how a side of one element is stepped over doesn't matter."""
    return a.stride() == b.stride() or all(
        s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1
    )


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """`t`, or a copy of it, with the strides of `torch.empty_like(like)`; one of the two is dense."""
    if alike(t, like):
        return t
    copy = torch.empty_like(like, dtype=t.dtype)
    return t if alike(t, copy) else copy.copy_(t)


def couple(F: Tensor, x2: Tensor, v: Tensor) -> Tensor:
    """y1 = (1−v)·F + v·x2 in one launch; contract of `idm_fast::couple`."""
    y1 = torch.empty_like(x2)
    plan = configuration("couple", x2.dtype, arch_of(x2))
    n = y1.numel()
    arguments = (laid_out(F, y1), laid_out(x2, y1), v, y1, n)
    launch(couple_fwd_kernel, blocks(n, plan.elements), *arguments, BLOCK=plan.elements, configuration=plan)
    return y1


def decouple(y1: Tensor, F: Tensor, v: Tensor) -> Tensor:
    """x2 = (y1 − (1−v)·F)/v in one launch; contract of `idm_fast::decouple`."""
    x2 = torch.empty_like(y1)
    plan = configuration("couple", y1.dtype, arch_of(y1))
    n = x2.numel()
    arguments = (laid_out(y1, x2), laid_out(F, x2), v, x2, n)
    launch(couple_inverse_kernel, blocks(n, plan.elements), *arguments, BLOCK=plan.elements, configuration=plan)
    return x2


def couple_backward(d1: Tensor, F: Tensor, x2: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dF, dx2, dv) in two launches; contract of `idm_fast::couple_backward`."""
    return _backward(x2, F, d1, v, None, torch.empty_like(d1))


def uncouple(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x2, dF, dx2, dv) in two launches; contract of `idm_fast::uncouple`."""
    x2 = torch.empty_like(y1)
    dF, dx2, dv = _backward(y1, F, d1, v, x2, torch.empty_like(x2))
    return x2, dF, laid_out(dx2, d1), dv


def uncouple_into(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor, x2: Tensor, dx2: Tensor) -> tuple[Tensor, Tensor]:
    """As `uncouple`, with x2 and dx2 written into the given tensors, which may be y1 and d1 themselves; returns (dF, dv).

    Raises:
        ValueError: an output does not lie densely in memory, or not as y1 does.
    """
    for name, t in (("x2", x2), ("dx2", dx2)):
        if not alike(t, torch.empty_like(y1)):
            raise ValueError(f"{name} has strides {t.stride()}, expected those of a dense tensor laid out as y1")
    dF, _, dv = _backward(y1, F, d1, v, x2, dx2)
    return dF, dv


def uncouple_in_place(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dF, dx2, dv), x2 over y1; contract of `idm_fast::uncouple_`."""
    if not alike(y1, torch.empty_like(y1)):
        x2, dF, dx2, dv = uncouple(y1, F, d1, v)
        y1.copy_(x2)
        return dF, dx2, dv
    dx2 = torch.empty_like(y1)
    dF, dv = uncouple_into(y1, F, d1, v, y1, dx2)
    return dF, laid_out(dx2, d1), dv


def _backward(
    stream: Tensor, F: Tensor, d1: Tensor, v: Tensor, x2: Tensor | None, dx2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dF, dx2 and dv; where x2 is given, `stream` is y1 and x2 is recovered into it. x2 and dx2 lie alike, and densely."""
    dF, dv = torch.empty_like(dx2, dtype=F.dtype), torch.empty_like(v)
    plan = configuration("couple", dx2.dtype, arch_of(dx2))
    n = dx2.numel()
    programs = blocks(n, plan.elements)
    partials = torch.empty(programs, dtype=arithmetic_dtype(dx2.dtype), device=dx2.device)
    tensors = (laid_out(stream, dx2), laid_out(F, dx2), laid_out(d1, dx2), v, x2, dF, dx2, partials)
    constants = {"INVERT": x2 is not None, "BLOCK": plan.elements}
    launch(couple_bwd_kernel, programs, *tensors, n, **constants, configuration=plan)
    last = configuration("sum", dx2.dtype, arch_of(dx2))
    launch(sum_kernel, 1, partials, dv, programs, BLOCK=last.elements, configuration=last)
    return laid_out(dF, F), dx2, dv


def couple_cost(F: Tensor, x2: Tensor, v: Tensor) -> Cost:
    """Of `couple`, and, with y1 for x2, of `decouple`."""
    return Cost(size((F, x2)), size((x2,)), 3 * x2.numel())


def couple_backward_cost(d1: Tensor, F: Tensor, x2: Tensor, v: Tensor) -> Cost:
    return Cost(size((d1, F, x2)), size((F, d1)), 5 * d1.numel())


def uncouple_cost(y1: Tensor, F: Tensor, d1: Tensor, v: Tensor) -> Cost:
    return Cost(size((y1, F, d1)), size((y1, F, d1)), 8 * y1.numel())
