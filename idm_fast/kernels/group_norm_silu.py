"""GroupNorm with an optional SiLU behind it (`idm_fast.ops.group_norm`) in Triton, for NCHW and NHWC, forward and backward.

A program handles a tile of channels × positions of one image. A tile knows nothing of groups: it leaves the statistics of
each of its channels, and a small kernel merges those of a group's channels and chunks. So any number of channels a group
will do, the work is split finely enough to fill a GPU with one image, and one tile serves both memory formats, long along
the dimension that is dense. Nothing is summed by atomics: the results are the same from run to run.

    forward:  statistics of each channel and chunk → mean and rstd of each group → normalize         x read twice
    backward: Σg, Σg·x̂ of each channel and chunk → sums of each group; dweight, dbias → dx           x and dout read twice

Arithmetic is in float32, in float64 for float64 input. With x̂ = (x − mean)·rstd, u = x̂·weight + bias and g = dout·silu'(u),
dx = rstd·(g·weight − mean over the group of g·weight − x̂·(mean over the group of g·weight·x̂)).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import arithmetic_dtype, divide, exact, root
from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, fit, launch

CHANNELS_LAST_WIDTH = 64
"""Channels of a tile in NHWC: 128 bytes of bfloat16, a whole cache line; divides 320, 640, 960 and 1,280."""


@triton.jit
def tile_of(C, S, BC: tl.constexpr, BS: tl.constexpr):
    """(image, first channel, first position, chunk) of this program; channels run fastest."""
    across = tl.cdiv(C, BC)
    chunks = tl.cdiv(S, BS)
    rest = tl.program_id(0) // across
    chunk = rest % chunks
    return (rest // chunks).to(tl.int64), (tl.program_id(0) % across) * BC, chunk * BS, chunk


@triton.jit
def inside(c0, s0, C, S, BC: tl.constexpr, BS: tl.constexpr):
    """Which elements of a tile there are, (BC, BS)."""
    return (tl.arange(0, BC)[:, None] < C - c0) & (tl.arange(0, BS)[None, :] < S - s0)


@triton.jit
def corner(x, b, c0, s0, stride_b, stride_c, stride_s):
    """Pointer to channel c0 at position s0 of image b."""
    return x + b * stride_b + c0.to(tl.int64) * stride_c + s0.to(tl.int64) * stride_s


@triton.jit
def tile(x, b, c0, s0, stride_b, stride_c, stride_s, BC: tl.constexpr, BS: tl.constexpr):
    """Pointers to the elements of a tile, (BC, BS)."""
    offsets = tl.arange(0, BC).to(tl.int64)[:, None] * stride_c + tl.arange(0, BS).to(tl.int64)[None, :] * stride_s
    return corner(x, b, c0, s0, stride_b, stride_c, stride_s) + offsets


@triton.jit
def of_channels(mean, rstd, weight, bias, b, c0, C, per_group, BC: tl.constexpr):
    """mean, rstd, weight and bias of the channels of a tile, each (BC, 1), and the places of their groups, (BC,).

    Loaded as vectors of BC: as a (BC, 1) tile, each thread would load them once for every element that it holds.
    """
    channel = c0 + tl.arange(0, BC)
    group = b * (C // per_group) + channel // per_group
    m = tl.load(mean + group, channel < C, other=0.0)[:, None]
    r = tl.load(rstd + group, channel < C, other=0.0)[:, None]
    w = tl.load(weight + channel, channel < C, other=0.0)[:, None].to(m.dtype)
    shift = tl.load(bias + channel, channel < C, other=0.0)[:, None].to(m.dtype)
    return m, r, w, shift, group


@triton.jit
def statistics_kernel(
    x, parts, C, S, part, stride_b, stride_c, stride_s, BC: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Mean and, `part` elements behind, sum of squared deviations from it, of each channel in this tile, to (2, B, C, chunks).

    Two passes over the registers, both on differences from the channel's first element: a large mean costs no digits.
    """
    b, c0, s0, chunk = tile_of(C, S, BC, BS)
    mask = inside(c0, s0, C, S, BC, BS)
    channel = c0 + tl.arange(0, BC)
    heads = corner(x, b, c0, s0, stride_b, stride_c, stride_s) + tl.arange(0, BC).to(tl.int64) * stride_c
    first = exact(tl.load(heads, channel < C, other=0.0))
    values = exact(tl.load(tile(x, b, c0, s0, stride_b, stride_c, stride_s, BC, BS), mask, other=0.0))
    shifted = tl.where(mask, values - first[:, None], 0.0)
    mean = tl.sum(shifted, 1) / tl.minimum(S - s0, BS).to(shifted.dtype)
    deviation = tl.where(mask, shifted - mean[:, None], 0.0)
    to = (b * C + channel) * tl.cdiv(S, BS) + chunk
    tl.store(parts + to, first + mean, channel < C)
    tl.store(parts + part + to, tl.sum(deviation * deviation, 1), channel < C)


@triton.jit
def merge_statistics_kernel(
    parts, mean, rstd, S, members, elements, part, eps: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean and 1/√(variance + eps) of one group from the statistics of its `members` = channels·chunks parts.

    The parts' means are averaged as differences from the first (as above), weighted by how many elements each part has.
    """
    chunks = tl.cdiv(S, BS)
    start = tl.program_id(0).to(tl.int64) * members
    i = tl.arange(0, BLOCK)
    first = tl.load(parts + start)
    sums = tl.zeros((BLOCK,), first.dtype)
    for done in range(0, members, BLOCK):
        mask = done + i < members
        count = tl.minimum(S - ((done + i) % chunks) * BS, BS).to(first.dtype)
        sums += tl.where(mask, count * (tl.load(parts + start + done + i, mask, other=0.0) - first), 0.0)
    center = tl.sum(sums) / elements
    sums = tl.zeros((BLOCK,), first.dtype)
    for done in range(0, members, BLOCK):
        mask = done + i < members
        count = tl.minimum(S - ((done + i) % chunks) * BS, BS).to(first.dtype)
        off = tl.load(parts + start + done + i, mask, other=0.0) - first - center
        sums += tl.where(mask, tl.load(parts + part + start + done + i, mask, other=0.0) + count * off * off, 0.0)
    tl.store(mean + tl.program_id(0), first + center)
    tl.store(rstd + tl.program_id(0), divide(1.0, root(tl.sum(sums) / elements + eps)))


@triton.jit
def normalize_kernel(
    x, weight, bias, mean, rstd, out, C, S, per_group,
    stride_b, stride_c, stride_s, out_b, out_c, out_s, SILU: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out = silu(u), or u itself, with u = (x − mean)·rstd·weight + bias."""
    b, c0, s0, _ = tile_of(C, S, BC, BS)
    mask = inside(c0, s0, C, S, BC, BS)
    m, r, w, shift, _ = of_channels(mean, rstd, weight, bias, b, c0, C, per_group, BC)
    value = tl.load(tile(x, b, c0, s0, stride_b, stride_c, stride_s, BC, BS), mask, other=0.0)
    u = (value.to(m.dtype) - m) * (r * w) + shift
    if SILU:
        u = divide(u, 1 + tl.exp(-u))
    tl.store(tile(out, b, c0, s0, out_b, out_c, out_s, BC, BS), u, mask)


@triton.jit
def normalized_and_gradient(value, dout, m, r, w, shift, SILU: tl.constexpr):
    """x̂ and g, the gradient of u."""
    normalized = (value.to(m.dtype) - m) * r
    g = dout.to(m.dtype)
    if SILU:
        u = normalized * w + shift
        sigmoid = divide(1.0, 1 + tl.exp(-u))
        g = g * sigmoid * (1 + u * (1 - sigmoid))
    return normalized, g


@triton.jit
def gradient_sums_kernel(
    dout, x, weight, bias, mean, rstd, sums, C, S, per_group, part,
    dout_b, dout_c, dout_s, stride_b, stride_c, stride_s, SILU: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Σg·x̂ and, `part` elements behind it, Σg, of each channel in this tile, to (2, B, C, chunks)."""
    b, c0, s0, chunk = tile_of(C, S, BC, BS)
    mask = inside(c0, s0, C, S, BC, BS)
    m, r, w, shift, _ = of_channels(mean, rstd, weight, bias, b, c0, C, per_group, BC)
    value = tl.load(tile(x, b, c0, s0, stride_b, stride_c, stride_s, BC, BS), mask, other=0.0)
    g = tl.load(tile(dout, b, c0, s0, dout_b, dout_c, dout_s, BC, BS), mask, other=0.0)
    normalized, g = normalized_and_gradient(value, g, m, r, w, shift, SILU)
    channel = c0 + tl.arange(0, BC)
    to = (b * C + channel) * tl.cdiv(S, BS) + chunk
    tl.store(sums + to, tl.sum(g * normalized, 1), channel < C)
    tl.store(sums + part + to, tl.sum(g, 1), channel < C)


@triton.jit
def merge_groups_kernel(sums, weight, of_groups, C, per_group, chunks, elements, part, groups, BLOCK: tl.constexpr):
    """Means over one group of g·weight·x̂ and, `groups` = B·G elements behind, of g·weight."""
    members = per_group * chunks
    start = tl.program_id(0).to(tl.int64) * members
    channel = (tl.program_id(0) % (C // per_group)) * per_group
    i = tl.arange(0, BLOCK)
    with_x = tl.zeros((BLOCK,), of_groups.dtype.element_ty)
    plain = tl.zeros((BLOCK,), of_groups.dtype.element_ty)
    for done in range(0, members, BLOCK):
        mask = done + i < members
        w = tl.load(weight + channel + (done + i) // chunks, mask, other=0.0).to(plain.dtype)
        with_x += w * tl.load(sums + start + done + i, mask, other=0.0)
        plain += w * tl.load(sums + part + start + done + i, mask, other=0.0)
    tl.store(of_groups + tl.program_id(0), tl.sum(with_x) / elements)
    tl.store(of_groups + groups + tl.program_id(0), tl.sum(plain) / elements)


@triton.jit
def merge_channels_kernel(sums, dweight, dbias, B, C, chunks, part, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight and dbias of CHANNELS channels: their sums over images and chunks, in a fixed order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, BLOCK)
    with_x = tl.zeros((CHANNELS, BLOCK), sums.dtype.element_ty)
    plain = tl.zeros((CHANNELS, BLOCK), sums.dtype.element_ty)
    for done in range(0, B * chunks, BLOCK):
        mask = (channel < C)[:, None] & (done + i < B * chunks)[None, :]
        image, chunk = ((done + i) // chunks).to(tl.int64), (done + i) % chunks
        at = (image[None, :] * C + channel[:, None]) * chunks + chunk[None, :]
        with_x += tl.load(sums + at, mask, other=0.0)
        plain += tl.load(sums + part + at, mask, other=0.0)
    tl.store(dweight + channel, tl.sum(with_x, 1), channel < C)
    tl.store(dbias + channel, tl.sum(plain, 1), channel < C)


@triton.jit
def input_gradient_kernel(
    dout, x, weight, bias, mean, rstd, of_groups, dx, C, S, per_group, groups,
    dout_b, dout_c, dout_s, stride_b, stride_c, stride_s, dx_b, dx_c, dx_s,
    SILU: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dx from x, dout and the two means of each group."""
    b, c0, s0, _ = tile_of(C, S, BC, BS)
    mask = inside(c0, s0, C, S, BC, BS)
    m, r, w, shift, group = of_channels(mean, rstd, weight, bias, b, c0, C, per_group, BC)
    there = c0 + tl.arange(0, BC) < C
    with_x = tl.load(of_groups + group, there, other=0.0)[:, None]
    plain = tl.load(of_groups + groups + group, there, other=0.0)[:, None]
    value = tl.load(tile(x, b, c0, s0, stride_b, stride_c, stride_s, BC, BS), mask, other=0.0)
    g = tl.load(tile(dout, b, c0, s0, dout_b, dout_c, dout_s, BC, BS), mask, other=0.0)
    normalized, g = normalized_and_gradient(value, g, m, r, w, shift, SILU)
    result = r * (g * w - plain - normalized * with_x)
    tl.store(tile(dx, b, c0, s0, dx_b, dx_c, dx_s, BC, BS), result, mask)


@dataclass(frozen=True)
class Tiling:
    """Tiles of channels × positions over (B, C, S), and the configurations of the large and the merging kernels."""

    sides: dict[str, int]
    chunks: int
    programs: int
    plan: Configuration
    merge: Configuration


@functools.lru_cache(maxsize=1024)
def tiling_of(B: int, C: int, S: int, channels_last: bool, exact_dtype: torch.dtype, arch: int) -> Tiling:
    """How (B, C, S) is cut: long along the positions in NCHW, along the channels in NHWC; both at most what there is."""
    plan = configuration("group_norm", exact_dtype, arch)
    if channels_last:
        BC = fit(C, CHANNELS_LAST_WIDTH)
        BS = fit(S, plan.elements // BC)
    else:
        BS = fit(S, plan.elements)
        BC = fit(C, plan.elements // BS)
    merge = configuration("merge", exact_dtype, arch)
    return Tiling({"BC": BC, "BS": BS}, blocks(S, BS), B * blocks(C, BC) * blocks(S, BS), plan, merge)


def tiling(x: Tensor) -> Tiling:
    """The tiling of x (B, C, S)."""
    _, stride_c, stride_s = x.stride()
    return tiling_of(*x.shape, stride_c == 1 and stride_s != 1, arithmetic_dtype(x.dtype), arch_of(x))


def flat(t: Tensor) -> Tensor:
    """(B, C, …) as (B, C, S), without a copy for NCHW, NHWC and whatever else has one stride for all positions."""
    return t.flatten(2) if t.ndim > 2 else t[:, :, None]


def filled(t: Tensor, flattened: Tensor) -> Tensor:
    """`t`, after something was written to flat(t), which may have been a copy."""
    return t if t.data_ptr() == flattened.data_ptr() else t.copy_(flattened.view(t.shape))


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd) in three launches; contract of `idm_fast::group_norm_silu`."""
    result = torch.empty_like(x, dtype=dtype)
    x, out = flat(x), flat(result)
    B, C, S = x.shape
    exact_dtype, device = arithmetic_dtype(x.dtype), x.device
    mean = torch.empty(B, groups, dtype=exact_dtype, device=device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return result, mean.zero_(), rstd.fill_(torch.nan)  # no element has no variance; as torch.native_group_norm
    weight, bias, cut = weight.contiguous(), bias.contiguous(), tiling(x)
    part = B * C * cut.chunks
    parts = torch.empty(2 * part, dtype=exact_dtype, device=device)
    launch(statistics_kernel, cut.programs, x, parts, C, S, part, *x.stride(), **cut.sides, configuration=cut.plan)
    constants = {"eps": eps, "BS": cut.sides["BS"], "BLOCK": cut.merge.elements}
    arguments = (parts, mean, rstd, S, C // groups * cut.chunks, C // groups * S, part)
    launch(merge_statistics_kernel, B * groups, *arguments, **constants, configuration=cut.merge)
    tensors, strides = (x, weight, bias, mean, rstd, out), (*x.stride(), *out.stride())
    constants = {"SILU": silu, **cut.sides}
    launch(normalize_kernel, cut.programs, *tensors, C, S, C // groups, *strides, **constants, configuration=cut.plan)
    return filled(result, out), mean, rstd


def group_norm_silu_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) in four launches; contract of `idm_fast::group_norm_silu_backward`."""
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    if x.numel() == 0:
        return torch.empty_like(x), dweight.zero_(), dbias.zero_()
    result = torch.empty_like(x)
    x, dout, dx = flat(x), flat(dout), flat(result)
    weight, bias, mean, rstd = (t.contiguous() for t in (weight, bias, mean, rstd))
    B, C, S = x.shape
    per_group, all_groups, device = C // groups, B * groups, x.device
    cut = tiling(x)
    part = B * C * cut.chunks
    sums = torch.empty(2, part, dtype=mean.dtype, device=device)
    of_groups = torch.empty(2, all_groups, dtype=mean.dtype, device=device)
    constants, block = {"SILU": silu, **cut.sides}, {"BLOCK": cut.merge.elements}
    tensors, strides = (dout, x, weight, bias, mean, rstd), (*dout.stride(), *x.stride())
    sizes = (C, S, per_group)
    launch(gradient_sums_kernel, cut.programs, *tensors, sums, *sizes, part, *strides, **constants, configuration=cut.plan)
    counts = (C, per_group, cut.chunks, per_group * S, part, all_groups)
    launch(merge_groups_kernel, all_groups, sums, weight, of_groups, *counts, **block, configuration=cut.merge)
    arguments, sides = (sums, dweight, dbias, B, C, cut.chunks, part), {"CHANNELS": 8, "BLOCK": cut.merge.elements // 8}
    launch(merge_channels_kernel, blocks(C, 8), *arguments, **sides, configuration=cut.merge)
    rest = (of_groups, dx, *sizes, all_groups, *strides, *dx.stride())
    launch(input_gradient_kernel, cut.programs, *tensors, *rest, **constants, configuration=cut.plan)
    return filled(result, dx), dweight, dbias


def group_norm_silu_cost(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype | None
) -> Cost:
    """x is read twice: a group of 10 channels at 128² is larger than what a multiprocessor can keep."""
    written = x.numel() * (dtype or x.dtype).itemsize + 2 * x.shape[0] * groups * arithmetic_dtype(x.dtype).itemsize
    return Cost(2 * size((x,)) + size((weight, bias)), written, (8 + 4 * silu) * x.numel())


def group_norm_silu_backward_cost(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> Cost:
    """x and dout are read twice, for the same reason."""
    read = 2 * size((x, dout)) + size((weight, bias, mean, rstd))
    return Cost(read, size((x, weight, bias)), (11 + 16 * silu) * x.numel())
