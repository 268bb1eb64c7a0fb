"""The two halves of an injector (`idm_fast.ops.injector`) in Triton: each is one pass over the features, forward and backward.

Channel c·r² + i·r + j of the features at position (row, column) belongs to pixel (row·r + i, column·r + j) of the image; the
r² channels that differ in (i, j) alone are planes. A program handles one plane of one image at a block of positions, for
all c: what it needs of the images it reads, or sums for them, once. Arithmetic is in float32, in float64 for float64.

    read:  z = Σ_c weight_c·h + bias                   backward: dh = weight_c·dz,  dweight_c = Σ h·dz,   dbias = Σ dz
    write: out = h + Σ_k weight_ck·image_k + bias_c    backward: dimage_k = Σ_c weight_ck·dout,  dweight_ck = Σ dout·image_k
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import arithmetic_dtype, exact
from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, fit, launch

CHANNELS = 8
"""Channels that a program loads at a time: independent accesses, to have enough bytes in flight."""


@triton.jit
def place_of(S, W, R: tl.constexpr, BS: tl.constexpr):
    """(image, plane, positions, their pixels in the image, which of them there are) of this program."""
    chunks = tl.cdiv(S, BS)
    s = (tl.program_id(0) % chunks) * BS + tl.arange(0, BS)
    rest = tl.program_id(0) // chunks
    plane = rest % (R * R)
    b = (rest // (R * R)).to(tl.int64)
    pixel = b * (R * R) * S + ((s // W) * R + plane // R) * (W * R) + (s % W) * R + plane % R
    return b, plane, s, pixel, s < S


@triton.jit
def read_fwd_kernel(
    h, weight, bias, z, C, S, W, h_b, h_c, h_s, R: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """z of one plane: C = channels a plane, h with its strides, z contiguous."""
    b, plane, s, pixel, there = place_of(S, W, R, BS)
    base = h + b * h_b + plane.to(tl.int64) * h_c
    total = tl.zeros((BS,), exact(tl.load(h)).dtype) + exact(tl.load(bias))
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        w = exact(tl.load(weight + c, c < C, other=0.0))[:, None]
        at = base + c[:, None].to(tl.int64) * (R * R) * h_c + s[None, :] * h_s
        total += tl.sum(w * exact(tl.load(at, (c < C)[:, None] & there[None, :], other=0.0)), 0)
    tl.store(z + pixel, total, there)


@triton.jit
def read_bwd_kernel(
    dz, h, weight, dh, dweights, dbiases, C, S, W, h_b, h_c, h_s, R: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """dh of one plane, contiguous, and this program's part of dweight (programs, C) and dbias (programs,)."""
    b, plane, s, pixel, there = place_of(S, W, R, BS)
    base = h + b * h_b + plane.to(tl.int64) * h_c
    g = exact(tl.load(dz + pixel, there, other=0.0))
    tl.store(dbiases + tl.program_id(0), tl.sum(g))
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        w = exact(tl.load(weight + c, c < C, other=0.0))[:, None]
        mask = (c < C)[:, None] & there[None, :]
        at = base + c[:, None].to(tl.int64) * (R * R) * h_c + s[None, :] * h_s
        value = exact(tl.load(at, mask, other=0.0))
        to = ((b * C + c[:, None]) * (R * R) + plane) * S + s[None, :]
        tl.store(dh + to, w * g[None, :], mask)
        tl.store(dweights + tl.program_id(0).to(tl.int64) * C + c, tl.sum(value * g[None, :], 1), c < C)


@triton.jit
def write_fwd_kernel(
    h, image0, image1, image2, weight, bias, out, C, S, W, h_b, h_c, h_s,
    R: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out of one plane, contiguous."""
    b, plane, s, pixel, there = place_of(S, W, R, BS)
    base = h + b * h_b + plane.to(tl.int64) * h_c
    p0 = exact(tl.load(image0 + pixel, there, other=0.0))[None, :]
    p1 = exact(tl.load(image1 + pixel, there, other=0.0))[None, :]
    p2 = exact(tl.load(image2 + pixel, there, other=0.0))[None, :]
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        inside = c < C
        mask = inside[:, None] & there[None, :]
        w0 = exact(tl.load(weight + c * 3, inside, other=0.0))[:, None]
        w1 = exact(tl.load(weight + c * 3 + 1, inside, other=0.0))[:, None]
        w2 = exact(tl.load(weight + c * 3 + 2, inside, other=0.0))[:, None]
        shift = exact(tl.load(bias + c, inside, other=0.0))[:, None]
        at = base + c[:, None].to(tl.int64) * (R * R) * h_c + s[None, :] * h_s
        value = exact(tl.load(at, mask, other=0.0))
        to = ((b * C + c[:, None]) * (R * R) + plane) * S + s[None, :]
        tl.store(out + to, value + (w0 * p0 + w1 * p1 + w2 * p2 + shift), mask)


@triton.jit
def write_bwd_kernel(
    dout, image0, image1, image2, weight, dimage0, dimage1, dimage2, dweights, dbiases, C, S, W, d_b, d_c, d_s,
    R: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of the three images at one plane, and this program's part of dweight (programs, 3C) and dbias (programs, C)."""
    b, plane, s, pixel, there = place_of(S, W, R, BS)
    base = dout + b * d_b + plane.to(tl.int64) * d_c
    p0 = exact(tl.load(image0 + pixel, there, other=0.0))[None, :]
    p1 = exact(tl.load(image1 + pixel, there, other=0.0))[None, :]
    p2 = exact(tl.load(image2 + pixel, there, other=0.0))[None, :]
    g0 = tl.zeros((BS,), p0.dtype)
    g1 = tl.zeros((BS,), p0.dtype)
    g2 = tl.zeros((BS,), p0.dtype)
    row = tl.program_id(0).to(tl.int64) * C
    for done in range(0, C, BC):
        c = done + tl.arange(0, BC)
        inside = c < C
        at = base + c[:, None].to(tl.int64) * (R * R) * d_c + s[None, :] * d_s
        g = exact(tl.load(at, inside[:, None] & there[None, :], other=0.0))
        g0 += tl.sum(exact(tl.load(weight + c * 3, inside, other=0.0))[:, None] * g, 0)
        g1 += tl.sum(exact(tl.load(weight + c * 3 + 1, inside, other=0.0))[:, None] * g, 0)
        g2 += tl.sum(exact(tl.load(weight + c * 3 + 2, inside, other=0.0))[:, None] * g, 0)
        tl.store(dweights + (row + c) * 3, tl.sum(g * p0, 1), inside)
        tl.store(dweights + (row + c) * 3 + 1, tl.sum(g * p1, 1), inside)
        tl.store(dweights + (row + c) * 3 + 2, tl.sum(g * p2, 1), inside)
        tl.store(dbiases + row + c, tl.sum(g, 1), inside)
    tl.store(dimage0 + pixel, g0, there)
    tl.store(dimage1 + pixel, g1, there)
    tl.store(dimage2 + pixel, g2, there)


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


def inject_read(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """z in one launch; contract of `idm_fast::inject_read`."""
    B, C, height, width = h.shape
    z = torch.empty((B, 1, height * r, width * r), dtype=h.dtype, device=h.device)
    programs, sides, plan = _tiles(h, r)
    flat, weight = h.flatten(2), weight.contiguous()
    sizes = (C // (r * r), height * width, width)
    launch(read_fwd_kernel, programs, flat, weight, bias, z, *sizes, *flat.stride(), **sides, configuration=plan)
    return z


def inject_read_backward(dz: Tensor, h: Tensor, weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dweight, dbias) in three launches; contract of `idm_fast::inject_read_backward`."""
    _, C, height, width = h.shape
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight, dbias = torch.empty_like(weight), torch.empty(1, dtype=weight.dtype, device=h.device)
    programs, sides, plan = _tiles(h, r)
    exact_dtype, channels = arithmetic_dtype(h.dtype), C // (r * r)
    dweights = torch.empty(programs, channels, dtype=exact_dtype, device=h.device)
    dbiases = torch.empty(programs, 1, dtype=exact_dtype, device=h.device)
    flat = h.flatten(2)
    tensors = (dz.contiguous(), flat, weight.contiguous(), dh, dweights, dbiases)
    sizes = (channels, height * width, width)
    launch(read_bwd_kernel, programs, *tensors, *sizes, *flat.stride(), **sides, configuration=plan)
    _sum_rows(dweights, dweight)
    _sum_rows(dbiases, dbias)
    return dh, dweight, dbias


def inject_write(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int) -> Tensor:
    """h with the images written onto it, in one launch; contract of `idm_fast::inject_write`."""
    _, C, height, width = h.shape
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    programs, sides, plan = _tiles(h, r)
    flat = h.flatten(2)
    tensors = (flat, *(t.contiguous() for t in (z, gz, aty, weight, bias)), out)
    sizes = (C // (r * r), height * width, width)
    launch(write_fwd_kernel, programs, *tensors, *sizes, *flat.stride(), **sides, configuration=plan)
    return out


def inject_write_backward(
    dout: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dz, dgz, daty, dweight, dbias) in three launches; contract of `idm_fast::inject_write_backward`."""
    _, C, height, width = dout.shape
    dimages = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (z, gz, aty)]
    channels, exact_dtype = C // (r * r), arithmetic_dtype(dout.dtype)
    dweight, dbias = torch.empty_like(weight), torch.empty(channels, dtype=weight.dtype, device=dout.device)
    programs, sides, plan = _tiles(dout, r)
    dweights = torch.empty(programs, 3 * channels, dtype=exact_dtype, device=dout.device)
    dbiases = torch.empty(programs, channels, dtype=exact_dtype, device=dout.device)
    flat = dout.flatten(2)
    tensors = (flat, *(t.contiguous() for t in (z, gz, aty, weight)), *dimages, dweights, dbiases)
    sizes = (channels, height * width, width)
    launch(write_bwd_kernel, programs, *tensors, *sizes, *flat.stride(), **sides, configuration=plan)
    _sum_rows(dweights, dweight)
    _sum_rows(dbiases, dbias)
    return dimages[0], dimages[1], dimages[2], dweight, dbias


def _tiles(h: Tensor, r: int) -> tuple[int, dict[str, int], Configuration]:
    """Programs, compile-time arguments and configuration for the features h (B, C, H/r, W/r)."""
    B, C, height, width = h.shape
    plan = configuration("inject", arithmetic_dtype(h.dtype), arch_of(h))
    BC = fit(C // (r * r), CHANNELS)
    BS = fit(height * width, plan.elements // CHANNELS)
    return B * r * r * blocks(height * width, BS), {"R": r, "BC": BC, "BS": BS}, plan


def _sum_rows(parts: Tensor, total: Tensor) -> None:
    """Sum `parts` (rows, columns) into `total`, a contiguous tensor of as many elements as there are columns."""
    plan = configuration("sum", parts.dtype, arch_of(parts))
    rows, columns = parts.shape
    sides = {"COLUMNS": 8, "BLOCK": plan.elements // 8}
    launch(sum_rows_kernel, blocks(columns, 8), parts, total, rows, columns, **sides, configuration=plan)


def inject_read_cost(h: Tensor, weight: Tensor, bias: Tensor, r: int) -> Cost:
    return Cost(size((h, weight, bias)), r * r * size((h,)) // h.shape[1], 2 * h.numel())


def inject_read_backward_cost(dz: Tensor, h: Tensor, weight: Tensor, r: int) -> Cost:
    return Cost(size((dz, h, weight)), size((h, weight)), 3 * h.numel())


def inject_write_cost(h: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, bias: Tensor, r: int) -> Cost:
    return Cost(size((h, z, gz, aty, weight, bias)), size((h,)), 8 * h.numel())


def inject_write_backward_cost(dout: Tensor, z: Tensor, gz: Tensor, aty: Tensor, weight: Tensor, r: int) -> Cost:
    images = (z, gz, aty)
    return Cost(size((dout, *images, weight)), size((*images, weight)), 13 * dout.numel())
