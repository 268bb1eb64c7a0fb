"""What autograd, modes and transforms see of an op, and what its short way to the implementation must not lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import cases
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from idm_fast import ops
from idm_fast.ops import registry

WITHOUT_SECOND_DERIVATIVES = {"geglu", "group_norm", "group_norm_silu", "project_step"}


def given(gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, requires_grad=gradient), torch.ones(4), torch.zeros(4)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", [True, False])
def test_a_mode_sees_the_op_and_nothing_of_its_implementation(gradient: bool) -> None:
    ops.layer_norm(*given(gradient))  # the way without a mode is known by now
    with Calls() as calls:
        ops.layer_norm(*given(gradient))
    assert calls.names.count("idm_fast.layer_norm.default") == 1
    assert "aten.native_layer_norm.default" not in calls.names


def test_saved_tensor_hooks_get_the_inputs_and_the_statistics() -> None:
    shapes = []

    def pack(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    x, weight, bias = given()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, mean, rstd = registry.OPS["layer_norm"].overload(x, weight, bias, 1e-5, x.dtype)
    assert shapes == [(3, 4), (4,), (4,), (3, 1), (3, 1)]
    assert out.requires_grad and not (mean.requires_grad or rstd.requires_grad)


def test_transforms_that_the_gradient_cannot_serve_are_refused_as_by_autograd() -> None:
    x, weight, bias = given(False)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: ops.layer_norm(x, weight, bias).sum())(x)


def test_forward_mode_is_refused_where_it_would_be_lost() -> None:
    x, weight, bias = given(False)
    with pytest.raises(NotImplementedError, match="layer_norm has no derivative in forward mode"):
        torch.func.jvp(lambda x: ops.layer_norm(x, weight, bias), (x,), (x,))
    with forward_ad.dual_level():
        assert ops.layer_norm(x, weight, bias).shape == x.shape, "a level in which nothing has a tangent"
        with pytest.raises(NotImplementedError, match="forward mode"):
            ops.layer_norm(forward_ad.make_dual(x, x), weight, bias)


@pytest.mark.parametrize("autocast", [True, False])
def test_implementations_record_nothing_and_know_no_autocast(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def implementation(h: Tensor) -> Tensor:
        product = h @ h.mT
        found.append((product.requires_grad, product.dtype))
        return h[..., ::2].clone()

    monkeypatch.setitem(registry.OPS["geglu"].implementations, "cpu", (implementation, ("cpu",)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for gradient in (True, False):
            ops.geglu(torch.zeros(2, 4, requires_grad=gradient))
        with torch.no_grad():
            ops.geglu(torch.zeros(2, 4, requires_grad=True))
    assert found == [(False, torch.float32)] * 3


def test_an_implementation_is_chosen_once_and_again_when_the_choice_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    op, asked = registry.OPS["geglu"], []
    choose = type(op).choose_by
    monkeypatch.setattr(type(op), "choose_by", lambda self, by, device: asked.append(device) or choose(self, by, device))
    monkeypatch.setitem(op.implementations, "cpu", (lambda h: torch.full_like(h[..., ::2], 7.0), ("cpu",)))
    h = torch.zeros(2, 4)
    assert all((ops.geglu(h) == 7).all() for _ in range(3)) and asked == ["cpu"]
    with ops.use("reference"):
        assert (ops.geglu(h) == 0).all()
    monkeypatch.setitem(op.implementations, "cpu", (lambda h: torch.full_like(h[..., ::2], 8.0), ("cpu",)))
    assert (ops.geglu(h) == 8).all()


@pytest.mark.parametrize("name", cases())
def test_second_derivatives_are_right_or_refused_whatever_the_implementation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd cannot see through a kernel; what it took for constants would be missing without a word."""
    for op in registry.OPS.values():
        reference = op.implementations["reference"][0]

        def kernel(*args: Any, reference: Any = reference) -> Any:
            with torch.no_grad():
                return reference(*args)

        monkeypatch.setitem(op.implementations, "cpu", (kernel, ("cpu",)))
    function, arguments = cases()[name]
    if name in WITHOUT_SECOND_DERIVATIVES:
        with pytest.raises(RuntimeError):
            torch.autograd.gradgradcheck(function, arguments, fast_mode=True)
    else:
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)
