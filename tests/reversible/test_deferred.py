"""Bodies whose output the coupling makes on the fly (`DeferringBody`): the same numbers, wherever a chain may ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from idm_fast import ReversibleSequence, ops
from idm_fast.ops.coupling import couple_backward_op
from idm_fast.reversible.deferred import Deferred, DeferringBody

SHAPE = (2, 5, 7)


@dataclass(frozen=True)
class Scaled(Deferred):
    """F = a·h."""

    tensors: tuple[Tensor, Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.tensors[0].shape

    def make(self) -> Tensor:
        return self.tensors[0] * self.tensors[1]

    def detach(self) -> Scaled:
        h, a = self.tensors
        return Scaled((h.detach(), a.detach()))

    def couple(self, x2: Tensor, v: Tensor) -> Tensor:
        return ops.couple(self.make(), x2, v)

    def inverse(self, y1: Tensor, v: Tensor) -> Tensor:
        return ops.decouple(y1, self.make(), v)

    def backward(self, d1: Tensor, x2: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        dF, dx2, dv = couple_backward_op(d1, self.make(), x2, v)
        h, a = self.tensors
        return (dF * a, (dF * h).sum().reshape(1)), dx2, dv

    def uncouple(self, y1: Tensor, d1: Tensor, v: Tensor, inplace: bool) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        x2 = self.inverse(y1, v)
        return x2, *self.backward(d1, x2, v)


class Body(DeferringBody):
    """a·tanh(x + b·skip), and counts how often its output was deferred."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.3, 0.7))
        self.deferrals = 0

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.tanh(x + self.b * skip) * self.a

    def deferred(self, x: Tensor, skip: Tensor) -> Scaled:
        self.deferrals += 1
        return Scaled((torch.tanh(x + self.b * skip), self.a))


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def gradients(loss: Callable[[Tensor, Tensor], Tensor], recovery: str) -> tuple[list[Tensor], list[Body]]:
    """Of the loss in the inputs, a skip and every parameter."""
    bodies = [Body() for _ in range(4)]
    seq = ReversibleSequence(bodies, stream_dtype=torch.float64, recovery=recovery)
    inputs = [draw(seed) for seed in range(3)]
    found = torch.autograd.grad(loss(*seq(*inputs)), [*inputs, *seq.parameters()], allow_unused=True)
    return [g for g in found if g is not None], bodies


@pytest.mark.parametrize("recovery", ["invert", "keep"])
@pytest.mark.parametrize("loss", [lambda y1, y2: (y1 * y2).sin().sum(), lambda y1, y2: y2.square().sum()], ids=["both", "y2"])
def test_deferred_outputs_give_the_gradients_of_plain_autograd(loss: Callable, recovery: str) -> None:
    expected, stored = gradients(loss, "store")
    found, deferring = gradients(loss, recovery)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert [body.deferrals for body in deferring] == [2] * 4  # in forward, and in the replay
    assert [body.deferrals for body in stored] == [0] * 4


def test_additive_couplings_and_fixed_point_streams_get_the_output_itself() -> None:
    for options in ({"coupling": "additive"}, {"stream_dtype": torch.int32}):
        bodies = [Body() for _ in range(2)]
        y1, y2 = ReversibleSequence(bodies, **options)(*(draw(seed) for seed in range(3)))
        (y1 + y2).sum().backward()
        assert all(body.deferrals == 0 and body.a.grad is not None for body in bodies)


def test_a_body_that_is_hooked_is_called_and_its_hook_sees_its_output() -> None:
    body, seen = Body(), []
    body.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    y1, _ = ReversibleSequence([body], stream_dtype=torch.float64)(*(draw(seed) for seed in range(3)))
    y1.sum().backward()
    assert body.deferrals == 0
    assert seen == [SHAPE] * 2


def test_a_deferred_output_of_another_shape_is_refused_with_the_name_of_the_body() -> None:
    class Halving(Body):
        def deferred(self, x: Tensor, skip: Tensor) -> Scaled:
            return Scaled((x[:1], self.a))

    with pytest.raises(ValueError, match="Halving"):
        ReversibleSequence([Halving()], stream_dtype=torch.float64)(*(draw(seed) for seed in range(3)))
