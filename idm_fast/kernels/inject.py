"""The two halves of an injector (`idm_fast.ops.injector`) in Triton: each is one pass over the features, forward and backward.

Channel c·r² + i·r + j of the features at position (row, column) belongs to pixel (row·r + i, column·r + j) of the image; the
r² channels that differ in (i, j) alone are planes. A program handles one plane of one image (in NHWC, where they lie side by
side, all of them) at a block of positions, for all c: what it needs of the images it reads, or sums for them, once. Tiles are
(c, plane, position). Arithmetic is in float32, in float64 for float64.

    read:  z = Σ_c weight_c·h + bias                   backward: dh = weight_c·dz + through,  dweight_c = Σ h·dz,  dbias = Σ dz
    write: out = h + Σ_k weight_ck·image_k + bias_c    backward: dimage_k = Σ_c weight_ck·dout,  dweight_ck = Σ dout·image_k
    couple: y1 = (1−v)·out + v·x2                      backward: dh = dout = (1−v)·d1,  dx2 = v·d1,  dv = Σ d1·(x2 − out)

The last makes `out` on the fly, forward and backward, and recovers x2 from y1 on the way back where that is wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import arithmetic_dtype, divide, exact
from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.couple import laid_out
from idm_fast.kernels.launch import arch_of, blocks, fit, launch

CHANNELS = 8
"""Values of c that a program loads at a time: independent accesses, to have enough bytes in flight."""


@triton.jit
def place_of(S, W, R: tl.constexpr, PP: tl.constexpr, BS: tl.constexpr):
    """Image, planes (1, PP, 1), positions (1, 1, BS), their pixels in the image (1, PP, BS), which of them there are."""
    chunks = tl.cdiv(S, BS)
    s = ((tl.program_id(0) % chunks) * BS + tl.arange(0, BS))[None, None, :]
    rest = tl.program_id(0) // chunks
    plane = ((rest % (R * R // PP)) * PP + tl.arange(0, PP))[None, :, None]
    b = (rest // (R * R // PP)).to(tl.int64)
    pixel = b * (R * R) * S + ((s // W) * R + plane // R) * (W * R) + (s % W) * R + plane % R
    return b, plane, s, pixel, s < S


@triton.jit
def tile(x, b, c, plane, s, x_b, x_c, x_s, R: tl.constexpr):
    """Pointers to the features (BC, PP, BS)."""
    return x + b * x_b + (c[:, None, None] * (R * R) + plane).to(tl.int64) * x_c + s.to(tl.int64) * x_s


@triton.jit
def of_channels(weight, c, C, step: tl.constexpr, k: tl.constexpr):
    """weight[c, k] as (BC, 1, 1)."""
    return exact(tl.load(weight + c * step + k, c < C, other=0.0))[:, None, None]


@triton.jit
def of_pixels(image, pixel, there):
    """The image at a program's pixels, (1, PP, BS)."""
    return exact(tl.load(image + pixel, there, other=0.0))


@triton.jit
def written(weight, bias, p0, p1, p2, c, C):
    """Σ_k weight_ck·image_k + bias_c, (BC, PP, BS)."""
    total = of_channels(weight, c, C, 3, 0) * p0 + of_channels(weight, c, C, 3, 1) * p1
    return total + (of_channels(weight, c, C, 3, 2) * p2 + of_channels(bias, c, C, 1, 0))


@triton.jit
def over_positions(x):
    """Σ over planes and positions, (BC,)."""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def read_fwd_kernel(
    h, weight, bias, z, C, S, W, h_b, h_c, h_s, R: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """z of some planes: C = channels a plane, h with its strides, z contiguous."""
    b, plane, s, pixel, there = place_of(S, W, R, PP, BS)
    total = tl.zeros((1, PP, BS), exact(tl.load(h)).dtype) + exact(tl.load(bias))
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        value = tl.load(tile(h, b, c, plane, s, h_b, h_c, h_s, R), (c < C)[:, None, None] & there, other=0.0)
        total += tl.sum(of_channels(weight, c, C, 1, 0) * exact(value), 0)[None, :, :]
    tl.store(z + pixel, total, there)


@triton.jit
def read_bwd_kernel(
    dz, h, weight, through, dh, dweights, dbiases, C, S, W, h_b, h_c, h_s, THROUGH: tl.constexpr,
    R: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dh of some planes, and this program's part of dweight (programs, C) and dbias (programs,)."""
    b, plane, s, pixel, there = place_of(S, W, R, PP, BS)
    g = of_pixels(dz, pixel, there)
    tl.store(dbiases + tl.program_id(0), tl.sum(g))
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        mask = (c < C)[:, None, None] & there
        value = exact(tl.load(tile(h, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        result = of_channels(weight, c, C, 1, 0) * g
        if THROUGH:
            result += exact(tl.load(tile(through, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        tl.store(tile(dh, b, c, plane, s, h_b, h_c, h_s, R), result, mask)
        tl.store(dweights + tl.program_id(0).to(tl.int64) * C + c, over_positions(value * g), c < C)


@triton.jit
def write_fwd_kernel(
    h, image0, image1, image2, weight, bias, out, C, S, W, h_b, h_c, h_s,
    R: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out of some planes."""
    b, plane, s, pixel, there = place_of(S, W, R, PP, BS)
    p0 = of_pixels(image0, pixel, there)
    p1 = of_pixels(image1, pixel, there)
    p2 = of_pixels(image2, pixel, there)
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        mask = (c < C)[:, None, None] & there
        value = exact(tl.load(tile(h, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        out_value = value + written(weight, bias, p0, p1, p2, c, C)
        tl.store(tile(out, b, c, plane, s, h_b, h_c, h_s, R), out_value, mask)


@triton.jit
def couple_inject_fwd_kernel(
    h, image0, image1, image2, weight, bias, x2, v, y1, C, S, W, h_b, h_c, h_s,
    R: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y1 of some planes, with the formula of torch.lerp; all features lie in memory as h does."""
    b, plane, s, pixel, there = place_of(S, W, R, PP, BS)
    p0 = of_pixels(image0, pixel, there)
    p1 = of_pixels(image1, pixel, there)
    p2 = of_pixels(image2, pixel, there)
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        mask = (c < C)[:, None, None] & there
        x = exact(tl.load(tile(x2, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        value = exact(tl.load(tile(h, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        f = (value + written(weight, bias, p0, p1, p2, c, C)).to(x.dtype)
        w = tl.load(v).to(x.dtype)
        y = tl.where(w < 0.5, f + w * (x - f), x - (1 - w) * (x - f))
        tl.store(tile(y1, b, c, plane, s, h_b, h_c, h_s, R), y, mask)


@triton.jit
def store_weight_parts(dweights, dbiases, g, p0, p1, p2, c, C):
    """This program's part of dweight (programs, C, 3) and dbias (programs, C) for the channels c."""
    row = tl.program_id(0).to(tl.int64) * C + c
    tl.store(dweights + row * 3, over_positions(g * p0), c < C)
    tl.store(dweights + row * 3 + 1, over_positions(g * p1), c < C)
    tl.store(dweights + row * 3 + 2, over_positions(g * p2), c < C)
    tl.store(dbiases + row, over_positions(g), c < C)


@triton.jit
def write_bwd_kernel(
    dout, image0, image1, image2, weight, dimage0, dimage1, dimage2, dweights, dbiases, C, S, W, d_b, d_c, d_s,
    R: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of the three images at some planes, and this program's part of dweight and dbias."""
    b, plane, s, pixel, there = place_of(S, W, R, PP, BS)
    p0 = of_pixels(image0, pixel, there)
    p1 = of_pixels(image1, pixel, there)
    p2 = of_pixels(image2, pixel, there)
    g0 = tl.zeros((1, PP, BS), p0.dtype)
    g1 = tl.zeros((1, PP, BS), p0.dtype)
    g2 = tl.zeros((1, PP, BS), p0.dtype)
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        at = tile(dout, b, c, plane, s, d_b, d_c, d_s, R)
        g = exact(tl.load(at, (c < C)[:, None, None] & there, other=0.0))
        g0 += tl.sum(of_channels(weight, c, C, 3, 0) * g, 0)[None, :, :]
        g1 += tl.sum(of_channels(weight, c, C, 3, 1) * g, 0)[None, :, :]
        g2 += tl.sum(of_channels(weight, c, C, 3, 2) * g, 0)[None, :, :]
        store_weight_parts(dweights, dbiases, g, p0, p1, p2, c, C)
    tl.store(dimage0 + pixel, g0, there)
    tl.store(dimage1 + pixel, g1, there)
    tl.store(dimage2 + pixel, g2, there)


@triton.jit
def couple_inject_bwd_kernel(
    stream, d1, h, image0, image1, image2, weight, bias, v, x2, dh, dx2, dimage0, dimage1, dimage2, dweights, dbiases, dvs,
    C, S, W, h_b, h_c, h_s, INVERT: tl.constexpr, R: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dh, dx2 and the gradients of the images at some planes, and this program's part of dweight, dbias and dv (programs,).

    `stream` holds x2; with INVERT it holds y1, and x2 is recovered and stored on the way.
    """
    b, plane, s, pixel, there = place_of(S, W, R, PP, BS)
    p0 = of_pixels(image0, pixel, there)
    p1 = of_pixels(image1, pixel, there)
    p2 = of_pixels(image2, pixel, there)
    w = exact(tl.load(v)).to(exact(tl.load(stream)).dtype)
    g0 = tl.zeros((1, PP, BS), p0.dtype)
    g1 = tl.zeros((1, PP, BS), p0.dtype)
    g2 = tl.zeros((1, PP, BS), p0.dtype)
    part = tl.zeros((1, PP, BS), w.dtype)
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        mask = (c < C)[:, None, None] & there
        x = exact(tl.load(tile(stream, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        d = exact(tl.load(tile(d1, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        value = exact(tl.load(tile(h, b, c, plane, s, h_b, h_c, h_s, R), mask, other=0.0))
        f = (value + written(weight, bias, p0, p1, p2, c, C)).to(x.dtype)
        part += tl.sum(d * (x - f), 0)[None, :, :]
        if INVERT:
            tl.store(tile(x2, b, c, plane, s, h_b, h_c, h_s, R), divide(x + (w - 1) * f, w), mask)
        tl.store(tile(dx2, b, c, plane, s, h_b, h_c, h_s, R), w * d, mask)
        g = (1 - w) * d
        tl.store(tile(dh, b, c, plane, s, h_b, h_c, h_s, R), g, mask)
        g = g.to(p0.dtype)
        g0 += tl.sum(of_channels(weight, c, C, 3, 0) * g, 0)[None, :, :]
        g1 += tl.sum(of_channels(weight, c, C, 3, 1) * g, 0)[None, :, :]
        g2 += tl.sum(of_channels(weight, c, C, 3, 2) * g, 0)[None, :, :]
        store_weight_parts(dweights, dbiases, g, p0, p1, p2, c, C)
    tl.store(dimage0 + pixel, g0, there)
    tl.store(dimage1 + pixel, g1, there)
    tl.store(dimage2 + pixel, g2, there)
    total = tl.sum(part)
    if INVERT:
        total = divide(total, w)  # x2 − out = (y1 − out)/v
    tl.store(dvs + tl.program_id(0), total)


@triton.jit
def sum_rows_kernel(parts, total, rows, columns, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """total (columns,) = Σ over the rows of parts (rows, columns), in an order that the sizes alone decide."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, COLUMNS), parts.dtype.element_ty)
    for done in range(0, rows, BLOCK):
        at = (done + row)[:, None].to(tl.int64) * columns + column[None, :]
        sums += tl.load(parts + at, (done + row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(total + column, tl.sum(sums, 0), column < columns)


@dataclass(frozen=True)
class Tiling:
    """How the features are cut: programs, compile-time sides of a tile, and (channels a plane, positions, width)."""

    programs: int
    sides: dict[str, int]
    sizes: tuple[int, int, int]
    plan: Configuration

    @property
    def channels(self) -> int:
        return self.sizes[0]


def tiling(h: Tensor, r: int, family: str = "inject") -> Tiling:
    """For features h (B, C, H/r, W/r), with a configuration of `family`. In NHWC a tile has all planes, side by side there."""
    B, C, height, width = h.shape
    planes = r * r if h.stride(1) == 1 and height * width > 1 and fit(r * r, CHANNELS * CHANNELS) == r * r else 1
    plan = configuration(family, arithmetic_dtype(h.dtype), arch_of(h))
    BC = fit(C // (r * r), CHANNELS)
    BS = fit(height * width, plan.elements // (CHANNELS * planes))
    programs = B * (r * r // planes) * blocks(height * width, BS)
    return Tiling(programs, {"R": r, "PP": planes, "BC": BC, "BS": BS}, (C // (r * r), height * width, width), plan)


def inject_read(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """z in one launch; contract of `idm_fast::inject_read`."""
    B, _, height, width = h.shape
    z = torch.empty((B, 1, height * r, width * r), dtype=h.dtype, device=h.device)
    cut, h = tiling(h, r), h.flatten(2)
    tensors = (h, weight.contiguous(), bias, z)
    launch(read_fwd_kernel, cut.programs, *tensors, *cut.sizes, *h.stride(), **cut.sides, configuration=cut.plan)
    return z


def inject_read_backward(
    dz: Tensor, h: Tensor, weight: Tensor, r: int, through: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dweight, dbias) in three launches; contract of `idm_fast::inject_read_backward`."""
    given, cut, h = h, tiling(h, r), h.flatten(2)
    dh = torch.empty_like(h)
    h, through = laid_out(h, dh), None if through is None else laid_out(through.flatten(2), dh)
    dweight, dbias = _dense(weight), torch.empty(1, dtype=weight.dtype, device=h.device)
    dweights, dbiases = _parts(h, cut, cut.channels), _parts(h, cut, 1)
    tensors = (dz.contiguous(), h, weight.contiguous(), through, dh, dweights, dbiases)
    constants = {"THROUGH": through is not None, **cut.sides}
    launch(read_bwd_kernel, cut.programs, *tensors, *cut.sizes, *dh.stride(), **constants, configuration=cut.plan)
    _sum_rows(dweights, dweight)
    _sum_rows(dbiases, dbias)
    return laid_out(dh.view(given.shape), given), laid_out(dweight, weight), dbias


def inject_write(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """h with the images written onto it, in one launch; contract of `idm_fast::inject_write`."""
    given, cut, h = h, tiling(h, r), h.flatten(2)
    out = torch.empty_like(h)
    tensors = (laid_out(h, out), *(t.contiguous() for t in (z, gz, aty, weight, bias)), out)
    launch(write_fwd_kernel, cut.programs, *tensors, *cut.sizes, *out.stride(), **cut.sides, configuration=cut.plan)
    return laid_out(out.view(given.shape), given)


def inject_write_backward(
    dout: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dz, dgz, daty, dweight, dbias) in three launches; contract of `idm_fast::inject_write_backward`."""
    cut, dout = tiling(dout, r), dout.flatten(2)
    dimages = [_dense(t) for t in (z, gz, aty)]
    dweight, dbias = _dense(weight), torch.empty(cut.channels, dtype=weight.dtype, device=dout.device)
    dweights, dbiases = _parts(dout, cut, 3 * cut.channels), _parts(dout, cut, cut.channels)
    tensors = (dout, *(t.contiguous() for t in (z, gz, aty, weight)), *dimages, dweights, dbiases)
    launch(write_bwd_kernel, cut.programs, *tensors, *cut.sizes, *dout.stride(), **cut.sides, configuration=cut.plan)
    _sum_rows(dweights, dweight)
    _sum_rows(dbiases, dbias)
    return dimages[0], dimages[1], dimages[2], laid_out(dweight, weight), dbias


def inject_couple(
    h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> Tensor:
    """y1 in one launch; contract of `idm_fast::inject_couple`."""
    given, cut, x2 = x2, tiling(x2, r), x2.flatten(2)
    y1 = torch.empty_like(x2)
    small = (t.contiguous() for t in (z, gz, aty, weight, bias))
    tensors = (laid_out(h.flatten(2), y1), *small, laid_out(x2, y1), v, y1)
    launch(couple_inject_fwd_kernel, cut.programs, *tensors, *cut.sizes, *y1.stride(), **cut.sides, configuration=cut.plan)
    return laid_out(y1.view(given.shape), given)


def inject_couple_backward(
    d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> tuple[Tensor, ...]:
    """(dh, dz, dgz, daty, dweight, dbias, dx2, dv) in four launches; contract of `idm_fast::inject_couple_backward`."""
    return _couple_backward(x2, d1, h, (z, gz, aty), weight, bias, v, r, invert=False)[1:]


def inject_uncouple(
    y1: Tensor, d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, v: Tensor, r: int
) -> tuple[Tensor, ...]:
    """(x2, dh, dz, dgz, daty, dweight, dbias, dx2, dv) in four launches; contract of `idm_fast::inject_uncouple`."""
    return _couple_backward(y1, d1, h, (z, gz, aty), weight, bias, v, r, invert=True)


def inject_uncouple_in_place(
    y1: Tensor, d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, v: Tensor, r: int
) -> tuple[Tensor, ...]:
    """As `inject_uncouple` with x2 over y1; contract of `idm_fast::inject_uncouple_`."""
    x2, *gradients = _couple_backward(y1, d1, h, (z, gz, aty), weight, bias, v, r, invert=True, in_place=True)
    if x2.data_ptr() != y1.data_ptr():
        y1.copy_(x2)
    return tuple(gradients)


def _couple_backward(
    stream: Tensor, d1: Tensor, h: Tensor, images: tuple[Tensor, ...], weight: Tensor, bias: Tensor, v: Tensor, r: int,
    invert: bool, in_place: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `inject_uncouple` returns; without `invert`, `stream` is x2, and the first result a tensor of no meaning.

    With `in_place`, x2 is written over `stream`, or over a copy of it where it does not lie densely.
    """
    cut = tiling(stream, r, "inject_couple_backward")
    # Threads beyond a tile's elements repeat some of them, and would read what was written over them by then.
    in_place = in_place and math.prod(cut.sides.values()) >= 32 * cut.plan.options["num_warps"]
    dx2 = torch.empty_like(stream.flatten(2))
    flat = laid_out(stream.flatten(2), dx2)
    x2 = flat if in_place else torch.empty_like(dx2) if invert else dx2
    dh = torch.empty_like(dx2, dtype=h.dtype)
    dimages = [_dense(t) for t in images]
    dweight, dbias, dv = _dense(weight), torch.empty_like(bias), torch.empty_like(v)
    parts = [_parts(stream, cut, columns) for columns in (3 * cut.channels, cut.channels, 1)]
    features = (flat, *(laid_out(t.flatten(2), dx2) for t in (d1, h)))
    small = (t.contiguous() for t in (*images, weight, bias))
    tensors = (*features, *small, v, x2, dh, dx2, *dimages, *parts)
    constants = {"INVERT": invert, **cut.sides}
    launch(couple_inject_bwd_kernel, cut.programs, *tensors, *cut.sizes, *dx2.stride(), **constants, configuration=cut.plan)
    for part, total in zip(parts, (dweight, dbias, dv), strict=True):
        _sum_rows(part, total)
    x2, dh, dx2 = (laid_out(t.view(like.shape), like) for t, like in ((x2, stream), (dh, h), (dx2, d1)))
    return x2, dh, *dimages, laid_out(dweight, weight), dbias, dx2, dv


def _dense(like: Tensor) -> Tensor:
    """Room for what a kernel writes element after element, whatever the strides of `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _parts(like: Tensor, cut: Tiling, columns: int) -> Tensor:
    """Room for what each program adds to a sum, (programs, columns), in the dtype of the arithmetic."""
    return torch.empty(cut.programs, columns, dtype=arithmetic_dtype(like.dtype), device=like.device)


def _sum_rows(parts: Tensor, total: Tensor) -> None:
    """Sum `parts` (rows, columns) into `total`, a contiguous tensor of as many elements as there are columns."""
    plan = configuration("sum", parts.dtype, arch_of(parts))
    rows, columns = parts.shape
    sides = {"COLUMNS": 8, "BLOCK": plan.elements // 8}
    launch(sum_rows_kernel, blocks(columns, 8), parts, total, rows, columns, **sides, configuration=plan)


def inject_read_cost(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Cost:
    return Cost(size((h, weight, bias)), r * r * size((h,)) // h.shape[1], 2 * h.numel())


def inject_read_backward_cost(dz: Tensor, h: Tensor, weight: Tensor, r: int, through: Tensor | None) -> Cost:
    added = () if through is None else (through,)
    return Cost(size((dz, h, weight, *added)), size((h, weight)), (3 + len(added)) * h.numel())


def inject_write_cost(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int) -> Cost:
    return Cost(size((h, z, gz, aty, weight, bias)), size((h,)), 8 * h.numel())


def inject_write_backward_cost(dout: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int) -> Cost:
    images = (z, gz, aty)
    return Cost(size((dout, *images, weight)), size((*images, weight)), 13 * dout.numel())


def inject_couple_cost(
    h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> Cost:
    return Cost(size((h, z, gz, aty, weight, bias, x2)), size((x2,)), 11 * h.numel())


def inject_couple_backward_cost(
    d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, x2: Tensor, v: Tensor, r: int
) -> Cost:
    images = (z, gz, aty)
    return Cost(size((d1, h, x2, *images, weight, bias)), size((h, *images, weight, bias, x2)), 25 * h.numel())


def inject_uncouple_cost(
    y1: Tensor, d1: Tensor, h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, v: Tensor, r: int
) -> Cost:
    images = (z, gz, aty)
    return Cost(size((y1, d1, h, *images, weight, bias)), size((y1, d1, h, *images, weight, bias)), 28 * h.numel())
