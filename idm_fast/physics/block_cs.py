"""Block compressed sensing with a random permutation: the measurement operator of IDM (DESIGN §1), under deepinv's names."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from idm_fast import ops

ORTHONORMAL_TOLERANCE = 1e-4
"""Largest allowed entry of |ΦᵀΦ − I|: float32 rounding of a 1024-row matrix stays below 1e-5."""


class BlockCompressedSensing(nn.Module):
    """A x: permute the H·W pixels, cut them into rows of N = block_size², multiply each row by Φ (N, q).

    q = ceil(ratio·N). Φ has orthonormal columns, so A Aᵀ = I and the pseudo-inverse is the adjoint.

    Args:
        image_size: (H, W) in pixels; H·W must be a multiple of block_size².
        ratio: q/N, in (0, 1].
        block_size: side of a block; N = block_size².
        seed: one generator draws Φ, then the permutation, both on the CPU, so that a seed means the same operator everywhere.
        matrix: Φ of your own, (N, q) with orthonormal columns, in place of the drawn one; then `ratio` must give this q.
        permutation: (H·W,) int64 of your own: pixel k of the permuted image is x.flatten()[permutation[k]].

    Raises:
        ValueError: an argument out of range, a permutation that is none, a matrix whose columns are not orthonormal.

    Source: the published code's `Phi`, `A` and `AT` (train.py, test.py).
    """

    matrix: Tensor
    permutation: Tensor

    def __init__(
        self,
        image_size: tuple[int, int],
        ratio: float,
        block_size: int = 32,
        seed: int = 0,
        *,
        matrix: Tensor | None = None,
        permutation: Tensor | None = None,
    ) -> None:
        super().__init__()
        height, width = image_size
        pixels, N = height * width, block_size * block_size
        q = measurements_per_block(ratio, block_size)
        _check_image_size(height, width, N)
        if matrix is None:
            matrix = sensing_matrix(block_size, ratio, seed)
        else:
            _check_orthonormal(matrix, N, q)
        if permutation is None:
            permutation = torch.randperm(pixels, generator=_generator_after_matrix(block_size, seed))
        else:
            _check_permutation(permutation, pixels)
        self.image_size = (height, width)
        self.ratio = ratio
        self.block_size = block_size
        self.seed = seed
        self.num_measurements = q
        self.register_buffer("matrix", matrix)
        self.register_buffer("permutation", permutation)

    def A(self, x: Tensor) -> Tensor:
        """Measure: (B, 1, H, W) → (B, H·W/N, q)."""
        return ops.measure(x, self.matrix, self.permutation)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y: (B, H·W/N, q) → (B, 1, H, W)."""
        return ops.adjoint(y, self.matrix, self.permutation, *self.image_size)

    def A_dagger(self, y: Tensor) -> Tensor:
        """The pseudo-inverse; here the adjoint, because A Aᵀ = I."""
        return self.A_adjoint(y)

    def gram(self, x: Tensor) -> Tensor:
        """AᵀA x: (B, 1, H, W) → (B, 1, H, W)."""
        return ops.gram(x, self.matrix, self.permutation)

    def project_step(self, x: Tensor, e: Tensor, y: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
        """The sampling step behind the U-Net in one op; see `idm_fast.ops.project_step`."""
        return ops.project_step(x, e, y, self.matrix, self.permutation, abar_t, abar_prev)

    def with_permutation(self, permutation: Tensor, image_size: tuple[int, int] | None = None) -> BlockCompressedSensing:
        """The same Φ behind another permutation, (H·W,) int64, and image size when given; ValueError when it is none."""
        height, width = image_size or self.image_size
        _check_image_size(height, width, self.block_size**2)
        _check_permutation(permutation, height * width)
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.image_size = (height, width)
        other.permutation = permutation
        return other

    def forward(self, x: Tensor) -> Tensor:
        """Same as `A`."""
        return self.A(x)

    def extra_repr(self) -> str:
        return f"{self.image_size}, ratio={self.ratio}, block_size={self.block_size}, q={self.num_measurements}"


def measurements_per_block(ratio: float, block_size: int) -> int:
    """q = ceil(ratio·N), N = block_size². ValueError when block_size < 1 or the ratio is not in (0, 1]."""
    if block_size < 1:
        raise ValueError(f"block_size: {block_size} is not positive")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: {ratio} is outside (0, 1]; 0.1 keeps 10 % as many measurements as pixels")
    return math.ceil(ratio * block_size * block_size)


def sensing_matrix(block_size: int, ratio: float, seed: int) -> Tensor:
    """Φ of the published rule: the first q columns of U Vᵀ, where U S Vᵀ = randn(N, N) drawn with `seed`; (N, q) float32."""
    return _orthogonal(block_size * block_size, seed)[:, : measurements_per_block(ratio, block_size)].contiguous()


@lru_cache(maxsize=4)
def _orthogonal(N: int, seed: int) -> Tensor:
    gaussian = torch.randn(N, N, generator=torch.Generator().manual_seed(seed))
    U, _, Vh = torch.linalg.svd(gaussian.double())
    return (U @ Vh).float()


def _generator_after_matrix(block_size: int, seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.randn(block_size**2, block_size**2, generator=generator)
    return generator


def sensing_sequence(
    image_sizes: Iterable[tuple[int, int]], ratio: float, block_size: int = 32, seed: int = 2025
) -> Iterator[BlockCompressedSensing]:
    """The operators of the published test protocol: one generator draws Φ, then one permutation an image, in order."""
    physics: BlockCompressedSensing | None = None
    generator = _generator_after_matrix(block_size, seed)
    for height, width in image_sizes:
        permutation = torch.randperm(height * width, generator=generator)
        if physics is None:
            physics = BlockCompressedSensing((height, width), ratio, block_size, seed, permutation=permutation)
        yield physics.with_permutation(permutation, (height, width))


def _check_image_size(height: int, width: int, N: int) -> None:
    if height < 1 or width < 1 or height * width % N:
        raise ValueError(
            f"image_size: {height}×{width} has {height * width} pixels, not a multiple of block_size² = {N}; "
            "pad both sides to a multiple of block_size"
        )


def _check_permutation(permutation: Tensor, pixels: int) -> None:
    if permutation.shape != (pixels,) or permutation.dtype != torch.int64:
        raise ValueError(f"permutation is {tuple(permutation.shape)} {permutation.dtype}, expected ({pixels},) int64")
    in_range = bool(((permutation >= 0) & (permutation < pixels)).all())
    if not in_range or int(permutation.bincount(minlength=pixels).max()) != 1:
        raise ValueError(f"permutation is none: it must hold each of 0 … {pixels - 1} once")


def _check_orthonormal(matrix: Tensor, N: int, q: int) -> None:
    if matrix.shape != (N, q) or not matrix.is_floating_point():
        raise ValueError(f"matrix is {tuple(matrix.shape)} {matrix.dtype}, expected floating ({N}, {q}) by block and ratio")
    exact = matrix.detach().double()
    identity = torch.eye(q, dtype=torch.float64, device=matrix.device)
    error = (exact.t() @ exact - identity).abs().max().item()
    if not error <= ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"matrix has columns that are not orthonormal (largest |ΦᵀΦ − I| is {error:.2g}); "
            "pass torch.linalg.qr(matrix).Q, or an operator of your own with A, A_adjoint and A_dagger"
        )
