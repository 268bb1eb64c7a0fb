"""What is put back when a body runs again: random numbers, autocast, the choice of implementation, and norm buffers.

A body's second run must compute what the first did, and must not leave a trace of its own: dropout draws the same mask, a
bfloat16 body stays bfloat16 although backward runs outside the autocast context, BatchNorm statistics move once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase

from idm_fast.ops import registry
from idm_fast.ops.choice import Choice
from idm_fast.reversible import casts


@dataclass(frozen=True)
class RandomState:
    """State of the global generators that a body on `device` may draw from."""

    cpu: Tensor
    device: torch.device | None
    on_device: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        if device.type == "cpu" or device.type == "meta":
            return cls(torch.get_rng_state(), None, None)
        return cls(torch.get_rng_state(), device, torch.get_device_module(device.type).get_rng_state(device))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        devices = [] if self.device is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if self.device is not None else "cuda"):
            torch.set_rng_state(self.cpu)
            if self.device is not None:
                torch.get_device_module(self.device.type).set_rng_state(self.on_device, self.device)
            yield


@dataclass(frozen=True)
class AutocastState:
    """Autocast as it was for each device type that a body on `device` may use."""

    settings: tuple[tuple[str, torch.dtype, bool], ...]
    cache: bool

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        types = [t for t in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(t)]
        settings = tuple((t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t)) for t in types)
        return cls(settings, torch.is_autocast_cache_enabled())

    @contextmanager
    def put_back(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device_type, dtype, enabled in self.settings:
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=self.cache))
            yield


@dataclass(frozen=True)
class ReplayContext:
    """Everything that `put_back` restores around a body's second run."""

    autocast: AutocastState
    random: RandomState | None
    implementation: Choice
    weight_casts: casts.Casts | None

    @classmethod
    def capture(cls, device: torch.device, preserve_rng_state: bool) -> ReplayContext:
        random = RandomState.capture(device) if preserve_rng_state else None
        return cls(AutocastState.capture(device), random, registry.current_choice(), casts.in_force())

    @contextmanager
    def put_back(self, body: Callable[..., Any]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.autocast.put_back())
            stack.enter_context(casts.put_back(self.weight_casts))
            if self.random is not None:
                stack.enter_context(self.random.put_back())
            if self.implementation != registry.current_choice():
                stack.enter_context(registry.use(self.implementation))
            stack.enter_context(norm_buffers_kept(body))
            yield


@contextmanager
def norm_buffers_kept(body: Callable[..., Any]) -> Iterator[None]:
    """Within, statistics of BatchNorm and its like move, and afterwards they are what they were."""
    modules = body.modules() if isinstance(body, nn.Module) else ()
    moving = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    saved = [(buffer, buffer.clone()) for module in moving for buffer in module.buffers(recurse=False)]
    try:
        yield
    finally:
        # The norm itself moves its statistics without a new version of the tensor; so must what moves them back.
        for buffer, value in saved:
            with torch.no_grad(), _unsafe_preserve_version_counter(buffer):
                buffer.copy_(value)
