"""A GPU that isn't there: what asks for device "cuda" gets the CPU, and torch.cuda answers as on a small machine with one.

So the branches of the cases that a GPU takes can be run without one, all but what the kernels and autocast do
there. Nothing here says anything about times or memory: events tell the clock, and the allocator's counters stand still.
"""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from idm_fast.ops import native, registry

GIB = 2**30
Properties = namedtuple("Properties", "major minor total_memory")


def on_cpu(value: Any) -> Any:
    """`value`, or the CPU in place of a CUDA device."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.moment - self.moment)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def replay(self) -> None:
        """The outputs are what they were when it was recorded."""


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, memory: int = 80 * GIB) -> Iterator[None]:
    """Within, on this thread, "cuda" is the CPU; torch.cuda keeps answering to the end of the test."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda *_: (memory, memory),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda *_: "a pretended GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: Properties(9, 0, memory),
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(),
        "graph": lambda *_: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    # The references stand for Triton's kernels. What was really loaded would stay, and be asked for by the tests after these.
    for op in registry.OPS.values():
        monkeypatch.setitem(op.implementations, "triton", (op.implementations["reference"][0], ("cpu", "cuda")))
    monkeypatch.setattr(registry, "load_triton", lambda: None)
    monkeypatch.setattr(native, "load_cuda", lambda: "a pretended GPU runs no CUDA")
    enter = torch.autocast.__init__

    def without_autocast(
        self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> None:
        # Some processors take twenty times as long for a convolution in bfloat16.
        enter(self, on_cpu(device_type), dtype, False, cache_enabled)

    monkeypatch.setattr(torch.autocast, "__init__", without_autocast)
    real: Callable[..., Any] = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": real(on_cpu(device)))
    with OnCpu():
        yield
