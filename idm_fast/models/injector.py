"""The injector: puts the measurements back in front of the features, at every depth of the U-Net (DESIGN §1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from idm_fast import ops
from idm_fast.ops.injector import inject_couple_backward_op, inject_uncouple_inplace_op, inject_uncouple_op
from idm_fast.reversible.deferred import Deferred, DeferringBody


def gram(physics: Any, x: Tensor) -> Tensor:
    """AᵀA x by the operator's own `gram` when it has one."""
    own = getattr(physics, "gram", None)
    return own(x) if own is not None else physics.A_adjoint(physics.A(x))


@dataclass(frozen=True)
class Injected(Deferred):
    """inject_write(h, z, AᵀA z, Aᵀy, weight, bias, r), from these tensors."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    r: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tensors[0].shape

    def make(self) -> Tensor:
        return ops.inject_write(*self.tensors, self.r)

    def detach(self) -> Injected:
        h, z, gz, aty, weight, bias = (t.detach() for t in self.tensors)
        return replace(self, tensors=(h, z, gz, aty, weight, bias))

    def couple(self, x2: Tensor, v: Tensor) -> Tensor:
        return ops.inject_couple(*self.tensors, x2, v, self.r)

    def inverse(self, y1: Tensor, v: Tensor) -> Tensor:
        return ops.decouple(y1, self.make(), v)

    def backward(self, d1: Tensor, x2: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        *gradients, dx2, dv = inject_couple_backward_op(d1, *self.tensors, x2, v, self.r)
        return tuple(gradients), dx2, dv

    def uncouple(
        self, y1: Tensor, d1: Tensor, v: Tensor, inplace: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        if inplace:
            x2, (*gradients, dx2, dv) = y1, inject_uncouple_inplace_op(y1, d1, *self.tensors, v, self.r)
        else:
            x2, *gradients, dx2, dv = inject_uncouple_op(y1, d1, *self.tensors, v, self.r)
        return x2, tuple(gradients), dx2, dv


class Injector(DeferringBody):
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
        return self.deferred(h, aty, physics, t).make()

    def deferred(self, h: Tensor, aty: Tensor, physics: Any, t: int) -> Injected:
        """What `forward` returns, for the coupling to make."""
        read, write = cast(nn.Conv2d, self.read[t - 1]), cast(nn.Conv2d, self.write[t - 1])
        z, h = ops.inject_read_through(h, read.weight, cast(Tensor, read.bias), self.r)
        return Injected((h, z, gram(physics, z), aty, write.weight, cast(Tensor, write.bias)), self.r)
