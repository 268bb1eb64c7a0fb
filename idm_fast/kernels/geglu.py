"""GEGLU of `idm_fast.ops.geglu` in Triton: value · gelu(gate), exact erf; the backward kernel recomputes the gate.

h is (rows, 2d) with value and gate side by side; a program handles a tile of rows × columns of the (rows, d) output.
Arithmetic is in float32, in float64 for float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import exact
from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, fit, launch

WIDTH = 256
"""Columns of a tile: divides 1,280 and 2,560, the widths in Stable Diffusion 1.5, so that no lane is idle there."""


@triton.jit
def normal_cdf(x):
    """Φ(x) of the standard normal distribution; gelu(x) = x·Φ(x)."""
    return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def geglu_fwd_kernel(h, out, rows, d, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (rows, d), contiguous, from h with `stride` elements between rows."""
    across = tl.cdiv(d, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < d)
    value = exact(tl.load(h + row * stride + column, mask, other=0.0))
    gate = exact(tl.load(h + row * stride + d + column, mask, other=0.0))
    tl.store(out + row * d + column, value * gate * normal_cdf(gate), mask)


@triton.jit
def geglu_bwd_kernel(dout, h, dh, rows, d, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dh (rows, 2d), contiguous: dvalue = dout·gelu(gate), dgate = dout·value·gelu'(gate) with gelu' = Φ + gate·φ."""
    across = tl.cdiv(d, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < d)
    g = exact(tl.load(dout + row * d + column, mask, other=0.0))
    value = exact(tl.load(h + row * stride + column, mask, other=0.0))
    gate = exact(tl.load(h + row * stride + d + column, mask, other=0.0))
    cdf = normal_cdf(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dh + row * (2 * d) + column, g * gate * cdf, mask)
    tl.store(dh + row * (2 * d) + d + column, g * value * (cdf + gate * density), mask)


def geglu(h: Tensor) -> Tensor:
    """(…, 2d) → (…, d) in one launch; contract of `idm_fast::geglu`."""
    out = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype, device=h.device)
    h = _rows(h)
    programs, tile, plan = _tiles(h)
    launch(geglu_fwd_kernel, programs, h, out, h.shape[0], h.shape[1] // 2, h.stride(0), **tile, configuration=plan)
    return out


def geglu_backward(dout: Tensor, h: Tensor) -> Tensor:
    """dh in one launch; contract of `idm_fast::geglu_backward`."""
    dh = torch.empty_like(h)
    dense = dh if dh.is_contiguous() else torch.empty_like(h, memory_format=torch.contiguous_format)
    h = _rows(h)
    programs, tile, plan = _tiles(h)
    sizes = (h.shape[0], h.shape[1] // 2, h.stride(0))
    launch(geglu_bwd_kernel, programs, dout.contiguous(), h, dense, *sizes, **tile, configuration=plan)
    return dh if dense is dh else dh.copy_(dense)


def _rows(h: Tensor) -> Tensor:
    """h as (rows, 2d) whose rows lie densely, without a copy where its strides allow."""
    h = h.flatten(0, -2) if h.ndim > 1 else h[None]
    return h if h.stride(1) == 1 else h.contiguous()


def _tiles(h: Tensor) -> tuple[int, dict[str, int], Configuration]:
    """Programs, tile and configuration for h (rows, 2d)."""
    plan = configuration("geglu", h.dtype, arch_of(h))
    d = h.shape[1] // 2
    columns = fit(d, WIDTH)
    rows = fit(h.shape[0], plan.elements // columns)
    return blocks(h.shape[0], rows) * blocks(d, columns), {"ROWS": rows, "COLUMNS": columns}, plan


def geglu_cost(h: Tensor) -> Cost:
    return Cost(size((h,)), size((h,)) // 2, 6 * h.numel() // 2)


def geglu_backward_cost(dout: Tensor, h: Tensor) -> Cost:
    return Cost(size((dout, h)), size((h,)), 14 * dout.numel())
