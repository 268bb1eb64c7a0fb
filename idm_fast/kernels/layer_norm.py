"""LayerNorm over the last dimension (`idm_fast.ops.layer_norm`) in Triton, forward and backward.

x is (rows, C). A program holds some whole rows in registers, so x is read once each way; a row is covered by the next power of
two of elements, and lanes beyond C load nothing. C is meant to be at most some thousands: wider rows leave the registers.

    forward:  mean, rstd, out                                                      one launch
    backward: dx, and Σ dout·x̂ and Σ dout over each program's rows → dweight, dbias    two launches

Each backward program walks rows of its own in a fixed order and leaves its two sums; a second kernel adds those. Nothing is
summed by atomics: the results are the same from run to run. Arithmetic is in float32, in float64 for float64 input. With
x̂ = (x − mean)·rstd and g = dout·weight, dx = rstd·(g − mean of g − x̂·(mean of g·x̂)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import arithmetic_dtype, divide, exact, root
from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, launch, power_of_two

BACKWARD_PROGRAMS = 1024
"""At most so many, each with two rows of sums: they fill any GPU, and at 131,072 rows their sums are 2 % of the traffic."""

SUMMED_COLUMNS = 16
"""Columns of dweight and dbias that one program of the second stage adds up."""


@triton.jit
def layer_norm_fwd_kernel(
    x, weight, bias, mean, rstd, out, rows, C, stride, eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (rows, C), contiguous, from x with `stride` elements between rows; mean and rstd of each row.

    The first mean is rounded as a sum of C values is; what the deviations from it add up to corrects it, and them: a large
    mean costs no digits, and nor does an outlier.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < C)[None, :]
    value = exact(tl.load(x + row[:, None] * stride + column[None, :], mask, other=0.0))
    center = tl.sum(value, 1) / C
    deviation = tl.where(mask, value - center[:, None], 0.0)
    correction = tl.sum(deviation, 1) / C
    deviation = tl.where(mask, deviation - correction[:, None], 0.0)
    r = divide(1.0, root(tl.sum(deviation * deviation, 1) / C + eps))
    w = tl.load(weight + column, column < C, other=0.0).to(r.dtype)
    b = tl.load(bias + column, column < C, other=0.0).to(r.dtype)
    tl.store(mean + row, center + correction, row < rows)
    tl.store(rstd + row, r, row < rows)
    tl.store(out + row[:, None] * C + column[None, :], deviation * r[:, None] * w[None, :] + b[None, :], mask)


@triton.jit
def layer_norm_bwd_kernel(
    dout, x, weight, mean, rstd, dx, sums, rows, C, dout_stride, stride, tiles, part, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx of `tiles`·ROWS rows, contiguous; Σ dout·x̂ and, `part` elements behind it, Σ dout of them, to (2, programs, C)."""
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, column < C, other=0.0).to(mean.dtype.element_ty)
    with_x = tl.zeros((ROWS, BLOCK), w.dtype)
    plain = tl.zeros((ROWS, BLOCK), w.dtype)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < C)[None, :]
        m = tl.load(mean + row, row < rows, other=0.0)[:, None]
        r = tl.load(rstd + row, row < rows, other=0.0)[:, None]
        value = tl.load(x + row[:, None] * stride + column[None, :], mask, other=0.0).to(w.dtype)
        d = tl.load(dout + row[:, None] * dout_stride + column[None, :], mask, other=0.0).to(w.dtype)
        normalized = tl.where(mask, (value - m) * r, 0.0)
        with_x += d * normalized
        plain += d
        g = d * w[None, :]
        of_g, of_both = tl.sum(g, 1) / C, tl.sum(g * normalized, 1) / C
        result = r * (g - of_g[:, None] - normalized * of_both[:, None])
        tl.store(dx + row[:, None] * C + column[None, :], result, mask)
    to = sums + tl.program_id(0).to(tl.int64) * C + column
    tl.store(to, tl.sum(with_x, 0), column < C)
    tl.store(to + part, tl.sum(plain, 0), column < C)


@triton.jit
def sum_columns_kernel(sums, dweight, dbias, programs, C, part, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight and dbias of COLUMNS columns: the sums of all programs, added in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, BLOCK)
    with_x = tl.zeros((BLOCK, COLUMNS), sums.dtype.element_ty)
    plain = tl.zeros((BLOCK, COLUMNS), sums.dtype.element_ty)
    for done in range(0, programs, BLOCK):
        mask = (done + i < programs)[:, None] & (column < C)[None, :]
        at = sums + (done + i)[:, None].to(tl.int64) * C + column[None, :]
        with_x += tl.load(at, mask, other=0.0)
        plain += tl.load(at + part, mask, other=0.0)
    tl.store(dweight + column, tl.sum(with_x, 0), column < C)
    tl.store(dbias + column, tl.sum(plain, 0), column < C)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd) in one launch; contract of `idm_fast::layer_norm`."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    exact_dtype = arithmetic_dtype(x.dtype)
    mean, rstd = (torch.empty((*x.shape[:-1], 1), dtype=exact_dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return out, mean.zero_(), rstd.fill_(torch.nan)  # no element has no variance; as torch.native_layer_norm
    x = _rows(x)
    rows, C = x.shape
    tile, plan = _tile(x)
    tensors = (x, weight.contiguous(), bias.contiguous(), mean, rstd, out)
    programs = blocks(rows, tile["ROWS"])
    launch(layer_norm_fwd_kernel, programs, *tensors, rows, C, x.stride(0), eps=eps, **tile, configuration=plan)
    return out, mean, rstd


def layer_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) in two launches; contract of `idm_fast::layer_norm_backward`."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    x, dout = _rows(x), _rows(dout)
    rows, C = x.shape
    tile, plan = _tile(x)
    tiles = blocks(blocks(rows, tile["ROWS"]), BACKWARD_PROGRAMS)
    programs = blocks(rows, tile["ROWS"] * tiles)
    sums = torch.empty((2, programs, C), dtype=mean.dtype, device=x.device)
    tensors = (dout, x, weight.contiguous(), mean.contiguous(), rstd.contiguous(), dx, sums)
    sizes = (rows, C, dout.stride(0), x.stride(0), tiles, programs * C)
    launch(layer_norm_bwd_kernel, programs, *tensors, *sizes, **tile, configuration=plan)
    last = configuration("merge", mean.dtype, arch_of(x))
    sides = {"COLUMNS": SUMMED_COLUMNS, "BLOCK": last.elements // SUMMED_COLUMNS}
    arguments = (sums, dweight, dbias, programs, C, programs * C)
    launch(sum_columns_kernel, blocks(C, SUMMED_COLUMNS), *arguments, **sides, configuration=last)
    return dx, dweight, dbias


def _rows(x: Tensor) -> Tensor:
    """x as (rows, C) whose rows lie densely, without a copy where its strides allow."""
    x = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(x: Tensor) -> tuple[dict[str, int], Configuration]:
    """Tile and configuration for x (rows, C)."""
    plan = configuration("layer_norm", arithmetic_dtype(x.dtype), arch_of(x))
    width = power_of_two(x.shape[1])
    return {"ROWS": max(plan.elements // width, 1), "BLOCK": width}, plan


def layer_norm_cost(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None) -> Cost:
    statistics = 2 * x.numel() // x.shape[-1] * arithmetic_dtype(x.dtype).itemsize
    return Cost(size((x, weight, bias)), x.numel() * (dtype or x.dtype).itemsize + statistics, 8 * x.numel())


def layer_norm_backward_cost(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Cost:
    return Cost(size((dout, x, weight, mean, rstd)), size((x, weight, bias)), 14 * x.numel())
