"""Packing against the definition written out with Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idm_fast import ops
from idm_fast.ops.bits import pack_bits_op, unpack_bits_op


def written_out(codes: list[int], bits: int) -> list[int]:
    """The packed bytes: one long little-endian integer, cut into bytes."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


def draw(*shape: int, bits: int) -> Tensor:
    return torch.randint(2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape) + bits))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4]).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))))
def test_packed_bytes_are_one_little_endian_number_and_unpack_reads_it(drawn: tuple[int, list[int]]) -> None:
    bits, codes = drawn
    packed = ops.pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == written_out(codes, bits)
    assert ops.unpack_bits(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last"])
def test_codes_are_counted_in_row_major_order_in_any_layout(bits: int, layout: str) -> None:
    codes = {
        "transposed": draw(5, 7, bits=bits).t(),
        "strided": draw(5, 9, bits=bits)[:, ::2],
        "expanded": draw(1, 7, bits=bits).expand(3, 7),
        "channels_last": draw(2, 3, 4, 5, bits=bits).contiguous(memory_format=torch.channels_last),
    }[layout]
    packed = ops.pack_bits(codes, bits)
    assert packed.tolist() == written_out(codes.flatten().tolist(), bits)
    assert torch.equal(ops.unpack_bits(packed, bits, codes.numel()).view(codes.shape), codes)


def test_bits_above_the_width_do_not_reach_the_neighbour() -> None:
    assert ops.pack_bits(torch.tensor([7, 0, 0, 0], dtype=torch.uint8), 2).tolist() == [3]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (13,), (4, 4)])
def test_operators_obey_opcheck_and_empty_is_empty(bits: int, shape: tuple[int, ...]) -> None:
    codes = draw(*shape, bits=bits)
    packed = ops.pack_bits(codes, bits)
    assert packed.numel() == (codes.numel() * bits + 7) // 8
    torch.library.opcheck(pack_bits_op, (codes, bits))
    torch.library.opcheck(unpack_bits_op, (packed, bits, codes.numel()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack_bits(torch.zeros(4), 1), "codes is torch.float32"),
        (lambda: ops.pack_bits(torch.zeros(4, dtype=torch.uint8), 3), "bits: 3"),
        (lambda: ops.unpack_bits(torch.zeros(2, dtype=torch.uint8), 2, 9), r"9 codes of 2 bits take \(3,\)"),
    ],
)
def test_wrong_arguments_are_refused_with_their_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
