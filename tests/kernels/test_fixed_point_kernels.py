"""The kernels of fixed-point couplings and packed codes give the reference's integers, every bit of them."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, draw, oracle, run
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry
from idm_fast.ops.fixed_point import LARGEST, NOT_A_NUMBER

K = 20
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1,), (3, 7, 61), (2, 3, 19, 23), (0, 3, 5), ()]
V = [0.25, 0.28598171, 0.4, 0.5, 0.7, 1.0, 0.2499, 1.0001, -0.5, float("nan")]
"""In the range of two bits, one of those where a quotient comes out a unit too large; at its ends; that of one bit; outside."""


def integers(*shape: int, device: str, largest: int = 2**24, layout: str = "contiguous") -> Tensor:
    return (draw(*shape, dtype=torch.float64, device=device, seed=3, layout=layout) * largest).clamp(-LARGEST, LARGEST).int()


def arguments(name: str, F: Tensor, X: Tensor, v: float, bits: int, gradient: torch.dtype = torch.float32) -> tuple:
    """Arguments of op `name` for a body's output F and a stream X."""
    weight = torch.tensor([v], device=F.device)
    if name == "to_fixed":
        return F, K
    if name == "from_fixed":
        return X, K, F.dtype
    if name == "fixed_add":
        return F, X, K, -1
    if name == "fixed_couple":
        return F, X, weight, K, bits
    Y1, packed = run("fixed_couple", "reference", (F, X, weight, K, bits))
    if name == "fixed_decouple":
        return Y1, F, packed, weight, K, bits
    d1 = draw(*F.shape, dtype=gradient, device=F.device.type, seed=5)
    return Y1, F, d1, packed, weight, K, bits


OPS = ("to_fixed", "from_fixed", "fixed_add", "fixed_couple", "fixed_decouple", "fixed_uncouple")


def assert_equal(name: str, given: tuple) -> None:
    """Every output has the reference's bits; the one that is a sum, dv, is within two units of its terms."""
    found, expected = (list(run(name, implementation, given)) for implementation in ("triton", "reference"))
    if name == "fixed_uncouple":
        dv, eager, truth = found.pop(), expected.pop(), oracle(name, given)[3]
        X2, (_, F, d1, _, _, k, _) = expected[0], given
        terms = d1.double().abs() * (X2.double().abs() / 2**k + F.double().abs())
        units = 32 if d1.dtype == torch.float64 else 2
        allowed = torch.maximum(2 * (eager - truth).abs(), units * torch.finfo(d1.dtype).eps * terms.norm())
        assert torch.equal(dv.isnan(), eager.isnan()) and not (dv - truth).abs() > allowed
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_results_are_equal_in_every_dtype_and_size(device: str, name: str, shape: tuple, dtype: torch.dtype) -> None:
    F = 4 * draw(*shape, dtype=dtype, device=device)
    assert_equal(name, arguments(name, F, integers(*shape, device=device), 0.4, 2, torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("body_layout", ["contiguous", "channels_last", "expanded", "unaligned"])
@pytest.mark.parametrize("name", OPS)
def test_results_are_equal_in_every_layout(device: str, name: str, body_layout: str, layout: str) -> None:
    F = draw(3, 6, 5, 7, dtype=torch.bfloat16, device=device, layout=body_layout)
    assert_equal(name, arguments(name, F, integers(3, 6, 5, 7, device=device, layout=layout), 0.7, 1))


@pytest.mark.parametrize("v", V)
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("name", OPS[3:])
def test_results_are_equal_and_the_inverse_exact_for_every_v(device: str, name: str, bits: int, v: float) -> None:
    # Every residue that the floor can meet, what it leaves as it is, and integers from the whole range.
    near, whole = (torch.arange(-n, n, dtype=torch.int32, device=device) for n in (600, 60))
    X = torch.cat([near, whole * 2**25, integers(600, device=device, largest=2**30)])
    F = 100 * draw(X.numel(), dtype=torch.float32, device=device)
    given = arguments(name, F, X, v, bits)
    assert_equal(name, given)
    if name != "fixed_couple" and (0.5 if bits == 1 else 0.25) <= v <= 1:
        assert torch.equal(run(name, "triton", given)[0], X)


@pytest.mark.parametrize("name", OPS)
def test_what_cannot_be_represented_is_marked_as_in_the_reference(device: str, name: str) -> None:
    special = [float("nan"), float("inf"), -float("inf"), 3e38, 4095.9, 4096.0, -4096.0, 0.0, 1.0, 2.5 * 2.0**-K, 3.5 * 2.0**-K]
    F = torch.tensor(special, device=device).repeat(7)
    edges = [0, NOT_A_NUMBER, LARGEST, -LARGEST, 1, -1, 2**24 + 1]
    X = torch.tensor(edges, dtype=torch.int32, device=device).repeat_interleave(len(special))
    for v, bits in ((0.5, 2), (1.0, 1)):
        assert_equal(name, arguments(name, F, X, v, bits))


def test_products_of_float64_bodies_are_rounded_before_they_are_rounded_to_integers(device: str) -> None:
    """Rounded once, as a fused multiply-add would, two of five would be integers next to the reference's."""
    off_tie = torch.arange(1, 4097, dtype=torch.float64, device=device) + 0.5
    share = 1 - torch.tensor(0.3).mul(2**25).round().double().item() / 2**25
    F = off_tie / (share * 2**K)
    given = arguments("fixed_couple", F, torch.zeros_like(F, dtype=torch.int32), 0.3, 2)
    assert_equal("fixed_couple", given)


def test_a_coupling_without_codes_packs_none(device: str) -> None:
    F, X = draw(5, 7, dtype=torch.float32, device=device), integers(5, 7, device=device)
    assert_equal("fixed_couple", arguments("fixed_couple", F, X, 0.1, 0))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (13,), (5, 1999)], ids=str)
def test_codes_are_packed_and_unpacked_as_in_the_reference(device: str, shape: tuple, bits: int) -> None:
    codes = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)
    assert_equal("pack_bits", (codes, bits))  # bits above the width do not count
    packed = run("pack_bits", "reference", (codes, bits))[0]
    assert_equal("unpack_bits", (packed, bits, codes.numel()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_counted_row_major_in_any_layout(device: str, layout: str) -> None:
    codes = integers(2, 3, 5, 6, device=device, layout=layout).to(torch.uint8)
    assert_equal("pack_bits", (codes, 2))


@pytest.mark.parametrize("name", [*OPS, "pack_bits", "unpack_bits"])
def test_operators_obey_opcheck(device: str, name: str) -> None:
    codes = torch.ones(9, dtype=torch.uint8, device=device)
    given = {"pack_bits": (codes, 2), "unpack_bits": (codes, 1, 70)}.get(name)
    if given is None:
        F = draw(2, 3, 4, 5, dtype=torch.bfloat16, device=device, layout="channels_last")
        given = arguments(name, F, integers(2, 3, 4, 5, device=device), 0.4, 2)
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS[name].overload, given)


def test_cost_counts_a_quarter_of_a_byte_for_a_code_of_two_bits() -> None:
    from idm_fast.kernels.bits import pack_bits_cost, unpack_bits_cost
    from idm_fast.kernels.fixed_point import fixed_couple_cost, fixed_uncouple_cost

    F, X = torch.empty(40, dtype=torch.bfloat16, device="meta"), torch.empty(40, dtype=torch.int32, device="meta")
    d1, v, packed = torch.empty(40, device="meta"), torch.empty(1, device="meta"), torch.empty(10, device="meta").byte()
    assert (fixed_couple_cost(F, X, v, K, 2).read, fixed_couple_cost(F, X, v, K, 2).written) == (240, 160 + 10)
    assert fixed_uncouple_cost(X, F, d1, packed, v, K, 2).bytes == 2 * (160 + 80 + 160) + 10
    assert pack_bits_cost(packed, 1).bytes == 10 + 2 and unpack_bits_cost(packed, 1, 80).bytes == 10 + 80
