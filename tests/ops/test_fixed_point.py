"""The fixed-point coupling: its inverse to the bit, its values and gradients against Python's fractions and `ops.couple`."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry
from idm_fast.ops.fixed_point import LARGEST, NOT_A_NUMBER

K = 20
QUARTER, HALF, ONE = 0.25, 0.5, 1.0
V = [
    *(QUARTER, math.nextafter(QUARTER, 1), 0.26, 1 / 3, 0.375, math.nextafter(HALF, 0)),
    *(HALF, math.nextafter(HALF, 1), 0.7, 0.9, math.nextafter(ONE, 0), ONE),
]
V += [
    float(torch.nextafter(torch.tensor(a), torch.tensor(float(b)))) for a, b in ((QUARTER, 1), (HALF, 0), (HALF, 1), (ONE, 0))
]


def tensor_v(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def widths(v: float) -> list[int]:
    return [1, 2] if v >= HALF else [2]


def integers(*shape: int, seed: int = 0, largest: int = 2**24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).int()


def body(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("v", V)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inverse_is_exact_to_the_bit_for_every_v(v: float, dtype: torch.dtype) -> None:
    # Every residue that the floor can meet: a run of neighbours, and integers from the whole range.
    X2 = torch.cat([torch.arange(-2048, 2048).int(), integers(4096), integers(4096, largest=LARGEST // 2)])
    F, d1 = body(len(X2), dtype=dtype), body(len(X2), seed=2)
    for bits in widths(v):
        Y1, packed = ops.fixed_couple(F, X2, tensor_v(v), K, bits)
        assert not (Y1 == NOT_A_NUMBER).any()
        assert torch.equal(ops.fixed_decouple(Y1, F, packed, tensor_v(v), K, bits), X2)
        assert torch.equal(ops.fixed_uncouple(Y1, F, d1, packed, tensor_v(v), K, bits)[0], X2)


@settings(max_examples=150, deadline=None)
@given(
    st.floats(0.25, 1),
    st.integers(-LARGEST, LARGEST),
    st.floats(-1e3, 1e3, width=32),
    st.integers(0, 30),
)
def test_coupling_is_the_formula_in_exact_arithmetic_and_its_inverse_undoes_it(v: float, X2: int, F: float, k: int) -> None:
    on_grid = Fraction(round(v * 2**25), 2**25)
    expected = round((1 - on_grid) * Fraction(F) * 2**k) + math.floor(on_grid * X2)
    X, f = torch.tensor([X2], dtype=torch.int32), torch.tensor([F], dtype=torch.float32)
    Y1, packed = ops.fixed_couple(f, X, tensor_v(v), k, 2)
    if abs(expected) > LARGEST:
        assert Y1.item() == NOT_A_NUMBER
    else:
        assert Y1.item() == expected
        assert torch.equal(ops.fixed_decouple(Y1, f, packed, tensor_v(v), k, 2), X)


def test_codes_of_the_packed_result_say_which_neighbour_it_was() -> None:
    X2, zero = torch.arange(-6, 6, dtype=torch.int32), torch.zeros(12)
    for v, bits, period in ((HALF, 1, 2), (QUARTER, 2, 4), (ONE, 1, 1)):
        _, packed = ops.fixed_couple(zero, X2, tensor_v(v), K, bits)
        assert ops.unpack_bits(packed, bits, 12).tolist() == [x % period for x in range(-6, 6)]


def test_additive_coupling_needs_no_codes() -> None:
    X2, F = integers(1000, largest=2**29), body(1000)
    Y1 = ops.fixed_add(F, X2, K)
    torch.testing.assert_close(Y1.double() / 2**K, F.double() + X2.double() / 2**K, rtol=0, atol=0.5 / 2**K)
    assert torch.equal(ops.fixed_add(F, Y1, K, -1), X2)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last"])
def test_inverse_is_exact_and_keeps_the_memory_format_in_any_layout(layout: str) -> None:
    make = {
        "transposed": lambda t: t[0].transpose(1, 2),
        "strided": lambda t: t[..., ::2],
        "expanded": lambda t: t[:1].expand(3, -1, -1, -1),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    }[layout]
    X2, v = make(integers(2, 3, 4, 6)), tensor_v(0.3)
    for F in (make(body(2, 3, 4, 6)), make(body(2, 3, 4, 6)).contiguous()):
        Y1, packed = ops.fixed_couple(F, X2, v, K, 2)
        assert Y1.stride() == torch.empty_like(X2).stride()
        assert torch.equal(ops.fixed_decouple(Y1, F, packed, v, K, 2), X2)
        assert torch.equal(ops.fixed_decouple(Y1.contiguous(), F, packed, v, K, 2), X2)


def test_values_beyond_the_range_and_not_finite_become_nan_and_stay_nan() -> None:
    F = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1.0])
    X2 = torch.tensor([0, 0, 0, 0, NOT_A_NUMBER, LARGEST], dtype=torch.int32)
    v = tensor_v(HALF)
    Y1, packed = ops.fixed_couple(F, X2, v, K, 2)
    assert ops.from_fixed(Y1, K, torch.float32).isnan().tolist() == [True] * 5 + [False]
    X2, _, _, dv = ops.fixed_uncouple(Y1, F.nan_to_num(0, 0, 0), torch.ones(6), packed, v, K, 2)
    assert (X2 == NOT_A_NUMBER).tolist() == [True] * 5 + [False]
    assert dv.isnan()
    assert (ops.fixed_add(torch.tensor([4096.0]), torch.zeros(1, dtype=torch.int32), K) == NOT_A_NUMBER).all()
    assert ops.to_fixed(torch.tensor([2048.0, -2048.0, torch.nan, 2047.9]), K).eq(NOT_A_NUMBER).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize(("v", "bits"), [(0.2499, 2), (0.4999, 1), (1.0001, 2), (-0.5, 2), (math.nan, 2), (0.0, 1)])
def test_v_outside_the_range_of_the_width_gives_nan_without_reading_it(v: float, bits: int) -> None:
    Y1, packed = ops.fixed_couple(body(5), integers(5), tensor_v(v), K, bits)
    assert (Y1 == NOT_A_NUMBER).all()
    assert (ops.fixed_decouple(integers(5), body(5), packed, tensor_v(v), K, bits) == NOT_A_NUMBER).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_and_float_are_each_other_rounded_to_the_grid(dtype: torch.dtype) -> None:
    x = body(1000, dtype=dtype)
    X = ops.to_fixed(x, K)
    assert (X.double() / 2**K - x.double()).abs().max() <= 0.5 / 2**K
    assert torch.equal(ops.from_fixed(X, K, torch.float64), X.double() / 2**K)
    assert torch.equal(ops.to_fixed(ops.from_fixed(X, K, torch.float64), K), X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_couple_on_the_same_numbers(dtype: torch.dtype) -> None:
    X2, v = integers(40), torch.tensor([0.3], requires_grad=True)
    F, d1 = body(40, dtype=dtype).requires_grad_(), body(40, seed=3)
    x2 = ops.from_fixed(X2, K, torch.float32).requires_grad_()
    with ops.use("reference"):  # to the bit, so with the same sums
        expected = torch.autograd.grad(ops.couple(F, x2, v), (F, x2, v), d1)
    Y1, packed = ops.fixed_couple(F.detach(), X2, v.detach(), K, 2)
    for found, wanted in zip(ops.fixed_uncouple(Y1, F.detach(), d1, packed, v.detach(), K, 2)[1:], expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (7,), (2, 3, 5)])
def test_operators_obey_opcheck(shape: tuple[int, ...]) -> None:
    F, X2, v, d1 = body(*shape, dtype=torch.bfloat16), integers(*shape), torch.tensor([0.4]), body(*shape, seed=4)
    Y1, packed = ops.fixed_couple(F, X2, v, K, 2)
    for name, arguments in {
        "to_fixed": (d1, K),
        "from_fixed": (X2, K, torch.float64),
        "fixed_add": (F, X2, K, -1),
        "fixed_couple": (F, X2, v, K, 2),
        "fixed_decouple": (Y1, F, packed, v, K, 2),
        "fixed_uncouple": (Y1, F, d1, packed, v, K, 2),
    }.items():
        torch.library.opcheck(registry.OPS[name].overload, arguments)
    assert ops.fixed_couple(F, X2, v, K, 0)[1].numel() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda F, X, v: ops.fixed_couple(F, X.float(), v, K, 2), "X2 is torch.float32"),
        (lambda F, X, v: ops.fixed_couple(F[:3], X, v, K, 2), "must preserve the shape"),
        (lambda F, X, v: ops.fixed_couple(F, X, v.expand(2), K, 2), "one element"),
        (lambda F, X, v: ops.fixed_couple(F, X, v, K, 3), "bits: 3"),
        (lambda F, X, v: ops.fixed_couple(F, X, v, 31, 2), "fraction_bits: 31"),
        (lambda F, X, v: ops.fixed_decouple(X, F, torch.zeros(1, dtype=torch.uint8), v, K, 0), "bits: 0"),
        (lambda F, X, v: ops.fixed_decouple(X, F, torch.zeros(1, dtype=torch.uint8), v, K, 2), "packed is"),
        (lambda F, X, v: ops.fixed_uncouple(X, F, F[:2], torch.zeros(2, dtype=torch.uint8), v, K, 2), "d1"),
        (lambda F, X, v: ops.fixed_add(F, X, K, 2), "sign: 2"),
        (lambda F, X, v: ops.to_fixed(F, -1), "fraction_bits: -1"),
        (lambda F, X, v: ops.from_fixed(F, K, torch.float32), "X is torch.float32"),
    ],
)
def test_wrong_arguments_are_refused_with_their_name(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(body(5), integers(5), tensor_v(0.5))
