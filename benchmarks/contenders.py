"""Ways to train one network, by name: what the cases on memory, time and scaling compare."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Context
from benchmarks.published import PublishedNetwork
from idm_fast import IDM, BlockCompressedSensing
from idm_fast.memory.count import AllocationCounter, StepCount, count_training_step
from idm_fast.memory.planner import Planner
from idm_fast.memory.schedule import Schedule
from idm_fast.ops import registry
from idm_fast.ops.choice import Choice, OpByOp, read_choice

PLAIN, CHECKPOINT, PUBLISHED = "plain autograd", "checkpoint per block", "published reversible"
THEIRS = {PLAIN: "plain", CHECKPOINT: "checkpoint", PUBLISHED: "published"}
LEAN, FLAT, FLAT_KEPT = "ours, two_level", "ours, flat", "ours, flat + attention kept"
OURS: dict[str, tuple[str, list[str] | None]] = {
    LEAN: ("two_level", None),
    FLAT: ("flat", None),
    FLAT_KEPT: ("flat", ["attention"]),
}
STORED = "ours, store"
CONTENDERS = (*THEIRS, *OURS)
PLANNED = "ours, planned"

RATIO = 0.1
EXACT, SINGLE = 1e-9, 1e-3
"""Allowed errors of gradients in float64 (the same network walked in another order) and in float32, relative to their norm."""
SMALL = {"widths": (32, 64), "heads": 4, "norm_groups": 8}
"""Narrow, with attention, for a CPU's seconds."""


@dataclass(frozen=True)
class Setting:
    """One training step: T, images, side in pixels, and the network's further options (widths, …; default: full width)."""

    steps: int = 3
    batch: int = 8
    size: int = 256
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"T = {self.steps}, batch {self.batch}, {self.size}²"

    def with_(self, **changes: int) -> Setting:
        return replace(self, **changes)


class Scheduled(nn.Module):
    """`model` under one of `OURS`, or under `plan`; several of these may share a model."""

    def __init__(self, model: IDM, name: str, plan: Schedule | None = None) -> None:
        super().__init__()
        self.model, self._name, self._plan = model, name, plan

    def forward(self, y: Tensor, physics: Any) -> Tensor:
        if self._plan is not None:
            self.model.plan = self._plan
        else:
            self.model.set_schedule(*OURS.get(self._name, ("store", None)))
        return self.model(y, physics)


def train_by(name: str, model: IDM, plan: Schedule | None = None) -> nn.Module:
    """`model` trained the way called `name`; `plan` is the schedule of `PLANNED`."""
    return PublishedNetwork(model, THEIRS[name]) if name in THEIRS else Scheduled(model, name, plan)


def make(name: str, setting: Setting, plan: Schedule | None = None) -> nn.Module:
    """The network of `setting`, with weights of its own, trained the way called `name`."""
    return train_by(name, IDM(steps=setting.steps, **setting.options), plan)


def norms_as_on_cuda(network: nn.Module) -> nn.Module:
    """`network` with its GroupNorm and LayerNorm in float32 under the CPU's autocast, which leaves them alone: as under CUDA's.

    Plain PyTorch keeps more for backward then; ours calls none of these modules and states its norms' precision itself.
    """

    def to_float(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return (inputs[0].float(),) if torch.is_autocast_enabled("cpu") else None

    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(to_float)
    return network


def count(
    name: str,
    setting: Setting,
    autocast: torch.dtype | None = torch.bfloat16,
    as_reference: Collection[str] = (),
    plan: Schedule | None = None,
    as_on_cuda: bool = False,
    counter: AllocationCounter | None = None,
    threads: int = 0,
) -> StepCount:
    """What a training step costs, under fake tensors.

    Args:
        as_reference: ops of ours that are counted operation by operation; the others are a launch each.
        as_on_cuda: with plain PyTorch's norms as CUDA's autocast runs them.
        counter: one that counts more, in place of `AllocationCounter`.
        threads: `resident_threads` of the GPU whose scratch memory is counted too.
    """

    def build() -> nn.Module:
        network = make(name, setting, plan)
        return norms_as_on_cuda(network) if as_on_cuda else network

    return count_training_step(build, setting.batch, setting.size, RATIO, autocast, as_reference, counter, threads)


def count_as_on_a_cpu(setting: Setting) -> StepCount:
    """The published training where its replays lose autocast; see `PublishedNetwork`."""

    def build() -> nn.Module:
        return PublishedNetwork(IDM(steps=setting.steps, **setting.options), "published", autocast_lost=True)

    return count_training_step(build, setting.batch, setting.size, RATIO)


def plan_for(setting: Setting, budget: int, autocast: torch.dtype | None = torch.bfloat16) -> tuple[Schedule, StepCount]:
    """The schedule with the fewest FLOP that takes at most `budget` bytes, and what it costs."""
    planner = Planner(lambda T: IDM(steps=T, **setting.options), setting.batch, setting.size, RATIO, autocast)
    plan = planner.plan(setting.steps, budget)
    return plan.schedule, plan.count


def implementations(device: str) -> list[str]:
    """What may stand behind the ops on `device` and is worth timing, the most specialised last: not Triton's interpreter."""
    for name in kernels_for(device):
        registry.load(name)
    names = [name for name in reversed(registry.ORDER) if device != "cpu" or name != "triton"]
    return [n for n in names if any(n in op.implementations and op.serves(n, device) for op in registry.OPS.values())]


def kernels_for(device: str) -> list[str]:
    """The implementations that are made for `device`, whether they can be had here or not."""
    return [name for name, of in registry.FOR_DEVICE.items() if of == device]


def missing_kernels(device: str) -> list[str]:
    """Why those of `kernels_for` that cannot be had here cannot."""
    return [f"{name}: {reason}" for name in kernels_for(device) if (reason := registry.load(name))]


def choices(context: Context) -> list[str | OpByOp]:
    """`implementations`, and where an earlier case has compared them, the fastest op by op."""
    found: list[str | OpByOp] = [*implementations(context.device)]
    if context.fastest:
        found.append(OpByOp.make(read_choice(context.fastest).names, "fastest"))
    return found


def ours_on(context: Context) -> Choice:
    """The choice of implementation that stands for this package's kernels: None, the automatic one, on a CPU.

    On a GPU no kernel is taken unasked yet, so that it has to be named; "reference" where there is none.
    """
    return None if context.device == "cpu" else choices(context)[-1]


def ours_by_environment(context: Context) -> dict[str, str]:
    """The environment in which a process makes the choice of `ours_on`."""
    if context.device == "cpu":
        return {}
    return {"IDM_FAST_IMPL": str(context.fastest or implementations(context.device)[-1])}


def references(device: str, choice: Choice) -> tuple[str, ...]:
    """The ops that run as plain PyTorch on `device` under a choice of implementation."""
    if isinstance(choice, str):
        return tuple(registry.OPS) if choice == "reference" else ()
    return tuple(name for name, op in registry.OPS.items() if op.choose_by(choice, device) == "reference")


@contextmanager
def counters() -> Iterator[Callable[..., Future[Any]]]:
    """`submit(function, *arguments)` on all cores: counting is Python, and so one process takes one core."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ProcessPoolExecutor(min(workers, 6), mp_context=get_context("spawn"))
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


class Step:
    """One training step on `device`, ready to run: L1 loss of a reconstruction, forward and backward.

    Calling it runs the step once; gradients are set to zero first, and stay allocated.
    """

    def __init__(self, network: nn.Module, setting: Setting, device: str, autocast: torch.dtype | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.network = network.to(device)
        self.physics = BlockCompressedSensing((setting.size, setting.size), RATIO).to(device)
        self.x = torch.rand(setting.batch, 1, setting.size, setting.size, generator=generator).to(device)
        self._autocast = nullcontext() if autocast is None else torch.autocast(device, autocast)

    def to(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on."""
        self.network, self.physics, self.x = self.network.to(dtype), self.physics.to(dtype), self.x.to(dtype)

    def __call__(self) -> None:
        self.network.zero_grad(set_to_none=False)
        with self._autocast:
            loss = (self.network(self.physics.A(self.x), self.physics) - self.x).abs().mean()
        loss.backward()
        if isinstance(self.network, PublishedNetwork):
            self.network.release()


CHECKED = Setting(2, 2, 32, {"widths": (16, 32), "heads": 2, "norm_groups": 4})
"""What gradients are checked on: every kind of layer, in a second."""


def gradients(name: str, device: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Of all parameters of a network of `CHECKED`, always the same one, trained the way called `name`; in float64."""
    torch.manual_seed(0)
    step = Step(make(name, CHECKED), CHECKED, device, autocast)
    with torch.no_grad():
        for parameter in step.network.parameters():
            # Merges start at 0, which would hide whatever is wrong with them.
            parameter += 0.05 * torch.randn(parameter.shape).to(device)
    step.to(dtype)
    step()
    return gradients_of(step)


def gradients_of(step: Step) -> list[Tensor]:
    """By parameter, in float64."""
    parameters = step.network.parameters()
    return [torch.zeros_like(p).double() if p.grad is None else p.grad.double() for p in parameters]


@functools.cache
def oracle(device: str) -> list[Tensor]:
    """Gradients by autograd that stores everything, through the references, in float64."""
    with registry.use("reference"):
        return gradients(STORED, device, torch.float64)


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of all parameters.

    A gradient that is zero but for rounding (a bias in front of a norm) is measured against 1e-3 of the largest one.
    """
    floor = 1e-3 * max(e.norm().item() for e in expected)
    return max((f - e).norm().item() / max(e.norm().item(), floor) for f, e in zip(found, expected, strict=True))


def total_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ of all parameters together."""
    difference = sum((f - e).norm().item() ** 2 for f, e in zip(found, expected, strict=True))
    return (difference / sum(e.norm().item() ** 2 for e in expected)) ** 0.5


def check_gradients(context: Context, name: str) -> float:
    """The error of the gradients by `name` in float64; WrongResult unless they are plain autograd's."""
    with registry.use("reference"):
        error = largest_error(gradients(name, context.device, torch.float64), oracle(context.device))
    context.check(f"the gradient by {name}", error, EXACT)
    return error


def check_in_use(context: Context, name: str, implementation: Choice, autocast: torch.dtype | None) -> float:
    """As `check_gradients`, in what is timed: float32, autocast, and an implementation of the ops."""
    device = context.device
    with registry.use(implementation):
        error = total_error(gradients(name, device, torch.float32, autocast), oracle(device))
    context.check(f"the gradient by {name} ({implementation})", error, allowed_error(device, autocast))
    return error


@functools.cache
def allowed_error(device: str, autocast: torch.dtype | None) -> float:
    """1e-3 of the norm, or twice what plain autograd is off by in the same precision."""
    return max(SINGLE, 2 * total_error(gradients(PLAIN, device, torch.float32, autocast), oracle(device)))
