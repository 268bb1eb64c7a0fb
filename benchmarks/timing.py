"""Timing that can be trusted on a noisy machine: contenders take turns, every sample is kept, medians are compared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST_SAMPLES = 5
FLUSH_BYTES = 512 * 2**20
"""Written before a sample on a GPU, where asked: more than its cache holds, so that inputs come from memory. Writing it takes
the GPU longer than Python takes to launch the sample, so that launching is not measured."""


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    device: str,
    seconds: float,
    least: int = LEAST_SAMPLES,
    most: int = 200,
    flush: bool = False,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call of every contender.

    Args:
        contenders: functions without arguments; each is called once unmeasured, then all of them round by round.
        seconds: after this long the round in progress is the last, if there were `least` rounds.
        most: rounds at most.
        flush: on a GPU, empty the cache before every sample.
        failed: is told who raised what; that contender then leaves, with its samples. Without it the exception goes on.
    """
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if flush and device == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in contenders}

    def call(name: str) -> float | None:
        try:
            return _seconds(contenders[name], device, scratch)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            del samples[name]
            return None

    for name in contenders:
        call(name)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(most):
            if turn >= least and time.perf_counter() - started > seconds:
                break
            for name in [*samples]:
                sample = call(name)
                if sample is not None:
                    samples[name].append(sample)
    finally:
        if enabled:
            gc.enable()
    return samples


def _seconds(function: Callable[[], Any], device: str, scratch: torch.Tensor | None = None) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if scratch is not None:
            scratch.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def copy_bandwidth(device: str, size: int | None = None, seconds: float = 1.0) -> list[float]:
    """Bytes a second (read and written) of copying one large tensor to another: every sample."""
    size = size or (2**30 if device == "cuda" else 2**28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    return [2 * size / t for t in times]


def matrix_rate(device: str, dtype: torch.dtype, side: int | None = None, seconds: float = 1.0) -> list[float]:
    """FLOP a second of a square matrix product in `dtype`: every sample."""
    side = side or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = take_turns({"product": lambda: a @ b}, device, seconds)["product"]
    return [2 * side**3 / t for t in times]
