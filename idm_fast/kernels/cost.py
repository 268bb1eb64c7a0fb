"""What an op must move and compute at least: the roofline against which a benchmark holds a measured time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Bytes read from memory, bytes written to it, and floating-point operations (a transcendental function counts as one)."""

    read: int
    written: int
    flop: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of `tensors`, each counted once; meta and fake tensors serve as well."""
    return sum(t.numel() * t.element_size() for t in tensors)
