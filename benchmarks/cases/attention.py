"""Attention: the library's kernels at the U-Net's sizes, head_dim 40 and 80 with 16,384 and 4,096 tokens at 256².

Each kernel of `idm_fast.models.attention.BACKENDS` alone, forward and forward + backward, in bfloat16. Its output and
gradients on one head are first held against float64: twice the error of plain PyTorch in the same dtype is the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.case import Cell, Context, Plot, Result, Table, case
from benchmarks.timing import take_turns
from idm_fast.models.attention import BACKENDS, FASTEST, device_name

HEADS = 8
SIZES = ((40, 16384), (80, 4096))
"""head_dim and tokens at the U-Net's two resolutions."""
BATCH = 8
KERNELS = [name for name in BACKENDS if name != "math"]
"""math holds the (N, N) probabilities, 34 GB of them here: nobody would choose it."""
MOST_ERROR = 2
"""Times the error of plain PyTorch."""


@case("Which of the library's attention kernels is fastest at the U-Net's sizes?", devices=("cuda",), seconds=(60, 300))
def run(context: Context) -> Result:
    return compare(context, SIZES, BATCH)


def compare(context: Context, sizes: tuple[tuple[int, int], ...], batch: int) -> Result:
    result, device = context.new_result(), torch.device(context.device)
    rows: list[list[Cell]] = []
    bars: dict[str, list[tuple[Cell, float]]] = {}
    for head_dim, tokens in sizes:
        size = f"d = {head_dim}, {tokens:,} tokens"
        inputs, d = tensors(batch, tokens, head_dim, device)
        errors = {name: result.attempt(f"{name}, {size}", partial(checked, context, name, inputs, d)) for name in KERNELS}
        right = [name for name, error in errors.items() if error is not None]
        how = {"seconds": 1.0 if context.quick else 10.0, "failed": result.failed_at(size)}
        turns = partial(take_turns, device=context.device, **how)
        forward = turns({name: partial(forward_only, name, inputs) for name in right})
        both = turns({name: partial(under, name, inputs, d) for name in forward})
        times: dict[str, float] = {}
        # Multiply-adds of 2 FLOP: q kᵀ and p v forward, five such products backward.
        flop = 3.5 * 4 * batch * HEADS * tokens**2 * head_dim
        for name in both:
            once = result.samples(f"{name} forward, {size}", "s", forward[name]).median
            times[name] = result.samples(f"{name} forward and backward, {size}", "s", both[name]).median
            rate = flop / times[name] / 1e12
            rows.append([head_dim, tokens, name, 1e3 * once, 1e3 * times[name], rate, f"{errors[name]:.2f}"])
            bars.setdefault(name, []).append((size, 1e3 * times[name]))
        if times:
            best = min(times, key=lambda name: times[name])
            key = (device_name(device), head_dim)
            chosen = FASTEST.get(key, "PyTorch's own choice")
            result.notes.append(f"Fastest at {size}: {best}; models/attention.py has {chosen} for {key}.")
    columns = ["head_dim", "tokens", "kernel", "forward (ms)", "forward + backward (ms)", "TFLOP/s", "error / eager's"]
    title = f"Attention by kernel: batch {batch}, {HEADS} heads, bfloat16"
    result.tables.append(Table(title, columns, rows, "TFLOP/s: of forward and backward together. Padding of d isn't counted."))
    if bars:
        winners = ", ".join(f"{min(bars, key=lambda n: dict(bars[n]).get(size, 1e9))} at {size}" for size in sizes_of(bars))
        result.plots.append(Plot(f"Fastest attention: {winners}", "", "forward and backward (ms)", bars, bars=True, log_y=True))
    return result


def sizes_of(bars: dict[str, list[tuple[Cell, float]]]) -> list[Cell]:
    return list(dict.fromkeys(size for points in bars.values() for size, _ in points))


def tensors(batch: int, tokens: int, head_dim: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the output's gradient, as the U-Net has them: projections (B, N, heads·d), seen as (B, heads, N, d)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = batch, tokens, HEADS, head_dim
    drawn = [torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(4)]
    return drawn[:3], drawn[3]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v


def output_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], d: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d)]


def forward_only(kernel: str, inputs: list[Tensor]) -> Tensor:
    with sdpa_kernel(BACKENDS[kernel]), torch.no_grad():
        return F.scaled_dot_product_attention(*inputs)


def under(kernel: str, inputs: list[Tensor], d: Tensor) -> list[Tensor]:
    """Output and gradients by one kernel."""
    with sdpa_kernel(BACKENDS[kernel]):
        return output_and_gradients(F.scaled_dot_product_attention, inputs, d)


def checked(context: Context, kernel: str, inputs: list[Tensor], d: Tensor) -> float:
    """Largest error over plain PyTorch's, on the first head of the first image; WrongResult if too large.

    The whole batch runs once as well: what lacks memory for it fails here.
    """
    head: list[Any] = [x[:1, :1] for x in (*inputs, d)]
    found = under(kernel, head[:3], head[3])
    eager = output_and_gradients(plain, head[:3], head[3])
    exact = output_and_gradients(plain, [x.double() for x in head[:3]], head[3].double())
    error = max(float((a - c).abs().max() / (b - c).abs().max()) for a, b, c in zip(found, eager, exact, strict=True))
    context.check("output or gradient, in errors of plain PyTorch,", error, MOST_ERROR)
    under(kernel, inputs, d)
    return error
