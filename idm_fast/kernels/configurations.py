"""How each kernel is launched: elements a program, warps. One table, by kernel, dtype and GPU architecture.

An elementwise kernel gets a tile of 16 bytes a thread in its widest dtype: then every access is one 16-byte transaction, no
layout is converted through shared memory, and at up to 32 registers a thread 2,048 threads of a multiprocessor are
resident, which is what keeps enough bytes in flight. `resources.csv` holds the compiler's figures for each entry.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Configuration:
    """Elements that one program handles, its warps (of 32 threads), and whether a·b + c may be rounded once, not twice."""

    elements: int
    warps: int
    fused: bool = True

    @functools.cached_property
    def options(self) -> dict[str, int | bool]:
        """The same in the compiler's terms."""
        return {"num_warps": self.warps, "enable_fp_fusion": self.fused}


TABLE: dict[tuple[str, torch.dtype | None, int | None], Configuration] = {
    ("couple", None, None): Configuration(1024, 8),
    ("couple", torch.float64, None): Configuration(512, 8),
    ("sum", None, None): Configuration(4096, 16),
    ("geglu", None, None): Configuration(1024, 4),
    ("geglu", torch.float64, None): Configuration(512, 8),
    ("group_norm", None, None): Configuration(4096, 8),
    ("group_norm", torch.float64, None): Configuration(2048, 8),
    ("layer_norm", None, None): Configuration(2048, 4),
    ("layer_norm", torch.float64, None): Configuration(1024, 4),
    ("bits", None, None): Configuration(4096, 4),
    ("fixed", None, None): Configuration(1024, 8, fused=False),  # equal to the reference in every bit
    ("inject", None, None): Configuration(2048, 8),
    ("inject_couple_backward", None, None): Configuration(512, 4),
    ("project", None, None): Configuration(512, 4),
    ("project", torch.float64, None): Configuration(256, 4),
    ("project", torch.float32, 100): Configuration(512, 8),  # with 4 warps, the assembler spills two registers there
    ("merge", None, None): Configuration(512, 4),
}
"""By (kernel family, widest dtype, compute capability as 90 for 9.0). None stands for any; the most specific entry counts."""


@functools.cache
def configuration(kernel: str, dtype: torch.dtype, arch: int) -> Configuration:
    """The entry of TABLE for `kernel` on the widest `dtype` that it touches and compute capability `arch`."""
    for key in ((kernel, dtype, arch), (kernel, None, arch), (kernel, dtype, None), (kernel, None, None)):
        if key in TABLE:
            return TABLE[key]
    raise KeyError(f"no launch configuration for the kernel family {kernel!r}")
