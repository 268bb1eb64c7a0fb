"""One door through which every kernel is launched, so that launches can also be recorded: to compile them without a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels.configurations import Configuration

RECORDED_ARCH = 90
"""Compute capability for which tensors that lie on no GPU are configured, unless `recording` names another."""


@dataclass
class Launch:
    """One launch: a kernel, the number of its programs, its run-time and its compile-time arguments, the compiler's options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Recorder:
    arch: int
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(arch: int = RECORDED_ARCH) -> Iterator[list[Launch]]:
    """Collect launches, configured for compute capability `arch`, instead of running them; meta tensors serve as arguments."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(arch)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def arch_of(tensor: Tensor) -> int:
    """Compute capability for which launches on `tensor` are configured, as 90 for 9.0."""
    if _recorder is not None:
        return _recorder.arch
    return _capability(tensor.device.index) if tensor.is_cuda else RECORDED_ARCH


def launch(kernel: Any, programs: int, *arguments: Any, configuration: Configuration, **constants: Any) -> None:
    """Run `programs` programs of `kernel` on the device of the first argument, a tensor. Nothing runs where `programs` is 0."""
    options = configuration.options
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, programs, arguments, constants, options))
    elif programs and _several_devices():
        # Triton launches on the current device, whatever device its tensors lie on.
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, **options)
    elif programs:
        kernel[(programs,)](*arguments, **constants, **options)


def blocks(elements: int, block: int) -> int:
    """Number of blocks of `block` elements that cover `elements`."""
    return -(-elements // block)


def power_of_two(extent: int) -> int:
    """Least power of two that covers `extent`, at least 1; as triton.next_power_of_2, which takes a microsecond."""
    return 1 << max(extent - 1, 0).bit_length()


def fit(extent: int, limit: int) -> int:
    """Least power of two that covers `extent`, at least 1 and at most `limit`, itself one: the side of a tile."""
    return min(power_of_two(extent), limit)
