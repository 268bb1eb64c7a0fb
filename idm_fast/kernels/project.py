"""Block compressed sensing and the sampling step on it (`idm_fast.ops.projection`) in Triton.

An image is gathered by the permutation into rows of N pixels, multiplied by Φ (N, q), and back. Every op is one or two
kernels, and neither gathered pixels nor anything else of the size of an image is written on the way:

    measure kernel:  rows·Φ − y, the rows gathered, and on demand denoised, as they are read
    adjoint kernel:  measurements·Φᵀ, scattered; with `step_fwd_kernel` and `step_bwd_kernel` the DDIM update rides on it

An entry of the permutation that points out of the image is never followed: its pixel is read as NaN and not written.
A program computes a tile of rows × columns and reads each element of Φ that it needs once. Products are of float32 in full
(no TF32), of float64 for float64, and so are all sums; what passes from kernel to kernel keeps that dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.arithmetic import arithmetic_dtype, divide, exact, root
from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, launch

ROWS = 16
"""Rows of a tile. With 32 columns, 512 rows (batch 8 at 256²) times q = 103 make 128 programs, and times N = 1,024 1,024."""


@triton.jit
def places(permutation, row, column, rows, per_image, N):
    """Where in the batch of images the given rows and columns of the gathered matrix stand, and which of them are in an image:
    those in the matrix, unless the permutation points elsewhere."""
    there = (row < rows)[:, None] & (column < N)[None, :]
    pixel = tl.load(permutation + (row % per_image)[:, None] * N + column[None, :], there, other=0)
    there &= (pixel >= 0) & (pixel < per_image * N)
    return (row // per_image)[:, None].to(tl.int64) * (per_image * N) + pixel, there


@triton.jit
def roots(abar, like):
    """√ᾱ and √(1 − ᾱ) in the dtype of `like`."""
    a = tl.load(abar).to(like.dtype)
    return root(a), root(1 - a)


@triton.jit
def measure_kernel(
    x, e, y, abar, matrix, permutation, out, rows, per_image, N, q, matrix_n, matrix_q,
    DENOISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = rows of x · Φ; with DENOISE, rows of (x − √(1−ᾱ)·e)/√ᾱ, minus y; with `abar` alone, rows of √ᾱ·x."""
    across = tl.cdiv(q, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), exact(tl.load(x)).dtype)
    if abar is not None:
        s, c = roots(abar, total)
    for done in range(0, N, DEPTH):
        n = done + tl.arange(0, DEPTH)
        at, there = places(permutation, row, n, rows, per_image, N)
        value = exact(tl.load(x + at, there, other=float("nan")))
        if DENOISE:
            value = divide(value - c * exact(tl.load(e + at, there, other=0.0)), s + tl.zeros_like(value))
        elif abar is not None:
            value = s * value
        value = tl.where((n < N)[None, :], value, 0.0)
        mask = (n < N)[:, None] & (column < q)[None, :]
        phi = exact(tl.load(matrix + n[:, None] * matrix_n + column[None, :] * matrix_q, mask, other=0.0))
        total += tl.dot(value, phi, input_precision="ieee", out_dtype=total.dtype)
    to = row[:, None].to(tl.int64) * q + column[None, :]
    mask = (row < rows)[:, None] & (column < q)[None, :]
    if DENOISE:
        total -= exact(tl.load(y + to, mask, other=0.0))
    tl.store(out + to, total, mask)


@triton.jit
def back(y, matrix, row, column, rows, N, q, matrix_n, matrix_q, DEPTH: tl.constexpr):
    """The tile of y·Φᵀ at the given rows and columns."""
    total = tl.zeros((row.shape[0], column.shape[0]), exact(tl.load(y)).dtype)
    for done in range(0, q, DEPTH):
        k = done + tl.arange(0, DEPTH)
        mask = (row < rows)[:, None] & (k < q)[None, :]
        values = exact(tl.load(y + row[:, None].to(tl.int64) * q + k[None, :], mask, other=0.0))
        mask = (k < q)[:, None] & (column < N)[None, :]
        phi = exact(tl.load(matrix + column[None, :] * matrix_n + k[:, None] * matrix_q, mask, other=0.0))
        total += tl.dot(values, phi, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def adjoint_kernel(
    y, matrix, permutation, out, rows, per_image, N, q, matrix_n, matrix_q,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = y·Φᵀ, scattered to the images."""
    across = tl.cdiv(N, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = back(y, matrix, row, column, rows, N, q, matrix_n, matrix_q, DEPTH)
    at, there = places(permutation, row, column, rows, per_image, N)
    tl.store(out + at, total, there)


@triton.jit
def step_fwd_kernel(
    x, e, residual, abar_t, abar_prev, matrix, permutation, out, rows, per_image, N, q, matrix_n, matrix_q,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = √ᾱ_{t−1}·(x0 − residual·Φᵀ) + √(1−ᾱ_{t−1})·e, with x0 = (x − √(1−ᾱ_t)·e)/√ᾱ_t."""
    across = tl.cdiv(N, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    correction = back(residual, matrix, row, column, rows, N, q, matrix_n, matrix_q, DEPTH)
    at, there = places(permutation, row, column, rows, per_image, N)
    s, c = roots(abar_t, correction)
    s_prev, c_prev = roots(abar_prev, correction)
    noise = exact(tl.load(e + at, there, other=0.0))
    x0 = divide(exact(tl.load(x + at, there, other=0.0)) - c * noise, s + tl.zeros_like(noise))
    tl.store(out + at, s_prev * (x0 - correction) + c_prev * noise, there)


@triton.jit
def step_bwd_kernel(
    g, x, e, residual, dy, abar_t, abar_prev, matrix, permutation, dx, de, partials,
    rows, per_image, N, q, matrix_n, matrix_q, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx, de, and this program's parts of Σdx0·x0, Σdx0·e, Σg·p and Σg·e, to (4, programs).

    p is the projected x0, dx0 = √ᾱ_{t−1}·g − dy·Φᵀ the gradient of x0, with dy that of y.
    """
    across = tl.cdiv(N, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    correction = back(residual, matrix, row, column, rows, N, q, matrix_n, matrix_q, DEPTH)
    removed = back(dy, matrix, row, column, rows, N, q, matrix_n, matrix_q, DEPTH)
    at, there = places(permutation, row, column, rows, per_image, N)
    s, c = roots(abar_t, correction)
    s_prev, c_prev = roots(abar_prev, correction)
    noise = exact(tl.load(e + at, there, other=0.0))
    x0 = divide(exact(tl.load(x + at, there, other=0.0)) - c * noise, s + tl.zeros_like(noise))
    gradient = exact(tl.load(g + at, there, other=0.0))
    dx0 = s_prev * gradient - removed
    tl.store(dx + at, divide(dx0, s + tl.zeros_like(dx0)), there)
    tl.store(de + at, c_prev * gradient - c / s * dx0, there)
    part = partials + tl.program_id(0)
    tl.store(part, tl.sum(tl.where(there, dx0 * x0, 0.0)))
    tl.store(part + programs, tl.sum(tl.where(there, dx0 * noise, 0.0)))
    tl.store(part + 2 * programs, tl.sum(tl.where(there, gradient * (x0 - correction), 0.0)))
    tl.store(part + 3 * programs, tl.sum(tl.where(there, gradient * noise, 0.0)))


@triton.jit
def row_sum(parts, n, BLOCK: tl.constexpr):
    """Σ of n elements in float64, in an order that n alone decides."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        sums += tl.load(parts + start + i, start + i < n, other=0.0).to(tl.float64)
    return tl.sum(sums)


@triton.jit
def abar_kernel(partials, abar_t, abar_prev, dabar_t, dabar_prev, programs, BLOCK: tl.constexpr):
    """Gradients of ᾱ_t and ᾱ_{t−1} from the four sums, by one program. With ᾱ_{t−1} = 1 the latter is infinite, as it is."""
    a, previous = tl.load(abar_t).to(tl.float64), tl.load(abar_prev).to(tl.float64)
    ds = -row_sum(partials, programs, BLOCK) / tl.sqrt(a)
    dc = -row_sum(partials + programs, programs, BLOCK) / tl.sqrt(a)
    ds_prev = row_sum(partials + 2 * programs, programs, BLOCK)
    dc_prev = row_sum(partials + 3 * programs, programs, BLOCK)
    tl.store(dabar_t, ds / (2 * tl.sqrt(a)) - dc / (2 * tl.sqrt(1 - a)))
    tl.store(dabar_prev, ds_prev / (2 * tl.sqrt(previous)) - dc_prev / (2 * tl.sqrt(1 - previous)))


def measure(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    """A x in one launch; contract of `idm_fast::measure`."""
    N, q = matrix.shape
    y = torch.empty((x.shape[0], permutation.shape[0] // N, q), dtype=x.dtype, device=x.device)
    _measure(x.contiguous(), None, None, None, matrix, permutation, y)
    return y


def adjoint(y: Tensor, matrix: Tensor, permutation: Tensor, height: int, width: int) -> Tensor:
    """Aᵀ y in one launch; contract of `idm_fast::adjoint`."""
    x = torch.empty((y.shape[0], 1, height, width), dtype=y.dtype, device=y.device)
    _back(adjoint_kernel, (y.contiguous(), matrix, permutation.contiguous(), x), matrix, permutation, y.shape[0])
    return x


def gram(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    """AᵀA x in two launches; contract of `idm_fast::gram`."""
    y = _measurements(x, matrix, permutation)
    _measure(x.contiguous(), None, None, None, matrix, permutation, y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _back(adjoint_kernel, (y, matrix, permutation.contiguous(), out), matrix, permutation, x.shape[0])
    return out


def project_step(
    x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> Tensor:
    """One sampling step in two launches; contract of `idm_fast::project_step`."""
    x, e, y, permutation = (t.contiguous() for t in (x, e, y, permutation))
    residual = _measurements(x, matrix, permutation)
    _measure(x, e, y, abar_t, matrix, permutation, residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = (x, e, residual, abar_t, abar_prev, matrix, permutation, out)
    _back(step_fwd_kernel, tensors, matrix, permutation, x.shape[0])
    return out


def project_step_backward(
    g: Tensor, x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, de, dy, dᾱ_t, dᾱ_{t−1}) in four launches; contract of `idm_fast::project_step_backward`."""
    g, x, e, y, permutation = (t.contiguous() for t in (g, x, e, y, permutation))
    residual, dy = (_measurements(x, matrix, permutation) for _ in range(2))
    _measure(x, e, y, abar_t, matrix, permutation, residual)
    _measure(g, None, None, abar_prev, matrix, permutation, dy)
    dx, de = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dabar_t, dabar_prev = torch.empty_like(abar_t), torch.empty_like(abar_prev)
    programs = _tiles(x, x.shape[0] * y.shape[1], matrix.shape[0])[0]
    partials = torch.empty(4, programs, dtype=dy.dtype, device=x.device)
    tensors = (g, x, e, residual, dy, abar_t, abar_prev, matrix, permutation, dx, de, partials)
    _back(step_bwd_kernel, tensors, matrix, permutation, x.shape[0], programs)
    plan = configuration("sum", dy.dtype, arch_of(x))
    arguments = (partials, abar_t, abar_prev, dabar_t, dabar_prev, programs)
    launch(abar_kernel, 1, *arguments, BLOCK=plan.elements, configuration=plan)
    return dx, de, dy.to(y.dtype), dabar_t, dabar_prev


def _measurements(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    """Room for the measurements of x in the dtype of the arithmetic."""
    N, q = matrix.shape
    rows = permutation.shape[0] // N
    return torch.empty((x.shape[0], rows, q), dtype=arithmetic_dtype(x.dtype), device=x.device)


def _tiles(x: Tensor, rows: int, columns: int) -> tuple[int, dict[str, int], Configuration]:
    """Programs, tile and configuration for a matrix of rows × columns that is computed from x.

    DEPTH is how much of the summed dimension a program loads at a time.
    """
    plan = configuration("project", arithmetic_dtype(x.dtype), arch_of(x))
    side = plan.elements // ROWS
    return blocks(rows, ROWS) * blocks(columns, side), {"ROWS": ROWS, "COLUMNS": side, "DEPTH": side}, plan


def _measure(
    x: Tensor, e: Tensor | None, y: Tensor | None, abar: Tensor | None, matrix: Tensor, permutation: Tensor, out: Tensor
) -> None:
    """Launch the measure kernel on contiguous x, e and y; `out` is (B, rows, q)."""
    B, per_image, q = out.shape
    programs, sides, plan = _tiles(x, B * per_image, q)
    tensors = (x, e, y, abar, matrix, permutation.contiguous(), out)
    sizes = (B * per_image, per_image, matrix.shape[0], q, *matrix.stride())
    launch(measure_kernel, programs, *tensors, *sizes, DENOISE=e is not None, **sides, configuration=plan)


def _back(kernel: Any, tensors: tuple[Tensor, ...], matrix: Tensor, permutation: Tensor, batch: int, *more: int) -> None:
    """Launch a kernel that multiplies by Φᵀ and scatters."""
    N, q = matrix.shape
    per_image = permutation.shape[0] // N
    programs, sides, plan = _tiles(tensors[0], batch * per_image, N)
    sizes = (batch * per_image, per_image, N, q, *matrix.stride(), *more)
    launch(kernel, programs, *tensors, *sizes, **sides, configuration=plan)


def _product_flop(x: Tensor, matrix: Tensor) -> int:
    """Of one product with Φ or its transpose, for images x."""
    return 2 * x.numel() * matrix.shape[1]


def measure_cost(x: Tensor, matrix: Tensor, permutation: Tensor) -> Cost:
    measured = size((x,)) // matrix.shape[0] * matrix.shape[1]
    return Cost(size((x, matrix, permutation)), measured, _product_flop(x, matrix))


def adjoint_cost(y: Tensor, matrix: Tensor, permutation: Tensor, height: int, width: int) -> Cost:
    image = size((y,)) // matrix.shape[1] * matrix.shape[0]
    return Cost(size((y, matrix, permutation)), image, 2 * y.numel() * matrix.shape[0])


def gram_cost(x: Tensor, matrix: Tensor, permutation: Tensor) -> Cost:
    return Cost(size((x, matrix, permutation)), size((x,)), 2 * _product_flop(x, matrix))


def project_step_cost(
    x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> Cost:
    return Cost(size((x, e, y, matrix, permutation)), size((x,)), 2 * _product_flop(x, matrix) + 7 * x.numel())


def project_step_backward_cost(
    g: Tensor, x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> Cost:
    flop = 4 * _product_flop(x, matrix) + 18 * x.numel()
    return Cost(size((g, x, e, y, matrix, permutation)), size((x, e, y)), flop)
