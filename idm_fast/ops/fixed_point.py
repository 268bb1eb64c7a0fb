"""The coupling on fixed-point streams, whose inverse is exact to the bit.

A stream is int32: X stands for x = X·2^−k, k being `fraction_bits`. v is taken on a grid of 2^−25, V = round(v·2^25), which
every float32 in [0.25, 1] lies on. Then

    Y1 = round((1−v)·F·2^k) + floor(V·X2 / 2^25)

The first term is found again from F. The floor maps up to ceil(1/v) neighbouring X2 to one integer; which of them it was is
the code, kept aside and packed: 1 bit an element for v in [0.5, 1], 2 bits for v in [0.25, 1]. The width `bits` is the caller's
promise about v, not read from v, because reading would make the host wait for a GPU at every layer.

    remainder = V·X2 mod 2^25,  code = remainder // V;      X2 = ceil((Y1 − round(…))·2^25 / V) + code

What cannot be represented is NOT_A_NUMBER, the one integer that has no negative: a value of 2^(31−k) and more, a NaN or an
infinity in F, and every element when v is outside the range that `bits` stands for. It becomes NaN in floating point and stays
through further couplings, inverses and gradients, as a NaN does: an overflow cannot pass as a number.

Gradients take the rounding for the identity (straight through); they are those of `ops.couple` at x2 = X2·2^−k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.ops.arguments import check_floating, check_number
from idm_fast.ops.bits import pack_bits_reference, packed_bytes, unpack_bits_reference
from idm_fast.ops.coupling import couple_backward_reference
from idm_fast.ops.registry import define_op

V_BITS = 25
LARGEST = 2**31 - 1
NOT_A_NUMBER = -(2**31)
SMALLEST_V = {0: 0.0, 1: 0.5, 2: 0.25}
"""Width of a code in bits → the smallest v that it serves. 0 bits keep no code: there is no inverse."""


def _to_grid(x: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """(round(x·scale) in int64, where that is too large or not a number). Exact for x in float32 and narrower."""
    wide = torch.round(x.double() * scale)
    bad = ~(wide.abs() <= 2**32)
    return wide.masked_fill_(bad, 0).long(), bad


def _finish(wide: Tensor, bad: Tensor, like: Tensor) -> Tensor:
    """int32 in the memory format of `like`."""
    bad = bad | (wide.abs() > LARGEST) | (like == NOT_A_NUMBER)
    return torch.empty_like(like, dtype=torch.int32).copy_(wide.masked_fill_(bad, NOT_A_NUMBER))


def _on_grid(v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(V, whether v is outside its range), both without dimensions."""
    v = v.reshape(()).double()
    bad = ~((v >= SMALLEST_V[bits]) & (v <= 1))
    return torch.round(v.masked_fill(bad, 1) * 2**V_BITS).long(), bad


def to_fixed_reference(x: Tensor, fraction_bits: int) -> Tensor:
    wide, bad = _to_grid(x, 2.0**fraction_bits)
    return torch.empty_like(x, dtype=torch.int32).copy_(wide.masked_fill_(bad | (wide.abs() > LARGEST), NOT_A_NUMBER))


def from_fixed_reference(X: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    return X.to(dtype).mul_(2.0**-fraction_bits).masked_fill_(X == NOT_A_NUMBER, torch.nan)


def fixed_add_reference(F: Tensor, X: Tensor, fraction_bits: int, sign: int) -> Tensor:
    wide, bad = _to_grid(F, 2.0**fraction_bits)
    return _finish(wide.mul_(sign).add_(X), bad, X)


def fixed_couple_reference(F: Tensor, X2: Tensor, v: Tensor, fraction_bits: int, bits: int) -> tuple[Tensor, Tensor]:
    V, bad_v = _on_grid(v, bits)
    body, bad = _to_grid(F, (2**V_BITS - V).double() * 2.0 ** (fraction_bits - V_BITS))
    product = X2.long() * V
    Y1 = _finish(body.add_(product >> V_BITS), bad | bad_v, X2)
    if bits == 0:
        return Y1, X2.new_empty(0, dtype=torch.uint8)
    codes = (product & (2**V_BITS - 1)).div_(V, rounding_mode="floor").to(torch.uint8)
    return Y1, pack_bits_reference(codes, bits)


def fixed_decouple_reference(Y1: Tensor, F: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int) -> Tensor:
    V, bad_v = _on_grid(v, bits)
    body, bad = _to_grid(F, (2**V_BITS - V).double() * 2.0 ** (fraction_bits - V_BITS))
    # The ceiling of a quotient is minus the floor of minus it.
    first = body.sub_(Y1).mul_(2**V_BITS).div_(V, rounding_mode="floor").neg_()
    codes = unpack_bits_reference(packed, bits, Y1.numel()).view(Y1.shape)
    return _finish(first.add_(codes), bad | bad_v, Y1)


def fixed_uncouple_reference(
    Y1: Tensor, F: Tensor, d1: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X2 = fixed_decouple_reference(Y1, F, packed, v, fraction_bits, bits)
    return X2, *couple_backward_reference(d1, F, from_fixed_reference(X2, fraction_bits, d1.dtype), v)


def check_fraction_bits(fraction_bits: int) -> None:
    """ValueError unless int32 can hold that many bits of a fraction."""
    if not 0 <= fraction_bits <= 30:
        raise ValueError(f"fraction_bits: {fraction_bits}, expected 0 … 30; the streams hold values below 2^(31−fraction_bits)")


def _check_integers(X: Tensor, name: str) -> None:
    if X.dtype != torch.int32:
        raise ValueError(f"{name} is {X.dtype}, expected torch.int32 (to_fixed makes it)")


def _check(F: Tensor, X: Tensor, name: str, fraction_bits: int) -> None:
    check_fraction_bits(fraction_bits)
    _check_integers(X, name)
    if F.shape != X.shape:
        raise ValueError(f"F has shape {tuple(F.shape)} and {name} {tuple(X.shape)}; the body must preserve the shape")
    check_floating("F", F.dtype)


def _check_weight(v: Tensor, bits: int, widths: tuple[int, ...]) -> None:
    check_number("v", v)
    if bits not in widths:
        raise ValueError(f"bits: {bits}, expected one of {widths}: 2 for v in [0.25, 1], 1 for v in [0.5, 1]")


def _check_packed(packed: Tensor, Y1: Tensor, bits: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(Y1.numel(), bits),):
        raise ValueError(
            f"packed is {packed.dtype} {tuple(packed.shape)}; {Y1.numel()} codes of {bits} bits are torch.uint8 "
            f"({packed_bytes(Y1.numel(), bits)},), as fixed_couple returned them for the same bits"
        )


def _check_to_fixed(x: Tensor, fraction_bits: int) -> None:
    check_fraction_bits(fraction_bits)
    check_floating("x", x.dtype)


def _check_from_fixed(X: Tensor, fraction_bits: int, dtype: torch.dtype) -> None:
    check_fraction_bits(fraction_bits)
    _check_integers(X, "X")
    check_floating("dtype", dtype)


def _check_add(F: Tensor, X: Tensor, fraction_bits: int, sign: int) -> None:
    _check(F, X, "X", fraction_bits)
    if sign not in (1, -1):
        raise ValueError(f"sign: {sign}, expected 1 or -1")


def _check_couple(F: Tensor, X2: Tensor, v: Tensor, fraction_bits: int, bits: int) -> None:
    _check(F, X2, "X2", fraction_bits)
    _check_weight(v, bits, (0, 1, 2))


def _check_decouple(Y1: Tensor, F: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int) -> None:
    _check(F, Y1, "Y1", fraction_bits)
    _check_weight(v, bits, (1, 2))
    _check_packed(packed, Y1, bits)


def _check_uncouple(
    Y1: Tensor, F: Tensor, d1: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int
) -> None:
    _check_decouple(Y1, F, packed, v, fraction_bits, bits)
    check_floating("d1", d1.dtype)
    if d1.shape != F.shape:
        raise ValueError(f"F has shape {tuple(F.shape)} and d1 {tuple(d1.shape)}; they must be the same")


to_fixed_op = define_op(
    "to_fixed(Tensor x, int fraction_bits) -> Tensor",
    to_fixed_reference,
    lambda x, fraction_bits: torch.empty_like(x, dtype=torch.int32),
    _check_to_fixed,
)
from_fixed_op = define_op(
    "from_fixed(Tensor X, int fraction_bits, ScalarType dtype) -> Tensor",
    from_fixed_reference,
    lambda X, fraction_bits, dtype: torch.empty_like(X, dtype=dtype),
    _check_from_fixed,
)
fixed_add_op = define_op(
    "fixed_add(Tensor F, Tensor X, int fraction_bits, int sign) -> Tensor",
    fixed_add_reference,
    lambda F, X, fraction_bits, sign: torch.empty_like(X),
    _check_add,
)
fixed_couple_op = define_op(
    "fixed_couple(Tensor F, Tensor X2, Tensor v, int fraction_bits, int bits) -> (Tensor, Tensor)",
    fixed_couple_reference,
    lambda F, X2, v, fraction_bits, bits: (
        torch.empty_like(X2),
        X2.new_empty(packed_bytes(X2.numel(), bits), dtype=torch.uint8),
    ),
    _check_couple,
)
fixed_decouple_op = define_op(
    "fixed_decouple(Tensor Y1, Tensor F, Tensor packed, Tensor v, int fraction_bits, int bits) -> Tensor",
    fixed_decouple_reference,
    lambda Y1, F, packed, v, fraction_bits, bits: torch.empty_like(Y1),
    _check_decouple,
)
fixed_uncouple_op = define_op(
    "fixed_uncouple(Tensor Y1, Tensor F, Tensor d1, Tensor packed, Tensor v, int fraction_bits, int bits) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fixed_uncouple_reference,
    lambda Y1, F, d1, packed, v, fraction_bits, bits: (
        torch.empty_like(Y1),
        torch.empty_like(F),
        torch.empty_like(d1),
        torch.empty_like(v),
    ),
    _check_uncouple,
)


def to_fixed(x: Tensor, fraction_bits: int) -> Tensor:
    """round(x·2^fraction_bits) in int32; ties to even. ValueError for fraction_bits outside 0 … 30."""
    _check_to_fixed(x, fraction_bits)
    return to_fixed_op(x, fraction_bits)


def from_fixed(X: Tensor, fraction_bits: int, dtype: torch.dtype) -> Tensor:
    """X·2^−fraction_bits in `dtype`; exact in float64, rounded in float32 from |X| = 2^24 on. ValueError as in `to_fixed`."""
    _check_from_fixed(X, fraction_bits, dtype)
    return from_fixed_op(X, fraction_bits, dtype)


def fixed_add(F: Tensor, X: Tensor, fraction_bits: int, sign: int = 1) -> Tensor:
    """X + sign·round(F·2^fraction_bits): the additive coupling (sign = 1) and its inverse (sign = −1). It loses nothing.

    Args:
        F: what the body made of x1; any floating dtype.
        X: the other stream, int32, the shape of F.

    Raises:
        ValueError: shapes differ, X is not int32, fraction_bits outside 0 … 30, sign not ±1.
    """
    _check_add(F, X, fraction_bits, sign)
    return fixed_add_op(F, X, fraction_bits, sign)


def fixed_couple(F: Tensor, X2: Tensor, v: Tensor, fraction_bits: int, bits: int) -> tuple[Tensor, Tensor]:
    """The convex coupling on the grid (see above).

    Args:
        F: what the body made of x1; any floating dtype.
        X2: the other stream, int32, the shape of F.
        v: one element.
        fraction_bits: k, 0 … 30; streams hold values below 2^(31−k) in steps of 2^−k.
        bits: width of a code: 2 for v in [0.25, 1], 1 for v in [0.5, 1], 0 keeps none.

    Returns:
        Y1, int32; the codes packed, uint8, (ceil(numel·bits / 8),). For v outside its range Y1 is NOT_A_NUMBER.

    Raises:
        ValueError: shapes differ, X2 is not int32, v has more than one element, fraction_bits or bits out of range.
    """
    _check_couple(F, X2, v, fraction_bits, bits)
    return fixed_couple_op(F, X2, v, fraction_bits, bits)


def fixed_decouple(Y1: Tensor, F: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int) -> Tensor:
    """X2 of `fixed_couple`, to the bit, from its results and the same F. Raises as there, and for codes of another length."""
    _check_decouple(Y1, F, packed, v, fraction_bits, bits)
    return fixed_decouple_op(Y1, F, packed, v, fraction_bits, bits)


def fixed_uncouple(
    Y1: Tensor, F: Tensor, d1: Tensor, packed: Tensor, v: Tensor, fraction_bits: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Invert the coupling and take its gradient in one pass.

    Args:
        Y1, packed: what `fixed_couple` returned. F: the same F. d1: gradient of y1 = Y1·2^−k, float32 or float64.

    Returns:
        X2 to the bit, int32; dF = (1−v)·d1 in F's dtype; dx2 = v·d1; dv = <d1, x2 − F>, of v's shape.

    Raises:
        ValueError: as in `fixed_decouple`, and when d1 has another shape.
    """
    _check_uncouple(Y1, F, d1, packed, v, fraction_bits, bits)
    return fixed_uncouple_op(Y1, F, d1, packed, v, fraction_bits, bits)
