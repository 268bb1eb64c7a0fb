"""Every op refuses arguments that do not fit, before an implementation sees them: one after the other is damaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import backward_cases, cases
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry
from idm_fast.ops.bits import packed_bytes


def valid() -> dict[str, tuple]:
    """Arguments of each op."""
    found = {name: arguments for name, (_, arguments) in cases().items() if name != "group_norm"} | backward_cases()
    F, X, v = torch.randn(3, 5), torch.randint(-9, 9, (3, 5), dtype=torch.int32), torch.tensor([0.6])
    packed = torch.zeros(packed_bytes(15, 1), dtype=torch.uint8)
    return found | {
        "pack_bits": (torch.zeros(3, 5, dtype=torch.uint8), 1),
        "unpack_bits": (packed, 1, 15),
        "to_fixed": (F, 20),
        "from_fixed": (X, 20, torch.float32),
        "fixed_add": (F, X, 20, -1),
        "fixed_couple": (F, X, v, 20, 1),
        "fixed_decouple": (X, F, packed, v, 20, 1),
        "fixed_uncouple": (X, F, F, packed, v, 20, 1),
    }


def another_shape(x: Tensor) -> Tensor:
    """One dimension, of more elements and an odd number of them."""
    return torch.cat([x.flatten(), x.flatten(), x.flatten()[:1]])


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": another_shape,
    "dimensions": lambda x: torch.stack([x, x]),
    "dtype": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
}
ANY_SHAPE = {"pack_bits", "to_fixed", "from_fixed"}
MORE_DIMENSIONS = ANY_SHAPE | {"geglu", "layer_norm"}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", valid())
def test_an_argument_that_does_not_fit_is_refused(name: str, kind: str) -> None:
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in valid()[name])
    registry.OPS[name].check(*arguments)
    tensors = [k for k, a in enumerate(arguments) if isinstance(a, Tensor)]
    if kind == "device" and len(tensors) == 1:
        tensors = []  # a single tensor may lie anywhere
    for k in tensors:
        if k == 0 and (kind == "shape" and name in ANY_SHAPE or kind == "dimensions" and name in MORE_DIMENSIONS):
            continue
        damaged = [*arguments[:k], DAMAGE[kind](arguments[k]), *arguments[k + 1 :]]
        with pytest.raises(ValueError):
            registry.OPS[name].check(*damaged)


NUMBERS = {
    "adjoint": ((3, -6), (4, 2**62)),
    "group_norm_silu": ((3, 0), (3, -1), (3, 4), (6, torch.int32)),
    "group_norm_silu_backward": ((6, 0), (6, 5)),
    "inject_read": ((3, 0), (3, -2), (3, 3)),
    "inject_write": ((6, 0), (6, -2), (6, 2**31)),
    "inject_uncouple_": ((9, 0), (9, 4)),
    "layer_norm": ((4, torch.int64),),
    "pack_bits": ((1, 0), (1, 3), (1, 8)),
    "unpack_bits": ((1, 0), (2, 25), (2, -1)),
    "from_fixed": ((1, 31), (1, -1), (2, torch.int32)),
    "fixed_add": ((2, 31), (3, 0)),
    "fixed_couple": ((3, -1), (4, 3)),
    "fixed_decouple": ((5, 0), (5, 2)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_refused(name: str) -> None:
    for place, value in NUMBERS[name]:
        damaged = [*valid()[name][:place], value, *valid()[name][place + 1 :]]
        with pytest.raises(ValueError):
            registry.OPS[name].check(*damaged)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_what_is_refused_does_not_reach_an_implementation_in_python(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    def reached(*arguments: Any) -> None:
        raise AssertionError("the implementation was called")

    for name, arguments in valid().items():
        monkeypatch.setitem(registry.OPS[name].implementations, implementation, (reached, ("cpu",)))
        monkeypatch.setattr(registry, "_choice", implementation)
        with torch.no_grad(), pytest.raises(ValueError):
            registry.OPS[name].overload(DAMAGE["dtype"](arguments[0]), *arguments[1:])


@pytest.mark.parametrize("entry", [-1, 48, 2**40])
@pytest.mark.parametrize("name", ["measure", "adjoint", "gram", "project_step", "project_step_backward"])
def test_a_permutation_out_of_range_is_an_error_of_the_reference_too(name: str, entry: int) -> None:
    arguments = valid()[name]
    permutation = next(a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.int64)
    permutation[17] = entry
    with ops.use("reference"), torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of"):
        registry.OPS[name].overload(*arguments)


def test_every_op_is_damaged() -> None:
    assert valid().keys() == registry.OPS.keys()
