"""Small integer codes packed into bytes: 8, 4 or 2 codes a byte for 1, 2 or 4 bits a code.

A code of `bits` bits is a uint8 in [0, 2^bits). Code number i, counted over the tensor's elements in row-major order whatever
its memory format, stands in byte i // (8 / bits), the first code in the lowest bits. The last byte is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.ops.registry import define_op

WIDTHS = (1, 2, 4)


def packed_bytes(numel: int, bits: int) -> int:
    """Length of the packed tensor."""
    return (numel * bits + 7) // 8


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def pack_bits_reference(codes: Tensor, bits: int) -> Tensor:
    numel = codes.numel()
    full = codes.new_zeros(packed_bytes(numel, bits) * (8 // bits))
    full[:numel] = codes.reshape(-1) & (2**bits - 1)
    return (full.view(-1, 8 // bits) << _shifts(bits, codes.device)).sum(1, dtype=torch.uint8)


def unpack_bits_reference(packed: Tensor, bits: int, numel: int) -> Tensor:
    codes = (packed.unsqueeze(1) >> _shifts(bits, packed.device)) & (2**bits - 1)
    return codes.view(-1)[:numel]


def _check(tensor: Tensor, name: str, bits: int) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name} is {tensor.dtype}, expected torch.uint8")
    if bits not in WIDTHS:
        raise ValueError(f"bits: {bits}, expected one of {WIDTHS}")


def _check_pack(codes: Tensor, bits: int) -> None:
    _check(codes, "codes", bits)


def _check_unpack(packed: Tensor, bits: int, numel: int) -> None:
    _check(packed, "packed", bits)
    if numel < 0 or packed.shape != (packed_bytes(numel, bits),):
        raise ValueError(
            f"packed is {tuple(packed.shape)}; {numel} codes of {bits} bits take ({packed_bytes(numel, bits)},) bytes"
        )


pack_bits_op = define_op(
    "pack_bits(Tensor codes, int bits) -> Tensor",
    pack_bits_reference,
    lambda codes, bits: codes.new_empty(packed_bytes(codes.numel(), bits)),
    _check_pack,
)
unpack_bits_op = define_op(
    "unpack_bits(Tensor packed, int bits, int numel) -> Tensor",
    unpack_bits_reference,
    lambda packed, bits, numel: packed.new_empty(numel),
    _check_unpack,
)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, any shape and memory format; of each code the lowest `bits` bits count.
        bits: 1, 2 or 4.

    Returns:
        uint8, (ceil(codes.numel()·bits / 8),).

    Raises:
        ValueError: another dtype or width.
    """
    _check_pack(codes, bits)
    return pack_bits_op(codes, bits)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The first `numel` codes of `pack_bits`' result, uint8, (numel,), in row-major order.

    Raises:
        ValueError: another dtype or width, or `packed` is not what `numel` codes take.
    """
    _check_unpack(packed, bits, numel)
    return unpack_bits_op(packed, bits, numel)
