"""The coupling on fixed-point streams (`idm_fast.ops.fixed_point`) in Triton, equal to the reference in every bit.

One pass over memory an op: a coupling packs its codes, its inverse unpacks them on the way. Integers are 64 bits wide between
load and store, the body is scaled and rounded in float64, as in the reference, and no product and sum are rounded together.
Codes are counted row-major: where they are, tensors that do not lie so are copied; elsewhere tensors that lie alike, be they
NCHW or NHWC, are one flat run of elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import exact
from idm_fast.kernels.bits import elements_of, packed_size
from idm_fast.kernels.configurations import configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.couple import laid_out, sum_kernel
from idm_fast.kernels.launch import arch_of, blocks, launch
from idm_fast.ops import fixed_point

V_BITS = tl.constexpr(fixed_point.V_BITS)
UNIT = tl.constexpr(2**fixed_point.V_BITS)
LARGEST = tl.constexpr(fixed_point.LARGEST)
NOT_A_NUMBER = tl.constexpr(fixed_point.NOT_A_NUMBER)


@triton.jit
def to_nearest(x):
    """x, float64, rounded to the nearest integer, ties to even: beside 1.5·2^52 there is no bit for a fraction.

    Where |x| is 2^51 and more the result is off and as large, NaN stays NaN.
    """
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def to_grid(x, scale):
    """round(x·scale) in int64, 0 where that is beyond 2^32 or not a number; and where it is not."""
    wide = to_nearest(x.to(tl.float64) * scale)
    good = tl.abs(wide) <= 4294967296.0
    return tl.where(good, wide, 0.0).to(tl.int64), good


@triton.jit
def finished(wide, good):
    """int32 of `wide`, NOT_A_NUMBER where it is not good or has no place there."""
    return tl.where(good & (tl.abs(wide) <= LARGEST), wide, NOT_A_NUMBER).to(tl.int32)


@triton.jit
def on_grid(v, SMALLEST: tl.constexpr):
    """V = round(v·2^25), and 1 − v on that grid in float64: NaN where v is out of its range, which makes every body NaN."""
    w = tl.load(v).to(tl.float64)
    good = (w >= SMALLEST) & (w <= 1.0)
    V = to_nearest(tl.where(good, w, 1.0) * UNIT)
    return V.to(tl.int64), tl.where(good, 1.0 - V * (1 / UNIT), float("nan"))


@triton.jit
def to_fixed_kernel(x, X, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """X = round(x·SCALE)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    wide, good = to_grid(tl.load(x + start + i, i < n - start, other=0.0), SCALE)
    tl.store(X + start + i, finished(wide, good), i < n - start)


@triton.jit
def to_float(X, SCALE: tl.constexpr, dtype: tl.constexpr):
    """X / SCALE in `dtype`, rounded where X is."""
    value = X.to(tl.float64) if dtype == tl.float64 else X.to(tl.float32)
    return tl.where(X == NOT_A_NUMBER, float("nan"), exact(value.to(dtype)) * (1 / SCALE))


@triton.jit
def from_fixed_kernel(X, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """x = X / SCALE."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    value = tl.load(X + start + i, i < n - start, other=0)
    tl.store(x + start + i, to_float(value, SCALE, x.dtype.element_ty), i < n - start)


@triton.jit
def fixed_add_kernel(F, X, Y, n, SIGN: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X + SIGN·round(F·SCALE)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    wide, good = to_grid(tl.load(F + start + i, mask, other=0.0), SCALE)
    stream = tl.load(X + start + i, mask, other=0)
    tl.store(Y + start + i, finished(SIGN * wide + stream, good & (stream != NOT_A_NUMBER)), mask)


@triton.jit
def fixed_couple_kernel(
    F, X2, v, Y1, packed, n, size, SMALLEST: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """Y1 = round((1 − v)·F·SCALE) + floor(v·X2), and the codes that the floor leaves, none where `packed` is None."""
    first, i, shift = elements_of(BYTES, BITS)
    start = first * (8 // BITS)
    mask = i < n - start
    V, share = on_grid(v, SMALLEST)
    wide, good = to_grid(tl.load(F + start + i, mask, other=0.0), share * SCALE)
    stream = tl.load(X2 + start + i, mask, other=0)
    product = stream.to(tl.int64) * V
    tl.store(Y1 + start + i, finished(wide + (product >> V_BITS), good & (stream != NOT_A_NUMBER)), mask)
    if packed is not None:
        remainder = product & (UNIT - 1)
        code = (remainder >= V).to(tl.int32)
        if BITS == 2:  # a code is below ceil(1/v), so counting replaces the division
            code += (remainder >= 2 * V).to(tl.int32) + (remainder >= 3 * V).to(tl.int32)
        byte = tl.arange(0, BYTES)
        tl.store(packed + first + byte, tl.sum(tl.where(mask, code << shift, 0), 1), byte < size - first)


@triton.jit
def inverse(stream, F, code, V, share, SCALE: tl.constexpr):
    """X2 = ceil((Y1 − round((1 − v)·F·SCALE)) / v) + code.

    The quotient, below 2^35, is off by less than one when computed in float64 with the reciprocal, and so is its ceiling; exact
    products in integers say which way.
    """
    wide, good = to_grid(F, share * SCALE)
    rest = stream - wide
    scaled = rest << V_BITS
    quotient = tl.ceil(rest.to(tl.float64) * (1.0 / V.to(tl.float64) * UNIT)).to(tl.int64)
    quotient += (quotient * V < scaled).to(tl.int64)
    quotient -= ((quotient - 1) * V >= scaled).to(tl.int64)
    return finished(quotient + code, good & (stream != NOT_A_NUMBER))


@triton.jit
def codes_of(packed, first, size, shift, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Codes of a program's bytes, (BYTES, 8 / BITS)."""
    byte = tl.arange(0, BYTES)
    value = tl.load(packed + first + byte, byte < size - first, other=0).to(tl.int32)
    return (value[:, None] >> shift) & ((1 << BITS) - 1)


@triton.jit
def fixed_decouple_kernel(
    Y1, F, packed, v, X2, n, size, SMALLEST: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """X2 from Y1, F and the codes."""
    first, i, shift = elements_of(BYTES, BITS)
    start = first * (8 // BITS)
    mask = i < n - start
    V, share = on_grid(v, SMALLEST)
    code = codes_of(packed, first, size, shift, BITS, BYTES)
    body = tl.load(F + start + i, mask, other=0.0)
    tl.store(X2 + start + i, inverse(tl.load(Y1 + start + i, mask, other=0), body, code, V, share, SCALE), mask)


@triton.jit
def fixed_uncouple_kernel(
    Y1, F, d1, packed, v, X2, dF, dx2, partials, n, size,
    SMALLEST: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """X2 as `fixed_decouple_kernel`, dF = (1 − v)·d1, dx2 = v·d1 and this program's part of dv = <d1, X2 / SCALE − F>."""
    first, i, shift = elements_of(BYTES, BITS)
    start = first * (8 // BITS)
    mask = i < n - start
    V, share = on_grid(v, SMALLEST)
    code = codes_of(packed, first, size, shift, BITS, BYTES)
    body = tl.load(F + start + i, mask, other=0.0)
    stream = inverse(tl.load(Y1 + start + i, mask, other=0), body, code, V, share, SCALE)
    tl.store(X2 + start + i, stream, mask)
    d = exact(tl.load(d1 + start + i, mask, other=0.0))
    w = tl.load(v).to(d.dtype)
    off = to_float(stream, SCALE, d.dtype) - body.to(d.dtype)
    tl.store(dF + start + i, (1 - w) * d, mask)
    tl.store(dx2 + start + i, w * d, mask)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(mask, d * off, 0.0)))


def to_fixed(x: Tensor, fraction_bits: int) -> Tensor:
    """int32 in one launch; contract of `idm_fast::to_fixed`."""
    X = torch.empty_like(x, dtype=torch.int32)
    _flat(to_fixed_kernel, X, (laid_out(x, X), X), SCALE=2.0**fraction_bits)
    return X


def from_fixed(X: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    """`dtype` in one launch; contract of `idm_fast::from_fixed`."""
    x = torch.empty_like(X, dtype=dtype)
    _flat(from_fixed_kernel, x, (laid_out(X, x), x), SCALE=2.0**fraction_bits)
    return x


def fixed_add(F: Tensor, X: Tensor, fraction_bits: int, sign: int) -> Tensor:
    """int32 in one launch; contract of `idm_fast::fixed_add`."""
    Y = torch.empty_like(X)
    _flat(fixed_add_kernel, Y, (laid_out(F, Y), laid_out(X, Y), Y), SIGN=sign, SCALE=2.0**fraction_bits)
    return Y


def fixed_couple(F: Tensor, X2: Tensor, v: Tensor, fraction_bits: int, bits: int) -> tuple[Tensor, Tensor]:
    """(Y1, packed codes) in one launch; contract of `idm_fast::fixed_couple`."""
    Y1 = torch.empty(X2.shape, dtype=torch.int32, device=X2.device)
    packed = torch.empty(packed_size(X2.numel(), bits), dtype=torch.uint8, device=X2.device)
    tensors = (F.contiguous(), X2.contiguous(), v, Y1, packed if bits else None)
    _packed(fixed_couple_kernel, Y1, tensors, fraction_bits, bits)
    return laid_out(Y1, X2), packed


def fixed_decouple(Y1: Tensor, F: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int) -> Tensor:
    """X2 in one launch; contract of `idm_fast::fixed_decouple`."""
    X2 = torch.empty(Y1.shape, dtype=torch.int32, device=Y1.device)
    tensors = (Y1.contiguous(), F.contiguous(), packed.contiguous(), v, X2)
    _packed(fixed_decouple_kernel, X2, tensors, fraction_bits, bits)
    return laid_out(X2, Y1)


def fixed_uncouple(
    Y1: Tensor, F: Tensor, d1: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X2, dF, dx2, dv) in two launches; contract of `idm_fast::fixed_uncouple`."""
    X2, dF, dx2 = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (Y1, F, d1))
    dv, plan = torch.empty_like(v), configuration("fixed", torch.float64, arch_of(Y1))
    partials = torch.empty(blocks(Y1.numel(), plan.elements), dtype=d1.dtype, device=Y1.device)
    tensors = (*(t.contiguous() for t in (Y1, F, d1, packed)), v, X2, dF, dx2, partials)
    _packed(fixed_uncouple_kernel, Y1, tensors, fraction_bits, bits)
    last = configuration("sum", d1.dtype, arch_of(Y1))
    launch(sum_kernel, 1, partials, dv, partials.numel(), BLOCK=last.elements, configuration=last)
    return laid_out(X2, Y1), laid_out(dF, F), laid_out(dx2, d1), dv


def _flat(kernel: triton.JITFunction, like: Tensor, tensors: tuple[Tensor, ...], **constants: float) -> None:
    """Launch on tensors that all lie as `like` does."""
    plan, n = configuration("fixed", torch.float64, arch_of(like)), like.numel()
    launch(kernel, blocks(n, plan.elements), *tensors, n, **constants, BLOCK=plan.elements, configuration=plan)


def _packed(kernel: triton.JITFunction, like: Tensor, tensors: tuple[Tensor | None, ...], k: int, bits: int) -> None:
    """Launch on row-major tensors; a program handles whole bytes of codes. Without codes, a byte is one of 1 bit a code."""
    plan, n, width = configuration("fixed", torch.float64, arch_of(like)), like.numel(), bits or 1
    constants = {"SMALLEST": fixed_point.SMALLEST_V[bits], "SCALE": 2.0**k, "BITS": width}
    side = plan.elements * width // 8
    sizes = (n, packed_size(n, bits))
    launch(kernel, blocks(n, plan.elements), *tensors, *sizes, **constants, BYTES=side, configuration=plan)


def to_fixed_cost(x: Tensor, fraction_bits: int) -> Cost:
    return Cost(size((x,)), 4 * x.numel(), 2 * x.numel())


def from_fixed_cost(X: Tensor, fraction_bits: int, dtype: torch.dtype) -> Cost:
    return Cost(size((X,)), X.numel() * dtype.itemsize, X.numel())


def fixed_add_cost(F: Tensor, X: Tensor, fraction_bits: int, sign: int) -> Cost:
    return Cost(size((F, X)), size((X,)), 3 * X.numel())


def fixed_couple_cost(F: Tensor, X2: Tensor, v: Tensor, fraction_bits: int, bits: int) -> Cost:
    return Cost(size((F, X2)), size((X2,)) + packed_size(X2.numel(), bits), 4 * X2.numel())


def fixed_decouple_cost(Y1: Tensor, F: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int) -> Cost:
    return Cost(size((Y1, F, packed)), size((Y1,)), 5 * Y1.numel())


def fixed_uncouple_cost(
    Y1: Tensor, F: Tensor, d1: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int
) -> Cost:
    return Cost(size((Y1, F, d1, packed)), size((Y1, F, d1)), 10 * Y1.numel())
