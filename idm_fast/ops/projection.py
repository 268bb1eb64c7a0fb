"""Block compressed sensing with a permutation (DESIGN §1), and one sampling step built on it.

    measure  A x:  rows of N = Φ.shape[0] permuted pixels, each times Φ     (B, 1, H, W) → (B, H·W/N, q)
    adjoint  Aᵀ y: rows times Φᵀ, scattered back by the permutation         (B, H·W/N, q) → (B, 1, H, W)
    gram     AᵀA x

Φ is (N, q) with orthonormal columns, so A Aᵀ = I. `permutation` is (H·W,) int64: row-major pixel k of the permuted image is
x.flatten()[permutation[k]]. Φ and the permutation are fixed: they get no gradient, and the public functions refuse one.

Products of float32 are exact. On a GPU the plain-PyTorch reference and the CUDA kernels make them in TF32 instead while PyTorch
is told to, by `torch.set_float32_matmul_precision("high")` (`torch.backends.cuda.matmul.fp32_precision`, set alone, keeps some
versions of torch.compile from working); Triton's kernels never do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from idm_fast.ops.arguments import check_dtype, check_floating, check_number, check_shape
from idm_fast.ops.registry import define_op, register_gradient


def _gather(x: Tensor, permutation: Tensor, N: int) -> Tensor:
    return x.flatten(1).index_select(1, permutation).unflatten(1, (permutation.shape[0] // N, N))


def _scatter(rows: Tensor, permutation: Tensor, height: int, width: int) -> Tensor:
    flat = rows.new_empty(rows.shape[0], height * width)
    flat.index_copy_(1, permutation, rows.flatten(1))
    return flat.view(rows.shape[0], 1, height, width)


def measure_reference(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    return _gather(x, permutation, matrix.shape[0]) @ matrix


def adjoint_reference(y: Tensor, matrix: Tensor, permutation: Tensor, height: int, width: int) -> Tensor:
    return _scatter(y @ matrix.t(), permutation, height, width)


def gram_reference(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    return adjoint_reference(measure_reference(x, matrix, permutation), matrix, permutation, *x.shape[-2:])


def project_step_reference(
    x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> Tensor:
    p = _denoise(x, e, abar_t)
    p -= adjoint_reference(measure_reference(p, matrix, permutation).sub_(y), matrix, permutation, *x.shape[-2:])
    return p.mul_(abar_prev.sqrt()).add_(e * (1 - abar_prev).sqrt())


def _denoise(x: Tensor, e: Tensor, abar_t: Tensor) -> Tensor:
    return (x - (1 - abar_t).sqrt() * e) / abar_t.sqrt()


def project_step_backward_reference(
    g: Tensor, x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # With s = √ᾱ_t, c = √(1−ᾱ_t), s' and c' those of ᾱ_{t−1}, P = I − AᵀA (symmetric):
    # x0 = (x − c·e)/s, p = P x0 + Aᵀy, out = s'·p + c'·e.
    s, c, s_prev, c_prev = abar_t.sqrt(), (1 - abar_t).sqrt(), abar_prev.sqrt(), (1 - abar_prev).sqrt()
    size = x.shape[-2:]
    x0 = _denoise(x, e, abar_t)
    p = x0 - adjoint_reference(measure_reference(x0, matrix, permutation).sub_(y), matrix, permutation, *size)
    dp = s_prev * g
    dy = measure_reference(dp, matrix, permutation)
    dx0 = dp.sub_(adjoint_reference(dy, matrix, permutation, *size))
    ds, dc = -(dx0 * x0).sum() / s, -(dx0 * e).sum() / s
    ds_prev, dc_prev = (g * p).sum(), (g * e).sum()
    dabar_t = ds / (2 * s) - dc / (2 * c)
    dabar_prev = ds_prev / (2 * s_prev) - dc_prev / (2 * c_prev)
    de = c_prev * g - (c / s) * dx0
    return dx0.div_(s), de, dy, dabar_t.reshape(abar_t.shape), dabar_prev.reshape(abar_prev.shape)


def _check_operator(matrix: Tensor, permutation: Tensor, pixels: int, dtype: torch.dtype) -> None:
    if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.dtype != dtype:
        raise ValueError(f"matrix is {tuple(matrix.shape)} {matrix.dtype}, expected (N, q) in the data's dtype {dtype}")
    if permutation.shape != (pixels,) or permutation.dtype != torch.int64:
        raise ValueError(f"permutation is {tuple(permutation.shape)} {permutation.dtype}, expected ({pixels},) int64")
    if pixels % matrix.shape[0]:
        raise ValueError(f"{pixels} pixels cannot be cut into rows of {matrix.shape[0]}; pad the image to the block size")


def _check_image(x: Tensor, matrix: Tensor, permutation: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 1:
        raise ValueError(f"x is {tuple(x.shape)}, expected (B, 1, H, W)")
    check_floating("x", x.dtype)
    _check_operator(matrix, permutation, x.shape[2] * x.shape[3], x.dtype)


def _check_measurements(y: Tensor, batch: int, matrix: Tensor, permutation: Tensor) -> None:
    expected = (batch, permutation.shape[0] // matrix.shape[0], matrix.shape[1])
    if y.shape != expected or y.dtype != matrix.dtype:
        raise ValueError(f"y is {tuple(y.shape)} {y.dtype}, expected {expected} {matrix.dtype}: (B, H·W/N, q)")


def _check_adjoint(y: Tensor, matrix: Tensor, permutation: Tensor, height: int, width: int) -> None:
    check_floating("y", y.dtype)
    if height < 0 or width < 0:
        raise ValueError(f"height and width: {height} and {width} are no sizes of an image")
    _check_operator(matrix, permutation, height * width, y.dtype)
    _check_measurements(y, y.shape[0] if y.ndim else 0, matrix, permutation)


def _check_step(
    x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> None:
    _check_image(x, matrix, permutation)
    _check_measurements(y, x.shape[0], matrix, permutation)
    if e.shape != x.shape or e.dtype != x.dtype:
        raise ValueError(f"e is {tuple(e.shape)} {e.dtype}, expected {tuple(x.shape)} {x.dtype} as x")
    check_number("abar_t", abar_t)
    check_number("abar_prev", abar_prev)


def _check_step_backward(g: Tensor, x: Tensor, *others: Tensor) -> None:
    _check_step(x, *others)
    check_shape("g", g, x.shape)
    check_dtype("g", g, x.dtype)


measure_op = define_op(
    "measure(Tensor x, Tensor matrix, Tensor permutation) -> Tensor",
    measure_reference,
    lambda x, matrix, permutation: x.new_empty(
        x.shape[0], permutation.shape[0] // matrix.shape[0], matrix.shape[1]
    ),
    _check_image,
)
adjoint_op = define_op(
    "adjoint(Tensor y, Tensor matrix, Tensor permutation, int height, int width) -> Tensor",
    adjoint_reference,
    lambda y, matrix, permutation, height, width: y.new_empty(y.shape[0], 1, height, width),
    _check_adjoint,
)
gram_op = define_op(
    "gram(Tensor x, Tensor matrix, Tensor permutation) -> Tensor",
    gram_reference,
    lambda x, matrix, permutation: x.new_empty(x.shape),
    _check_image,
)
project_step_op = define_op(
    "project_step(Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation, Tensor abar_t, Tensor abar_prev)"
    " -> Tensor",
    project_step_reference,
    lambda x, e, y, matrix, permutation, abar_t, abar_prev: x.new_empty(x.shape),
    _check_step,
)
project_step_backward_op = define_op(
    "project_step_backward(Tensor g, Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation, Tensor abar_t,"
    " Tensor abar_prev) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    project_step_backward_reference,
    lambda g, x, e, y, matrix, permutation, abar_t, abar_prev: (
        x.new_empty(x.shape),
        e.new_empty(e.shape),
        y.new_empty(y.shape),
        torch.empty_like(abar_t),
        torch.empty_like(abar_prev),
    ),
    _check_step_backward,
)


def _setup_linear(ctx, inputs, output) -> None:
    ctx.size = inputs[0].shape[-2:]
    ctx.save_for_backward(*inputs[1:3])


def _measure_gradient(ctx, dy: Tensor):
    matrix, permutation = ctx.saved_tensors
    return adjoint_op(dy, matrix, permutation, *ctx.size), None, None


def _adjoint_gradient(ctx, dx: Tensor):
    matrix, permutation = ctx.saved_tensors
    return measure_op(dx, matrix, permutation), None, None, None, None


def _gram_gradient(ctx, dx: Tensor):
    matrix, permutation = ctx.saved_tensors
    return gram_op(dx, matrix, permutation), None, None


def _setup_step(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _step_gradient(ctx, g: Tensor):
    dx, de, dy, dabar_t, dabar_prev = project_step_backward_op(g, *ctx.saved_tensors)
    return dx, de, dy, None, None, dabar_t, dabar_prev


register_gradient("measure", _measure_gradient, _setup_linear)
register_gradient("adjoint", _adjoint_gradient, _setup_linear)
register_gradient("gram", _gram_gradient, _setup_linear)
register_gradient("project_step", _step_gradient, _setup_step)


@register_flop_formula([torch.ops.idm_fast.measure, torch.ops.idm_fast.adjoint])
def _flop_product(t, matrix, permutation, *args, out_shape=None, **kwargs) -> int:
    return 2 * t[0] * permutation[0] * matrix[1]


@register_flop_formula([torch.ops.idm_fast.gram])
def _flop_gram(x, matrix, permutation, *args, out_shape=None, **kwargs) -> int:
    return 4 * x[0] * permutation[0] * matrix[1]


@register_flop_formula([torch.ops.idm_fast.project_step])
def _flop_step(x, e, y, matrix, permutation, *args, out_shape=None, **kwargs) -> int:
    return 4 * x[0] * permutation[0] * matrix[1]


@register_flop_formula([torch.ops.idm_fast.project_step_backward])
def _flop_step_backward(g, x, e, y, matrix, permutation, *args, out_shape=None, **kwargs) -> int:
    return 8 * x[0] * permutation[0] * matrix[1]


def measure(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    """A x: (B, 1, H, W) → (B, H·W/N, q) for Φ = `matrix` (N, q) and `permutation` (H·W,).

    Raises:
        ValueError: shapes or dtypes do not fit, or Φ asks for a gradient.
    """
    _check_fixed(matrix)
    _check_image(x, matrix, permutation)
    return measure_op(x, matrix, permutation)


def adjoint(y: Tensor, matrix: Tensor, permutation: Tensor, height: int, width: int) -> Tensor:
    """Aᵀ y: (B, H·W/N, q) → (B, 1, H, W). Raises as `measure`."""
    _check_fixed(matrix)
    _check_adjoint(y, matrix, permutation, height, width)
    return adjoint_op(y, matrix, permutation, height, width)


def gram(x: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    """AᵀA x, without the round trip: (B, 1, H, W) → (B, 1, H, W). Raises as `measure`."""
    _check_fixed(matrix)
    _check_image(x, matrix, permutation)
    return gram_op(x, matrix, permutation)


def project_step(
    x: Tensor, e: Tensor, y: Tensor, matrix: Tensor, permutation: Tensor, abar_t: Tensor, abar_prev: Tensor
) -> Tensor:
    """One sampling step behind the U-Net: denoise, project onto the measurements, DDIM update (IDM, eqs. of DESIGN §1).

    x0 = (x − √(1−ᾱ_t)·e)/√ᾱ_t;  x0 ← x0 − Aᵀ(A x0 − y);  out = √ᾱ_{t−1}·x0 + √(1−ᾱ_{t−1})·e

    Args:
        x, e: (B, 1, H, W): the state x_t and the noise estimate of the U-Net, one dtype.
        y: (B, H·W/N, q).
        abar_t, abar_prev: ᾱ_t in (0, 1) and ᾱ_{t−1} in (0, 1], one element each. ᾱ_0 = 1 must not ask for a gradient:
            the derivative of √(1−ᾱ) is infinite there.

    Raises:
        ValueError: shapes or dtypes do not fit, or Φ asks for a gradient.
    """
    _check_fixed(matrix)
    _check_step(x, e, y, matrix, permutation, abar_t, abar_prev)
    return project_step_op(x, e, y, matrix, permutation, abar_t, abar_prev)


def _check_fixed(matrix: Tensor) -> None:
    if matrix.requires_grad:
        raise ValueError("matrix asks for a gradient, and Φ is fixed here; pass matrix.detach()")
