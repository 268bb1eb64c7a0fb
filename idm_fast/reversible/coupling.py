"""How a body's output F meets the other stream: y1 from (F, x2), and back.

A coupling is stateless. The engine calls `forward` once; backward calls `uncouple` when x2 must be recovered, `backward` when
it was kept.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from idm_fast import ops
from idm_fast.ops.coupling import couple_backward_op, uncouple_inplace_op


class Coupling(Protocol):
    """y1 = c(F, x2; v), invertible in x2. `v` is None for a coupling without a weight (`weighted` is False)."""

    weighted: bool

    def forward(self, F: Tensor, x2: Tensor, v: Tensor | None) -> Tensor:
        """y1."""

    def inverse(self, y1: Tensor, F: Tensor, v: Tensor | None) -> Tensor:
        """x2."""

    def backward(
        self, d1: Tensor, F: Tensor, x2: Tensor, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dF, dx2, dv for d1, the gradient of y1."""

    def uncouple(
        self, y1: Tensor, F: Tensor, d1: Tensor, v: Tensor | None, inplace: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x2, dF, dx2, dv: inverse and backward at once. With `inplace`, x2 is written over y1."""


class ConvexCoupling:
    """y1 = (1−v)·F + v·x2 with a learnable v per layer, started at 0.5 (IDM's wiring, DESIGN §1)."""

    weighted = True

    def forward(self, F: Tensor, x2: Tensor, v: Tensor) -> Tensor:
        return ops.couple(F, x2, v)

    def inverse(self, y1: Tensor, F: Tensor, v: Tensor) -> Tensor:
        return ops.decouple(y1, F, v)

    def backward(self, d1: Tensor, F: Tensor, x2: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return couple_backward_op(d1, F, x2, v)

    def uncouple(
        self, y1: Tensor, F: Tensor, d1: Tensor, v: Tensor, inplace: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (y1, *uncouple_inplace_op(y1, F, d1, v)) if inplace else ops.uncouple(y1, F, d1, v)


class AdditiveCoupling:
    """y1 = x2 + F: RevNet's coupling. Two layers of a chain are one RevNet block (F, then G)."""

    weighted = False

    def forward(self, F: Tensor, x2: Tensor, v: None) -> Tensor:
        return x2 + F

    def inverse(self, y1: Tensor, F: Tensor, v: None) -> Tensor:
        return y1 - F

    def backward(self, d1: Tensor, F: Tensor, x2: Tensor, v: None) -> tuple[Tensor, Tensor, None]:
        return d1.to(F.dtype), d1, None

    def uncouple(
        self, y1: Tensor, F: Tensor, d1: Tensor, v: None, inplace: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        return y1.sub_(F) if inplace else y1 - F, d1.to(F.dtype), d1, None


COUPLINGS: dict[str, type[ConvexCoupling] | type[AdditiveCoupling]] = {
    "convex": ConvexCoupling,
    "additive": AdditiveCoupling,
}


def make_coupling(coupling: str) -> Coupling:
    """The coupling named "convex" or "additive"; ValueError otherwise."""
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling: {coupling!r} is unknown, expected one of {sorted(COUPLINGS)}")
    made: Coupling = COUPLINGS[coupling]()  # type: ignore[assignment]
    return made


def check_stream_dtype(dtype: torch.dtype) -> None:
    """ValueError unless streams may be kept in `dtype`."""
    if dtype not in (torch.float32, torch.float64, torch.int32):
        raise ValueError(
            f"stream_dtype: {dtype} cannot be inverted: every layer divides its rounding error by v, and after 11 layers the "
            "recovered input is wrong by more than its own size; use torch.float32, torch.float64 or, exact to the bit, "
            "torch.int32 (bodies may stay in half)"
        )
