"""Codes of 1, 2 or 4 bits packed into bytes (`idm_fast.ops.bits`) in Triton, one launch each way.

A program handles a tile of bytes × codes a byte; the codes of a byte lie side by side in memory and in one or two threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.configurations import Configuration, configuration
from idm_fast.kernels.cost import Cost, size
from idm_fast.kernels.launch import arch_of, blocks, launch


@triton.jit
def elements_of(BYTES: tl.constexpr, BITS: tl.constexpr):
    """(first byte of this program, each code's place behind that byte's first code, each code's place in its byte in bits).

    The places are (BYTES, 8 / BITS) and (1, 8 / BITS).
    """
    within = tl.arange(0, 8 // BITS)[None, :]
    return tl.program_id(0).to(tl.int64) * BYTES, tl.arange(0, BYTES)[:, None] * (8 // BITS) + within, within * BITS


@triton.jit
def pack_kernel(codes, packed, n, size, BITS: tl.constexpr, BYTES: tl.constexpr):
    """`size` bytes from n codes."""
    first, i, shift = elements_of(BYTES, BITS)
    start = first * (8 // BITS)
    code = tl.load(codes + start + i, i < n - start, other=0).to(tl.int32) & ((1 << BITS) - 1)
    byte = tl.arange(0, BYTES)
    tl.store(packed + first + byte, tl.sum(code << shift, 1), byte < size - first)


@triton.jit
def unpack_kernel(packed, codes, n, size, BITS: tl.constexpr, BYTES: tl.constexpr):
    """n codes from `size` bytes."""
    first, i, shift = elements_of(BYTES, BITS)
    start, byte = first * (8 // BITS), tl.arange(0, BYTES)
    value = tl.load(packed + first + byte, byte < size - first, other=0).to(tl.int32)
    tl.store(codes + start + i, (value[:, None] >> shift) & ((1 << BITS) - 1), i < n - start)


def packed_size(n: int, bits: int) -> int:
    """Bytes that n codes take."""
    return blocks(n * bits, 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(ceil(n·bits / 8),) in one launch; contract of `idm_fast::pack_bits`."""
    n = codes.numel()
    packed = torch.empty(packed_size(n, bits), dtype=torch.uint8, device=codes.device)
    _launch(pack_kernel, codes.contiguous(), packed, n, packed.numel(), bits)
    return packed


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """(numel,) in one launch; contract of `idm_fast::unpack_bits`."""
    codes = torch.empty(numel, dtype=torch.uint8, device=packed.device)
    _launch(unpack_kernel, packed.contiguous(), codes, numel, packed.numel(), bits)
    return codes


def _launch(kernel: triton.JITFunction, source: Tensor, out: Tensor, n: int, size: int, bits: int) -> None:
    plan: Configuration = configuration("bits", torch.uint8, arch_of(source))
    side = plan.elements * bits // 8
    launch(kernel, blocks(size, side), source, out, n, size, BITS=bits, BYTES=side, configuration=plan)


def pack_bits_cost(codes: Tensor, bits: int) -> Cost:
    return Cost(size((codes,)), packed_size(codes.numel(), bits), 0)


def unpack_bits_cost(packed: Tensor, bits: int, numel: int) -> Cost:
    return Cost(packed_size(numel, bits), numel, 0)
