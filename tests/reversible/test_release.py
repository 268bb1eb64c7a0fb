"""What a chain lets go of: after a step, after an error on the way, and while its graph is retained."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

from idm_fast import ReversibleSequence
from idm_fast.memory.count import AllocationCounter
from idm_fast.reversible import kept, recompute


class Body(nn.Module):
    """Fails on request in one of its runs: 1 is forward, 2 the replay."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.run, self.fails_in = 0, 0

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        self.run += 1
        if self.run == self.fails_in:
            raise MemoryError
        return self.inside(x) + kept(torch.sin, skip)


def chain(layers: int = 4) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([Body() for _ in range(layers)])


def tensors_alive() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance looks at deprecated objects of torch, too
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def step(net: ReversibleSequence) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    skip = x.exp()
    try:
        (net(x, x, skip)[0].sum() + recompute(torch.tanh, skip).sum()).backward()
    except MemoryError:
        pass
    for body in net.bodies:
        body.run = 0
    net.zero_grad(set_to_none=True)


def test_thirty_steps_leave_no_tensor_behind_even_without_the_garbage_collector() -> None:
    net = chain()
    step(net)
    before = tensors_alive()
    gc.disable()
    try:
        for _ in range(30):
            step(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sum(isinstance(thing, Tensor) for thing in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("fails_in", [1, 2])
def test_steps_that_fail_leave_no_tensor_behind(layer: int, fails_in: int) -> None:
    """As one does that runs out of memory and is tried again with a smaller batch."""
    net = chain()
    net.bodies[layer].fails_in = fails_in
    step(net)
    before = tensors_alive()
    for _ in range(3):
        step(net)
    assert tensors_alive() <= before, "fewer are another test's, let go in the meantime"


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_that_retains_its_graph_keeps_no_activations(recomputed: bool) -> None:
    """Further layers change neither its peak nor what is held after it, besides the stored skip's share of each."""

    def measured(layers: int) -> tuple[int, int]:
        net, x = chain(layers), torch.randn(5, 8)
        body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        counter = AllocationCounter()
        counter.ignore([x, *net.parameters(), *body.parameters()])
        with counter:
            y = x
            for _ in range(layers if recomputed else 0):
                y = recompute(body, y)
            loss = y.sum() if recomputed else net(x, x, x)[0].sum()
            loss.backward(retain_graph=True)
            moment = counter.mark()
            after = torch.zeros(())
        gradients = [p.grad for p in (*net.parameters(), *body.parameters()) if p.grad is not None]
        peak, held = counter.summarize([*gradients, after], moment)
        return peak, held

    (short_peak, short_held), (long_peak, long_held) = measured(4), measured(12)
    stored = 8 * 5 * 8 * 4  # eight parts' inputs, or what `kept` gave in eight layers
    assert long_held - short_held <= stored
    assert long_peak - short_peak <= stored
