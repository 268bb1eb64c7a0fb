"""What a chain keeps its streams in: floating point, or a fixed-point grid on which inverting is exact to the bit.

Autograd and the bodies see floating-point streams in both cases. `FloatStreams` inverts those themselves. `FixedStreams`
carries int32 streams beside them (x = X·2^−k) and the codes of each layer (`ops.fixed_couple`): bodies read the integers'
values, and gradients take the rounding for the identity. A body run again on a recovered X sees its first input bit for bit,
and so, given kernels that compute the same twice, returns the same F: no error enters, whatever the number of layers.

One object serves one forward pass and its backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from idm_fast import ops
from idm_fast.ops.fixed_point import SMALLEST_V
from idm_fast.reversible.coupling import ConvexCoupling, Coupling
from idm_fast.reversible.deferred import Deferred

Gradients = tuple[Any, Tensor, Tensor | None]
"""dF, dx2, dv."""


class Streams(Protocol):
    """`kept` streams are what is stored and recovered; `value` turns them into what bodies see.

    F is a tensor, or where `takes_deferred` is true perhaps a `Deferred`: dF is then the tuple of its gradients.
    """

    takes_deferred: bool

    def begin(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """The streams that the first layer sees."""

    def couple(self, F: Any, x2: Tensor, v: Tensor | None) -> Tensor:
        """y1 of the next layer, in floating point; layers come in order."""

    def end(self, y1: Tensor, y2: Tensor) -> list[Tensor]:
        """What backward needs: the last kept streams, and what each layer adds. The object lets go of them."""

    def begin_backward(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Takes what `end` returned; returns the last kept streams."""

    def value(self, kept: Tensor) -> Tensor:
        """A kept stream in floating point."""

    def inverse(self, index: int, y1: Tensor, F: Any, v: Tensor | None) -> Tensor:
        """Kept x2 of layer `index` from its kept y1."""

    def backward(self, d1: Tensor, F: Any, x2: Tensor, v: Tensor | None) -> Gradients:
        """Gradients of a layer whose x2, in floating point, was stored."""

    def uncouple(
        self, index: int, y1: Tensor, F: Any, d1: Tensor, v: Tensor | None, inplace: bool
    ) -> tuple[Tensor, Any, Tensor, Tensor | None]:
        """`inverse` and `backward` at once: kept x2, dF, dx2, dv. With `inplace`, x2 may be written over y1."""


class FloatStreams:
    """The streams are the tensors that autograd sees; each inverted layer divides their rounding error by v."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self.takes_deferred = isinstance(coupling, ConvexCoupling)

    def begin(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return x1, x2

    def couple(self, F: Any, x2: Tensor, v: Tensor | None) -> Tensor:
        if isinstance(F, Deferred):
            assert v is not None
            return F.couple(x2, v)
        return self._coupling.forward(F, x2, v)

    def end(self, y1: Tensor, y2: Tensor) -> list[Tensor]:
        return [y1, y2]

    def begin_backward(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        y1, y2 = stored
        return y1.detach(), y2.detach()  # whose graph leads to whoever keeps them

    def value(self, kept: Tensor) -> Tensor:
        return kept

    def inverse(self, index: int, y1: Tensor, F: Any, v: Tensor | None) -> Tensor:
        if isinstance(F, Deferred):
            assert v is not None
            return F.inverse(y1, v)
        return self._coupling.inverse(y1, F, v)

    def backward(self, d1: Tensor, F: Any, x2: Tensor, v: Tensor | None) -> Gradients:
        if isinstance(F, Deferred):
            assert v is not None
            return F.backward(d1, x2, v)
        return self._coupling.backward(d1, F, x2, v)

    def uncouple(
        self, index: int, y1: Tensor, F: Any, d1: Tensor, v: Tensor | None, inplace: bool
    ) -> tuple[Tensor, Any, Tensor, Tensor | None]:
        if isinstance(F, Deferred):
            assert v is not None
            return F.uncouple(y1, d1, v, inplace)
        return self._coupling.uncouple(y1, F, d1, v, inplace)


class FixedStreams:
    """int32 streams.

    Args:
        coupling: the coupling in floating point; its gradients are used.
        fraction_bits: k; values below 2^(31−k) in steps of 2^−k.
        bits: width of the codes, see `ops.fixed_couple`; 0 keeps none, and then nothing can be inverted.
        dtype: floating-point dtype of what bodies and autograd see.
    """

    takes_deferred = False

    def __init__(self, coupling: Coupling, fraction_bits: int, bits: int, dtype: torch.dtype) -> None:
        self._coupling = coupling
        self.backward = coupling.backward
        self._k, self._bits, self._dtype = fraction_bits, bits, dtype
        self._kept: tuple[Tensor, Tensor] | None = None
        self._codes: list[Tensor | None] = []
        """Packed codes by layer, when the coupling loses any bits."""

    def begin(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        X1, X2 = (ops.to_fixed(x.detach(), self._k) for x in (x1, x2))
        self._kept = X1, X2
        return self._value_through(x1, X1), self._value_through(x2, X2)

    def couple(self, F: Tensor, x2: Tensor, v: Tensor | None) -> Tensor:
        assert self._kept is not None
        X1, X2 = self._kept
        if v is None:
            Y1 = ops.fixed_add(F.detach(), X2, self._k)
        else:
            Y1, codes = ops.fixed_couple(F.detach(), X2, v.detach(), self._k, self._bits)
            self._codes.append(codes)
        self._kept = Y1, X1
        # Under plain autograd the gradient is that of the coupling in floating point; inside `_Couple` there is no graph.
        return self._value_through(self._coupling.forward(F, x2, v), Y1) if torch.is_grad_enabled() else self.value(Y1)

    def end(self, y1: Tensor, y2: Tensor) -> list[Tensor]:
        assert self._kept is not None
        stored = [*self._kept, *(codes for codes in self._codes if codes is not None)]
        self._kept, self._codes = None, []
        return stored

    def begin_backward(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        self._codes = list(stored[2:])
        return stored[0], stored[1]

    def value(self, kept: Tensor) -> Tensor:
        return ops.from_fixed(kept, self._k, self._dtype)

    def inverse(self, index: int, y1: Tensor, F: Tensor, v: Tensor | None) -> Tensor:
        if v is None:
            return ops.fixed_add(F, y1, self._k, -1)
        return ops.fixed_decouple(y1, F, self._take_codes(index), v, self._k, self._bits)

    def uncouple(
        self, index: int, y1: Tensor, F: Tensor, d1: Tensor, v: Tensor | None, inplace: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if v is None:
            x2 = ops.fixed_add(F, y1, self._k, -1)
            return x2, *self.backward(d1, F, self.value(x2), v)
        return ops.fixed_uncouple(y1, F, d1, self._take_codes(index), v, self._k, self._bits)

    def _take_codes(self, index: int) -> Tensor:
        """Codes of a layer, let go of: a layer is inverted once."""
        codes, self._codes[index] = self._codes[index], None
        assert codes is not None
        return codes

    def _value_through(self, through: Tensor, kept: Tensor) -> Tensor:
        return _ValueThrough.apply(through, kept, self._k)


class _ValueThrough(torch.autograd.Function):
    """The value of `kept` with the gradient of `through`: the straight-through estimate of rounding."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, kept: Tensor, fraction_bits: int) -> Tensor:
        return ops.from_fixed(kept, fraction_bits, through.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return d, None, None


def as_streams(coupling: Coupling | FixedStreams) -> Streams:
    """A coupling by itself is one of floating-point streams."""
    return coupling if isinstance(coupling, FixedStreams) else FloatStreams(coupling)


@dataclass(frozen=True)
class ExactOutputs:
    """A fixed-point chain's output and all that its exact inverse needs.

    Attributes:
        y1, y2: int32; values are y·2^−fraction_bits.
        codes: uint8, one packed tensor a layer (`ops.pack_bits`); none for the additive coupling.
        fraction_bits: k.
        dtype: in which bodies and autograd saw the streams.
        body_dtype: in which bodies were given x1.
    """

    y1: Tensor
    y2: Tensor
    codes: tuple[Tensor, ...]
    fraction_bits: int
    dtype: torch.dtype
    body_dtype: torch.dtype

    def values(self) -> tuple[Tensor, Tensor]:
        """(y1, y2) in floating point."""
        y1, y2 = (ops.from_fixed(y, self.fraction_bits, self.dtype) for y in (self.y1, self.y2))
        return y1, y2


def bits_for(min_v: float) -> int:
    """Width of a code for v in [min_v, 1]. ValueError outside 0.25 … 1."""
    for bits in (1, 2):
        if SMALLEST_V[bits] <= min_v <= 1:
            return bits
    raise ValueError(f"min_v: {min_v}, expected 0.25 … 1; below 0.25 a code would take more than 2 bits an element")
