"""Which implementation of an op runs, and why.

Each op of `idm_fast::…` is defined once (`define_op`) with a schema, a plain-PyTorch reference and a fake kernel. Faster
implementations register themselves behind it (`add_implementation`). A call picks one per op and device: an explicit choice
(`use`, or the environment variable IDM_FAST_IMPL) works or raises with the reason; the automatic choice is the first of
`ORDER` that the op has on that device. Nothing above this file ever sees an implementation. The Triton kernels are loaded
at their first need: an explicit choice, or a report.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from idm_fast.ops.choice import Choice, OpByOp, read_choice

ORDER = ("cuda", "triton", "cpu", "reference")
"""Automatic order of choice. An implementation that a benchmark does not justify is not registered for automatic use."""

NEVER_AUTOMATIC = {("triton", "cpu"), ("triton", "cuda"), ("cuda", "cuda")}
"""Taken on explicit choice alone. On CPU tensors Triton's kernels run in its interpreter, thousands of times slower: for
proofs. On a GPU neither they nor the CUDA extension have been run or timed yet, only compiled."""

MEASURED_SLOWER = {("cpu", "layer_norm"), ("cpu", "layer_norm_backward")}
"""(implementation, op) that a benchmark found slower than what comes after it in ORDER: on explicit choice alone, too.
On a busy CPU 0.87 and 0.85 times as fast as plain PyTorch (benchmarks/results/native_cpu.md)."""

CHECKED_IN_PYTHON = {"reference", "triton"}
"""Implementations in front of which an op checks its arguments; the native ones do it themselves."""

FOR_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
"""The device type that each implementation is for; where it is missing there, the log says so."""

LIBRARY = torch.library.Library("idm_fast", "DEF")


def _keys(*keys: Any) -> torch._C.DispatchKeySet:
    return functools.reduce(torch._C.DispatchKeySet.__or__, map(torch._C.DispatchKeySet, keys))


Key = torch._C.DispatchKey
DENSE = {_keys(Key.CPU).raw_repr(): "cpu", _keys(Key.CUDA).raw_repr(): "cuda"}
"""Device types by the keys of a call below autograd, where nothing stands between the op and its implementation: no mode, no
tracing, no kind of tensor that PyTorch has to unwrap."""

autocast_is_on = torch._C._is_any_autocast_enabled


class Implementations(UserDict[str, tuple[Callable[..., Any], tuple[str, ...] | None]]):
    """Implementations by name, each with the device types that it serves (None: every device).

    `chosen` remembers the function that was chosen, by the dispatcher's keys of a call and the explicit choice in force.
    """

    def __init__(self) -> None:
        self.chosen: dict[tuple[int, Choice], Callable[..., Any]] = {}
        super().__init__()

    def __setitem__(self, name: str, item: tuple[Callable[..., Any], tuple[str, ...] | None]) -> None:
        self.chosen.clear()
        super().__setitem__(name, item)

    def __delitem__(self, name: str) -> None:
        self.chosen.clear()
        super().__delitem__(name)


@dataclass
class Op:
    """One operator and its implementations."""

    name: str
    overload: Any
    check_arguments: Callable[..., None]
    implementations: Implementations = field(default_factory=Implementations)

    def choose_for(self, keys: torch._C.DispatchKeySet, device_type: str) -> Callable[..., Any]:
        """The implementation for a call with these keys, remembered where they say all that the choice depends on."""
        choice = _choice  # read once: another thread may change it
        name = self.choose_by(choice, device_type)
        function = self.implementations[name][0]
        dense = (keys & torch._C._after_autograd_keyset).raw_repr() in DENSE
        if name in CHECKED_IN_PYTHON:
            # Dense keys are those of tensors on devices of one type.
            one_device = dense and (device_type == "cpu" or torch.cuda.device_count() == 1)
            function = self._checked(function, self.check_arguments if one_device else self.check)
        if dense:
            self.implementations.chosen[keys.raw_repr(), choice] = function
        return function

    @staticmethod
    def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            check(*args)
            return function(*args)

        return checked

    def check(self, *args: Any) -> None:
        """ValueError for arguments that no implementation takes."""
        device = args[0].device
        for k, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.device != device:
                names = [argument.name for argument in self.overload._schema.arguments]
                raise ValueError(f"{names[k]} is on {value.device}, expected {device} as {names[0]}")
        self.check_arguments(*args)

    def choose(self, device_type: str) -> str:
        """Name of the implementation that serves `device_type`; RuntimeError when the explicit choice cannot."""
        return self.choose_by(_choice, device_type)

    def named_in(self, choice: Choice) -> str | None:
        """The implementation that `choice` names for this op; None: the automatic one."""
        return choice.names.get(self.name) if isinstance(choice, OpByOp) else choice

    def choose_by(self, choice: Choice, device_type: str) -> str:
        """As `choose`, with this explicit choice (None: the automatic one)."""
        named = self.named_in(choice)
        if named is not None:
            return self._explicit(named, device_type)
        for name in ORDER:
            if self.automatic(name, device_type):
                if name in self.implementations and self.serves(name, device_type):
                    return name
                if FOR_DEVICE.get(name) == device_type:
                    log_missing(name, self.name)
        raise RuntimeError(f"idm_fast::{self.name} has no implementation for device type {device_type!r}")

    def runs_reference(self, device_type: str) -> bool:
        """Whether plain PyTorch is what serves this op's calls there, by the explicit choice in force or the automatic one."""
        named = self.named_in(_choice)
        return (named or self.choose_by(None, device_type)) == "reference"

    def serves(self, name: str, device_type: str) -> bool:
        devices = self.implementations[name][1]
        return devices is None or device_type in devices

    def automatic(self, name: str, device_type: str) -> bool:
        return (name, device_type) not in NEVER_AUTOMATIC and (name, self.name) not in MEASURED_SLOWER

    def _explicit(self, name: str, device_type: str) -> str:
        if name not in self.implementations:
            raise RuntimeError(f"idm_fast::{self.name} has no {name!r} implementation here: {missing_reason(name)}")
        if not self.serves(name, device_type):
            raise RuntimeError(
                f"the {name!r} implementation of idm_fast::{self.name} serves {self.implementations[name][1]}, "
                f"and the call came with tensors on {device_type!r}; move them or choose another with idm_fast.use(...)"
            )
        return name


OPS: dict[str, Op] = {}
_choice: Choice = None


def define_op(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None]
) -> Callable[..., Any]:
    """Define `idm_fast::<schema>`.

    Args:
        schema: torch schema without namespace, e.g. "couple(Tensor F, Tensor x2, Tensor v) -> Tensor".
        reference: plain PyTorch, any dtype and device; it is the oracle.
        fake: the same signature, allocates the outputs only.
        check: the same signature, raises ValueError for shapes and dtypes that do not fit. It runs in front of implementations
            that do not check for themselves, so that none reads or writes what it was not given.

    Returns:
        The op overload, to be called with tensors.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = OPS[name] = Op(name, getattr(torch.ops.idm_fast, name).default, check)
    op.implementations["reference"] = (reference, None)

    chosen = op.implementations.chosen

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        implementation = chosen.get((keys.raw_repr(), _choice)) or op.choose_for(keys, args[0].device.type)
        if not autocast_is_on():
            return implementation(*args)
        # An op states its own precision; autocast would lower the matrix products inside a reference.
        with torch._C._DisableAutocast():
            return implementation(*args)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd", with_keyset=True)
    torch.library.register_fake(f"idm_fast::{name}", fake, lib=LIBRARY)
    return op.overload


def refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """NotImplementedError where forward-mode differentiation arrives: kernels would lose its tangents without a word."""
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(f"idm_fast::{name} has no derivative in forward mode; use reverse mode (torch.autograd.grad)")


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register the hand-written gradient of `idm_fast::<name>`.

    As torch.library.register_autograd, whose node takes up to four times the time on the host: it serves keyword arguments and
    defaults, which the ops here do not have, and goes through the dispatcher twice. Of several outputs the first is
    differentiable; the others are what the op keeps for its gradient, and leave the node as one value that is no tensor to it.

    Args:
        backward: backward(ctx, gradient of the first output) → gradients of all inputs.
        setup_context: setup_context(ctx, inputs, output).
    """
    op = OPS[name]
    overload: Any = op.overload
    several = len(overload._schema.returns) > 1
    chosen = op.implementations.chosen
    grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad
    transformed = torch._C._are_functorch_transforms_active

    def below(keys: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        implementation = chosen.get((keys.raw_repr(), _choice))
        if implementation is None:
            rest = keys & torch._C._after_autograd_keyset
            device_type = DENSE.get(rest.raw_repr())
            if device_type is None:
                with torch._C._AutoDispatchBelowAutograd():
                    return overload.redispatch(rest, *args)
            implementation = op.choose_for(keys, device_type)
        if not autocast_is_on():
            return implementation(*args)
        with torch._C._DisableAutocast():
            return implementation(*args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keys, *args):
            output = below(keys, args)
            setup_context(ctx, args, output)
            return (output[0], output[1:]) if several else output

        @staticmethod
        def backward(ctx, gradient, *_):
            if grad_enabled():  # for second derivatives: autograd sees through plain PyTorch, and through no kernel
                with use("reference"):
                    found = backward(ctx, gradient)
            else:
                found = backward(ctx, gradient)
            return None, *(found if isinstance(found, tuple) else (found,))

    # What torch.autograd.Function.apply calls in the end; before, it looks for functorch, and for arguments by name.
    record = super(torch.autograd.Function, Gradient).apply

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(name, args)
        if not (grad_enabled() and any_requires_grad(*args)):
            return below(keys, args)
        output = Gradient.apply(keys, *args) if transformed() else record(keys, *args)
        return (output[0], *output[1]) if several else output

    Gradient.__name__ = Gradient.__qualname__ = f"Gradient_{name}"
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def add_implementation(op: str, name: str, function: Callable[..., Any], devices: tuple[str, ...]) -> None:
    """Put `function` behind `idm_fast::<op>` as implementation `name` (one of ORDER) for the device types `devices`."""
    if name not in ORDER:
        raise ValueError(f"name: {name!r} is not an implementation; expected one of {ORDER}")
    OPS[op].implementations[name] = (function, devices)


@functools.cache
def load_triton() -> str | None:
    """Add the Triton implementations, once; returns None, or why they cannot run in this process."""
    from idm_fast import kernels

    reason = kernels.missing_reason()
    if reason is None:
        for op, function in kernels.implementations().items():
            add_implementation(op, "triton", function, kernels.device_types())
    return reason


def load(name: str | None) -> str | None:
    """Add the implementations `name`, once; returns None, or why they cannot be had in this process."""
    from idm_fast.ops import native

    loaders = {"triton": load_triton, "cuda": native.load_cuda, "cpu": native.load_cpu}
    return loaders[name]() if name in loaders else None


def missing() -> dict[str, str]:
    """The implementations that no op can have in this process, and why."""
    return {name: reason for name in ORDER if (reason := load(name))}


def missing_reason(name: str) -> str:
    """Why no op, or not the one that was asked for, has implementation `name` in this process."""
    if name not in ORDER:
        return f"unknown implementation; known are {', '.join(ORDER)}"
    return load(name) or f"{name} has no kernel for it"


_logged: set[str] = set()


def log_missing(name: str, op: str) -> None:
    """Warn, once a process, that implementation `name` cannot be had; `op` is what has first asked for it.

    An op for which `name` exists but has no kernel is no news: doctor lists it.
    """
    if name in _logged:
        return
    _logged.add(name)
    reason = load(name)
    if reason:
        logging.getLogger(__name__).warning("idm_fast::%s, and others, run without %r, which is missing: %s", op, name, reason)


class use:
    """Choose the implementations of the ops: `use("reference")`, or `with use("reference"): ...`; `use(None)` is automatic.

    Args:
        choice: an implementation for every op, one of `ORDER`; or a mapping from op to implementation, where the ops that it
            leaves out keep the automatic choice; or the path of a .json file with such a mapping (`read_choice`).

    Raises RuntimeError at once when no op has that implementation here (of a mapping: when one op lacks its own), and at the
    call of an op that lacks it. The choice is one for the process, as torch.backends' flags are; a reversible replay puts back
    the choice of its forward.
    """

    def __init__(self, choice: Choice | Mapping[str, str] | os.PathLike[str]) -> None:
        global _choice
        self._previous = _choice
        _choice = _usable(choice)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _choice
        _choice = self._previous


def _usable(choice: Choice | Mapping[str, str] | os.PathLike[str]) -> Choice:
    """`choice` once it is known that it can be had here."""
    if isinstance(choice, os.PathLike) or (isinstance(choice, str) and choice.endswith(".json")):
        choice = read_choice(choice)
    elif isinstance(choice, Mapping):
        choice = OpByOp.make(choice)
    if isinstance(choice, OpByOp):
        _require_all(choice)
        return choice
    load(choice)
    if choice is not None and not any(choice in op.implementations for op in OPS.values()):
        raise RuntimeError(f"implementation {choice!r} cannot be used: {missing_reason(choice)}")
    return choice


@functools.cache  # a replay and a timed call come here each time
def _require_all(choice: OpByOp) -> None:
    """RuntimeError unless every op that `choice` names has its implementation here."""
    for op, name in choice.names.items():
        if op not in OPS:
            raise RuntimeError(f"{choice}: there is no op {op!r}; known are {', '.join(OPS)}")
        load(name)
        if name not in OPS[op].implementations:
            raise RuntimeError(f"{choice}: idm_fast::{op} has no {name!r} implementation here: {missing_reason(name)}")


def current_choice() -> Choice:
    """The explicit choice in force, or None for automatic."""
    return _choice


def choose_from_environment() -> None:
    """Apply IDM_FAST_IMPL; called once when the ops are imported. RuntimeError names the variable when it cannot be met."""
    name = os.environ.get("IDM_FAST_IMPL")
    if name and name != "auto":
        try:
            use(name)
        except RuntimeError as error:
            raise RuntimeError(f"environment variable IDM_FAST_IMPL={name}: {error}") from None
