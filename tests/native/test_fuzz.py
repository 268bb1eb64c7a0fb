"""Arguments that nobody should pass. A native CPU op returns what the reference returns, or raises an error that a person can
read; it never crashes and never touches what it was not given.

A call starts out valid; up to two of its arguments are then damaged: another shape, dtype, device or layout, no elements,
permutations with places outside of the image or twice the same, sizes that overflow. Every instruction set of this machine
takes part, and what the checks in front of the other implementations refuse is refused. The same 1,500 calls are made each
time; IDM_FAST_FUZZ is a number of calls, to be drawn anew;
under AddressSanitizer (`make sanitize`) a read or write out of bounds ends the run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from idm_fast.ops import native
from idm_fast.ops.registry import OPS

if reason := native.load_cpu():
    pytest.skip(f"no C++ extension: {reason}", allow_module_level=True)

from idm_fast import _C

CALLS = int(os.environ.get("IDM_FAST_FUZZ", "1500"))
REPEATED = "IDM_FAST_FUZZ" not in os.environ
NAMES = sorted(name for name, op in OPS.items() if "cpu" in op.implementations)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**62, 2**63 - 1)
NUMBERS = (0.0, -1.0, 1e300, float("inf"), float("nan"))


def instruction_sets() -> list[str]:
    """Those that this machine runs, the one in use first."""
    in_use, others = _C.instruction_set(), []
    for name in {"portable", "avx2", "avx512"} - {in_use}:
        try:
            _C.use_instruction_set(name)
        except RuntimeError:
            continue
        others.append(name)
    _C.use_instruction_set(in_use)
    return [in_use, *sorted(others)]


INSTRUCTION_SETS = instruction_sets()
CLEAN = (RuntimeError, ValueError, TypeError, NotImplementedError)


def normal(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)), dtype=torch.float64).to(dtype)


def coupling(rng: random.Random, names: str) -> list[Any]:
    shape = [rng.choice((1, 2, 3, 5, 16, 33)) for _ in range(rng.randrange(5))]
    stream = rng.choice((torch.float32, torch.float64))
    tensors = [normal(rng, *shape, dtype=rng.choice(FLOATS) if name == "F" else stream) for name in names]
    return [*tensors, torch.full(rng.choice(((), (1,), (1, 1))), rng.uniform(0.25, 1), dtype=rng.choice(FLOATS[:2]))]


class Projection:
    """Sizes of a sensing operator and what it acts on."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.dtype = rng, rng.choice(FLOATS)
        N, rows = rng.choice((1, 2, 4, 6, 16)), rng.choice((1, 2, 3, 8))
        self.height = rng.choice([h for h in range(1, N * rows + 1) if N * rows % h == 0])
        self.width, self.batch = N * rows // self.height, rng.choice((1, 2, 3))
        # More columns than rows can be passed too; nothing in the arithmetic forbids it.
        q = rng.choice((1, max(N // 2, 1), N, N + 1))
        self.y_shape = (self.batch, rows, q)
        matrix = normal(rng, N, q, dtype=self.dtype) / N**0.5
        self.operator = [matrix, torch.randperm(N * rows, generator=torch.Generator().manual_seed(rng.getrandbits(32)))]

    def image(self) -> Tensor:
        return normal(self.rng, self.batch, 1, self.height, self.width, dtype=self.dtype)

    def y(self) -> Tensor:
        return normal(self.rng, *self.y_shape, dtype=self.dtype)

    def step(self) -> list[Any]:
        abar = [torch.full((1,), self.rng.uniform(0.1, 0.9), dtype=self.dtype) for _ in range(2)]
        return [self.image(), self.image(), self.y(), *self.operator, *abar]


class Injector:
    """Features of c·r² channels and images of r times their size."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.dtype, self.r = rng, rng.choice(FLOATS), rng.choice((1, 2, 4))
        batch, c, height, width = (rng.choice((1, 2, 3, 5)) for _ in range(4))
        self.features, self.images = (batch, c * self.r**2, height, width), (batch, 1, height * self.r, width * self.r)
        self.c, self.parameters = c, rng.choice((self.dtype, torch.float32))

    def h(self) -> Tensor:
        return normal(self.rng, *self.features, dtype=self.dtype)

    def z(self) -> Tensor:
        return normal(self.rng, *self.images, dtype=self.dtype)

    def weight(self, out: int, inputs: int) -> Tensor:
        return normal(self.rng, out, inputs, 1, 1, dtype=self.parameters)

    def bias(self, out: int) -> Tensor:
        return normal(self.rng, out, dtype=self.parameters)


def inject(rng: random.Random, name: str) -> list[Any]:
    i = Injector(rng)
    if name == "inject_read":
        return [i.h(), i.weight(1, i.c), i.bias(1), i.r]
    if name == "inject_read_backward":
        return [i.z(), i.h(), i.weight(1, i.c), i.r, rng.choice((None, i.h()))]
    if name == "inject_write":
        return [i.h(), i.z(), i.z(), i.z(), i.weight(i.c, 3), i.bias(i.c), i.r]
    return [i.h(), i.z(), i.z(), i.z(), i.weight(i.c, 3), i.r]


def group_norm(rng: random.Random, backward: bool) -> list[Any]:
    dtype, groups = rng.choice(FLOATS), rng.choice((1, 2, 4))
    shape = [rng.choice((1, 2, 3)), groups * rng.choice((1, 2, 5)), *(rng.choice((1, 2, 7)) for _ in range(rng.randrange(3)))]
    x = normal(rng, *shape, dtype=dtype)
    weight, bias = (normal(rng, shape[1], dtype=rng.choice((dtype, torch.float32))) for _ in range(2))
    silu, out = rng.choice((True, False)), rng.choice(FLOATS)
    forward = [x, weight, bias, groups, 0.1, silu, out]
    if not backward:
        return forward
    _, mean, rstd = reference("group_norm_silu")(*forward)
    return [normal(rng, *shape, dtype=rng.choice((dtype, out))), x, weight, bias, mean, rstd, groups, silu]


def layer_norm(rng: random.Random, backward: bool) -> list[Any]:
    dtype = rng.choice(FLOATS)
    shape = [rng.choice((1, 2, 3, 7, 33)) for _ in range(rng.randrange(1, 4))]
    x = normal(rng, *shape, dtype=dtype)
    weight, bias = (normal(rng, shape[-1], dtype=rng.choice((dtype, torch.float32))) for _ in range(2))
    forward = [x, weight, bias, 0.1, rng.choice(FLOATS)]
    if not backward:
        return forward
    _, mean, rstd = reference("layer_norm")(*forward)
    return [normal(rng, *shape, dtype=dtype), x, weight, bias, mean, rstd]


def geglu(rng: random.Random, backward: bool) -> list[Any]:
    dtype = rng.choice(FLOATS)
    shape = [rng.choice((1, 2, 3, 17)) for _ in range(rng.randrange(1, 4))]
    h = normal(rng, *shape[:-1], 2 * shape[-1], dtype=dtype)
    return [normal(rng, *shape, dtype=dtype), h] if backward else [h]


VALID: dict[str, Callable[[random.Random], list[Any]]] = {
    "couple": lambda rng: coupling(rng, "Fx"),
    "decouple": lambda rng: coupling(rng, "yF"),
    "couple_backward": lambda rng: coupling(rng, "dFx"),
    "uncouple": lambda rng: coupling(rng, "yFd"),
    "uncouple_": lambda rng: coupling(rng, "yFd"),
    "measure": lambda rng: [(p := Projection(rng)).image(), *p.operator],
    "gram": lambda rng: [(p := Projection(rng)).image(), *p.operator],
    "adjoint": lambda rng: [(p := Projection(rng)).y(), *p.operator, p.height, p.width],
    "project_step": lambda rng: Projection(rng).step(),
    "project_step_backward": lambda rng: [(p := Projection(rng)).image(), *p.step()],
    **{name: lambda rng, name=name: inject(rng, name) for name in NAMES if name.startswith("inject_")},
    "group_norm_silu": lambda rng: group_norm(rng, False),
    "group_norm_silu_backward": lambda rng: group_norm(rng, True),
    "layer_norm": lambda rng: layer_norm(rng, False),
    "layer_norm_backward": lambda rng: layer_norm(rng, True),
    "geglu": lambda rng: geglu(rng, False),
    "geglu_backward": lambda rng: geglu(rng, True),
}
"""A valid call of each op."""


def another_shape(x: Tensor, rng: random.Random) -> Tensor:
    d = rng.randrange(x.dim()) if x.dim() else 0
    changes = [lambda: x[None], lambda: x[..., None], lambda: x.flatten(), lambda: x.new_empty(0)]
    if x.dim():
        size = x.shape[d]
        changes += [lambda: x.narrow(d, 0, 0), lambda: x.narrow(d, 0, max(size - 1, 0)), lambda: torch.cat([x, x], d)]
        changes += [lambda: x.transpose(d, 0)]
    if x.dim() and x.shape[d]:
        changes += [lambda: x.select(d, 0), lambda: x.narrow(d, 0, 1)]
    return rng.choice(changes)()


def another_layout(x: Tensor, rng: random.Random) -> Tensor:
    """The same values, lying in memory in another way."""
    d = rng.randrange(x.dim()) if x.dim() else 0
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x
    choices = [shifted]
    if x.dim():
        moved = x.movedim(d, -1).contiguous().movedim(-1, d)
        stepped = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        backwards = x.flip(d).contiguous().as_strided(x.shape, x.contiguous().stride())
        choices += [moved, stepped, moved.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else backwards.flip(d)]
    return rng.choice(choices)


def overlapping(x: Tensor, rng: random.Random) -> Tensor:
    """Many elements in one place."""
    return x.flatten()[:1].expand(x.numel()).view(x.shape) if x.numel() and x.dim() < 2 else x[:1].expand(x.shape)


def another_value(x: Tensor, rng: random.Random) -> Tensor:
    if not x.numel():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    place = rng.randrange(x.numel())
    if x.dtype == torch.int64:
        others = (-1, -x.numel(), x.numel(), 2**31, 2**62, -(2**63), 2**63 - 1, int(x.flatten()[(place + 1) % x.numel()]))
        x.view(-1)[place] = rng.choice(others)
    elif x.is_floating_point():
        x.view(-1)[place] = rng.choice((0.0, -1.0, float("inf"), float("nan")))
    return x


TENSOR_DAMAGE: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "shape": another_shape,
    "dtype": lambda x, rng: x.to(rng.choice(DTYPES)),
    "device": lambda x, rng: x.to("meta"),
    "layout": another_layout,
    "overlap": overlapping,
    "value": another_value,
}


def damaged(value: Any, kind: str, rng: random.Random) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta and kind in ("value", "layout", "overlap") else TENSOR_DAMAGE[kind](value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    return rng.choice(DTYPES)


def copy(arguments: list[Any]) -> list[Any]:
    """The same calls' arguments in memory of their own, lying as they lay."""
    return [torch.empty_like(a).copy_(a) if isinstance(a, Tensor) and not overlaps(a) else a for a in arguments]


def exact(value: Any) -> Any:
    return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


def overlaps(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def reference(name: str) -> Callable[..., Any]:
    """With the check in front of it: what is refused must not allocate, and a size that nobody has can take all memory."""
    op = OPS[name]

    def checked(*arguments: Any) -> Any:
        op.check(*arguments)
        return op.implementations["reference"][0](*arguments)

    return checked


def attempt(function: Callable[..., Any], arguments: list[Any]) -> list[Tensor] | Exception:
    try:
        with torch._C._DisableAutocast():
            result = function(*arguments)
    except Exception as error:
        return error
    return list(result) if isinstance(result, (tuple, list)) else [result]


def is_bijective(permutation: Tensor) -> bool:
    return torch.equal(permutation.sort().values, torch.arange(permutation.numel()))


def assert_close(name: str, got: Tensor, expected: Tensor, arguments: list[Any]) -> None:
    dtypes = [a.dtype for a in [*arguments, expected] if isinstance(a, Tensor) and a.is_floating_point()]
    if not expected.isfinite().all() or expected.dtype not in FLOATS:
        return
    # How close is the parity tests' business; here a wrong element, not a rounded one, is to be seen.
    tolerance = 256 * max(torch.finfo(dtype).eps for dtype in dtypes) * (1 + float(expected.double().abs().max()))
    assert (got.double() - expected.double()).abs().max() <= tolerance, name


@settings(max_examples=CALLS, derandomize=REPEATED, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**32 - 1),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    damages=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(sorted(TENSOR_DAMAGE))), max_size=2),
)
def test_a_native_op_returns_what_the_reference_returns_or_raises(
    name: str, seed: int, instruction_set: str, damages: list[tuple[int, str]]
) -> None:
    rng = random.Random(seed)
    arguments = VALID[name](rng)
    for place, kind in damages:
        place %= len(arguments)
        arguments[place] = damaged(arguments[place], kind, rng)
    for_reference = copy(arguments)
    before = copy(arguments)
    _C.use_instruction_set(instruction_set)
    got = attempt(OPS[name].implementations["cpu"][0], arguments)
    _C.use_instruction_set(INSTRUCTION_SETS[0])
    expected = attempt(reference(name), for_reference)

    if isinstance(got, Exception):
        assert isinstance(got, CLEAN) and str(got) and "INTERNAL ASSERT" not in str(got), got
        as_given = all(kind == "layout" and isinstance(arguments[place % len(arguments)], Tensor) for place, kind in damages)
        assert isinstance(expected, Exception) or not as_given, f"refuses what the reference takes: {got}"
        written: list[Tensor] = []
    else:
        refused = attempt(OPS[name].check, before)
        assert not isinstance(refused, Exception), f"takes what the other implementations refuse: {refused}"
        mixed = isinstance(expected, Exception)
        if mixed:
            # PyTorch's operations refuse some mixtures of dtypes that kernels read as easily.
            for_reference = [exact(a) for a in before]
            expected = attempt(reference(name), for_reference)
        if isinstance(expected, Exception) and any(isinstance(a, Tensor) and not a.numel() for a in before):
            # Nor do all of them know what nothing is: the gradient of a sum over nothing is zero.
            assert not any(g.any() for g in got), f"takes what the reference refuses: {expected}"
            return
        assert not isinstance(expected, Exception), f"takes what the reference refuses: {expected}"
        written = [arguments[0]] if name.endswith("_") else []
        assert [(g.shape, g.device) for g in got] == [(e.shape, e.device) for e in expected]
        assert mixed or [g.dtype for g in got] == [e.dtype for e in expected]
        defined = all(is_bijective(a) for a in arguments if isinstance(a, Tensor) and a.dtype == torch.int64)
        for g, e in zip([*got, *written], [*expected, *for_reference[: len(written)]], strict=True):
            if e.numel() and defined and not e.is_meta:
                assert_close(name, g, e, before)
    for now, was in zip(arguments, before, strict=True):
        if isinstance(now, Tensor) and not now.is_meta and not any(now is w for w in written):
            # As text, in which NaN equals NaN.
            assert str(now.tolist()) == str(was.tolist()), "an argument has changed"


def test_every_native_op_is_fuzzed() -> None:
    assert set(NAMES) <= VALID.keys()
