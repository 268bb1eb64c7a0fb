"""The injector: puts the measurements back in front of the features, at every depth of the U-Net (DESIGN §1)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from idm_fast import ops


def gram(physics: Any, x: Tensor) -> Tensor:
    """AᵀA x by the operator's own `gram` when it has one."""
    own = getattr(physics, "gram", None)
    return own(x) if own is not None else physics.A_adjoint(physics.A(x))


class Injector(nn.Module):
    """h + PixelUnshuffle_r(Conv1x1([z, AᵀA z, Aᵀy])), z = Conv1x1(PixelShuffle_r(h)), with weights of its own for each step.

    Args:
        channels: of h; a multiple of r².
        r: how many times smaller h is than the image.
        steps: T.

    Source: `Injector` in the published code; `read[t−1]` is its `f2i[t−1][1]`, `write[t−1]` its `i2f[t−1][0]`.
    """

    def __init__(self, channels: int, r: int, steps: int) -> None:
        super().__init__()
        if channels % (r * r):
            raise ValueError(f"channels: {channels} is not a multiple of r² = {r * r}")
        self.r = r
        self.read = nn.ModuleList(nn.Conv2d(channels // (r * r), 1, 1) for _ in range(steps))
        self.write = nn.ModuleList(nn.Conv2d(3, channels // (r * r), 1) for _ in range(steps))

    def forward(self, h: Tensor, aty: Tensor, physics: Any, t: int) -> Tensor:
        """(B, C, H/r, W/r) → the same; `aty` (B, 1, H, W) in h's dtype, t in 1 … T."""
        read, write = cast(nn.Conv2d, self.read[t - 1]), cast(nn.Conv2d, self.write[t - 1])
        z, h = ops.inject_read_through(h, read.weight, cast(Tensor, read.bias), self.r)
        return ops.inject_write(h, z, gram(physics, z), aty, write.weight, cast(Tensor, write.bias), self.r)
