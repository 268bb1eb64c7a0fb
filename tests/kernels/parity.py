"""Parity of an op's implementation with the float64 oracle: its error is at most twice that of plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry

LAYOUTS = ("contiguous", "channels_last", "strided", "expanded", "unaligned", "transposed")


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, layout: str = "contiguous") -> Tensor:
    """A normal tensor of `shape` that lies in memory as `layout` says; "expanded" repeats its first image."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def around_100(*shape: int, device: str) -> Tensor:
    """Values of mean 100 and deviation 0.01 in float32, on its grid there, each second one mirroring the one before it.

    So the mean of each row, and of an even number of elements in front of it, is a float32, and found by arithmetic on
    differences. Sums of the values themselves round: with 100·n just above a power of two, by more than the mean would.
    """
    unit, generator = torch.finfo(torch.float32).eps * 64, torch.Generator().manual_seed(sum(shape))
    off = (torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, dtype=torch.float64) * 0.01 / unit).round()
    center = torch.randint(-100, 101, (*shape[:-1], 1), generator=generator) * 2
    return (100 + unit * torch.stack([center + off, center - off], -1).flatten(-2)).float().to(device)


def run(name: str, implementation: str, arguments: tuple) -> tuple[Tensor, ...]:
    """Outputs of `idm_fast::<name>`."""
    with ops.use(implementation):
        outputs = registry.OPS[name].overload(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def oracle(name: str, arguments: tuple) -> tuple[Tensor, ...]:
    """Outputs of the reference on float64 copies of `arguments`, which keep their integers; an output dtype is float64 too."""

    def exact(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.double() if a.is_floating_point() else a
        return torch.float64 if isinstance(a, torch.dtype) else a

    return run(name, "reference", tuple(exact(a) for a in arguments))


def assert_parity(name: str, implementation: str, arguments: tuple, scales: dict[int, Tensor] | None = None) -> None:
    """Hold every output of the op to twice the error that the reference makes on contiguous copies of `arguments`.

    Where the reference happens to be exact, one unit of the output's dtype at its largest value is allowed, or at
    `scales[k]` for output k: what is a difference or a sum is as exact as its terms, not as itself. On the CPU it is two
    units, as Triton's interpreter has no fused multiply-add and rounds once more for each. In float64 the reference is the
    oracle and knows no error of its own: 32 units.
    """
    found = run(name, implementation, arguments)
    plain = run(name, "reference", tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments))
    exact = oracle(name, arguments)
    assert len(found) == len(plain) == len(exact)
    for k, (result, eager, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert (result.shape, result.dtype) == (eager.shape, eager.dtype), f"output {k}"
        if result.numel() == 0:
            continue
        scale = truth.abs().max() if scales is None or k not in scales else scales[k]
        units = 32 if result.dtype == torch.float64 else 1 if result.is_cuda else 2
        allowed = torch.maximum(2 * (eager - truth).abs().max(), units * torch.finfo(result.dtype).eps * scale)
        error = (result - truth).abs().max()
        assert error <= allowed, f"{name}, output {k}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails, too
