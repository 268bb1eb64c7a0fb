"""The engine against plain autograd on the same modules: gradients, replay, numbers, and what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ReversibleSequence, WiredSequence
from idm_fast.memory.count import AllocationCounter

SHAPE = (2, 8, 6, 7)


class Body(nn.Module):
    """Residual GroupNorm–SiLU–convolution, with a side input and dropout on request."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.runs = 0

    def forward(self, x: Tensor, skip: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        self.runs += 1
        h = self.dropout(self.conv(F.silu(self.norm(x))))
        h = h if skip is None else h + skip.tanh()
        return x + (h if scale is None else h * scale)


def chain(layers: int = 5, dropout: float = 0.0, **options: object) -> ReversibleSequence:
    torch.manual_seed(0)
    made = ReversibleSequence([Body(dropout) for _ in range(layers)], **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def streams(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.randn(SHAPE, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2))  # type: ignore


def compare(net: ReversibleSequence, function: Callable[[], tuple[Tensor, list[Tensor]]], tolerance: float = 1e-10) -> None:
    """`function` → (loss, inputs); its gradients by every recovery must be those of plain autograd."""
    gradients = {}
    for recovery in ("store", "invert", "keep"):
        net.recovery = recovery
        torch.manual_seed(7)
        loss, inputs = function()
        wanted = [t for t in [*inputs, *net.parameters()] if t.requires_grad]
        gradients[recovery] = torch.autograd.grad(loss, wanted, allow_unused=True)
    for recovery in ("invert", "keep"):
        for found, expected in zip(gradients[recovery], gradients["store"], strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_inputs_parameters_and_v_are_those_of_plain_autograd() -> None:
    net, (x1, x2) = chain(), streams()

    def run():
        y1, y2 = net(x1, x2)
        return y1.square().sum() + 2 * y2.sin().sum(), [x1, x2]

    compare(net, run)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("coupling", ["convex", "additive"])
@pytest.mark.parametrize("layers", [0, 1, 2, 6])
def test_chains_of_any_length_and_coupling(coupling: str, layers: int) -> None:
    net, (x1, x2) = chain(layers, coupling=coupling), streams()

    def run():
        y1, y2 = net(x1, x2)
        return (y1 * y2).sum(), [x1, x2]

    compare(net, run)


@pytest.mark.parametrize("used", [0, 1])
def test_loss_on_one_of_the_two_outputs(used: int) -> None:
    net, (x1, x2) = chain(), streams()
    compare(net, lambda: (net(x1, x2)[used].square().sum(), [x1, x2]))


def test_side_inputs_carry_a_graph_whose_gradient_comes_back_in_one_traversal() -> None:
    net, (x1, x2) = chain(), streams()
    source = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(1, dtype=torch.float64, requires_grad=True)
    traversals = 0

    def count(gradient: Tensor) -> None:
        nonlocal traversals
        traversals += 1

    def run():
        skip = source.exp()
        skip.register_hook(count)
        y1, y2 = net(x1, x2, extras={1: (skip,), 3: (skip,)}, scale=scale)
        return (y1 * y2).sum(), [x1, x2, source, scale]

    compare(net, run)
    assert traversals == 3  # once for each of the three recoveries


def test_dropout_draws_the_same_masks_again_and_leaves_the_generator_alone() -> None:
    net, (x1, x2) = chain(dropout=0.3), streams()
    after = {}

    def run():
        y1, y2 = net(x1, x2)
        return (y1 + y2).square().sum(), [x1, x2]

    compare(net, run)
    for recovery in ("store", "invert"):
        net.recovery = recovery
        torch.manual_seed(7)
        run()[0].backward()
        after[recovery] = torch.rand(3)
    assert torch.equal(after["store"], after["invert"])


def test_two_forwards_before_one_backward() -> None:
    net, (x1, x2) = chain(dropout=0.3), streams()

    def run():
        first, second = net(x1, x2), net(x2, x1)
        return (first[0] * second[1]).sum(), [x1, x2]

    compare(net, run)


def test_backward_twice_with_retain_graph_gives_the_same_gradients() -> None:
    net, (x1, x2) = chain(), streams()
    loss = net(x1, x2)[0].square().sum()
    first = torch.autograd.grad(loss, [x1, *net.parameters()], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, [x1, *net.parameters()], allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, [x1])


def test_one_module_in_several_places_gets_the_sum_and_its_hook_fires_once() -> None:
    torch.manual_seed(0)
    body, (x1, x2) = Body(), streams()
    net = ReversibleSequence([body, Body(), body]).double()
    fired = []
    body.conv.weight.register_hook(lambda g: fired.append(1))
    compare(net, lambda: ((net(x1, x2)[0] ** 2).sum(), [x1, x2]))
    assert len(fired) == 3


@pytest.mark.parametrize("frozen", ["parameters", "first body", "inputs"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    net, (x1, x2) = chain(), streams(frozen != "inputs")
    for module in {"parameters": [net], "first body": [net.bodies[0]], "inputs": []}[frozen]:
        module.requires_grad_(False)
    compare(net, lambda: ((net(x1, x2)[0] * 2).sin().sum(), [x1, x2]))


def test_caller_may_keep_using_its_input_and_the_outputs() -> None:
    net, (x1, x2) = chain(), streams()

    def run():
        y1, y2 = net(x1, x2)
        return (y1 * x1).sum() + (y2 * x2 * y1).sum(), [x1, x2]

    compare(net, run)


def test_batch_norm_statistics_move_once_a_step() -> None:
    def run(recovery: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        bodies = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(3)]
        net = ReversibleSequence(bodies, recovery=recovery).double()
        x1, x2 = streams()
        net(x1, x2)[0].square().sum().backward()
        return dict(net.named_buffers())

    stored, inverted = run("store"), run("invert")
    for name, value in stored.items():
        assert torch.equal(inverted[name], value), name
    assert int(inverted["bodies.0.1.num_batches_tracked"]) == 1


def test_autocast_is_put_back_when_backward_runs_outside_it() -> None:
    net = chain(11, stream_dtype=torch.float64).float()
    x1, x2 = (x.detach().float() for x in streams())
    gradients, recovered = {}, []
    net.bodies[0].register_forward_pre_hook(lambda m, args: recovered.append(args[0].detach().clone()))
    for recovery in ("store", "invert"):
        net.recovery = recovery
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x1, x2)[0].square().sum()
        gradients[recovery] = torch.autograd.grad(loss, list(net.parameters()))
    # float64 streams recover the first body's input, so a replay in bfloat16 rounds as the forward pass did.
    torch.testing.assert_close(recovered[-1], recovered[0], rtol=0, atol=1e-6)
    for found, expected in zip(gradients["invert"], gradients["store"], strict=True):
        assert (found - expected).norm() <= 2**-9 * expected.norm()


def test_deep_chain_with_double_streams_recovers_its_input_to_1e_12_with_bfloat16_bodies() -> None:
    net = chain(32, stream_dtype=torch.float64).float().eval()
    with torch.no_grad():
        for v in net.v:
            v.fill_(0.5)
    x1, x2 = (x.detach().float() for x in streams())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y1, y2 = net(x1, x2, body_dtype=torch.float32)
        z1, z2 = net.inverse(y1, y2, body_dtype=torch.float32)
    assert y1.dtype == torch.float64
    assert max((z1 - x1).abs().max(), (z2 - x2).abs().max()) <= 1e-12 * max(x1.abs().max(), x2.abs().max())


@pytest.mark.parametrize(("layers", "bound"), [(4, 4e-6), (8, 7e-5), (11, 6e-4)])
def test_float32_streams_recover_the_input_within_ten_times_the_measured_drift(layers: int, bound: float) -> None:
    net = chain(layers).float()
    x1, x2 = (x.detach().float() for x in streams())
    with torch.no_grad():
        for v in net.v:
            v.fill_(0.5)
        z1, _ = net.inverse(*net(x1, x2))
    assert (z1 - x1).abs().max() <= bound


def test_memory_of_a_chain_does_not_grow_with_its_length() -> None:
    def held_and_peak(layers: int, recovery: str) -> tuple[int, int]:
        net, (x1, x2) = chain(layers, recovery=recovery, preserve_rng_state=False), streams(False)
        counter = AllocationCounter()
        counter.ignore([x1, x2, *net.parameters()])
        with counter:
            loss = net(x1, x2)[0].sum()
            moment = counter.mark()
            loss.backward()
        peak, held = counter.summarize([p.grad for p in net.parameters() if p.grad is not None], moment)
        return held, peak

    short, long = held_and_peak(4, "invert"), held_and_peak(16, "invert")
    assert short[0] == long[0]
    assert long[1] <= 1.02 * short[1]
    assert held_and_peak(16, "store")[1] > 4 * long[1]


def test_every_body_runs_twice_a_step() -> None:
    net, (x1, x2) = chain(), streams()
    net(x1, x2)[0].sum().backward()
    assert [body.runs for body in net.bodies] == [2] * 5


@pytest.mark.parametrize("coupling", ["convex", "additive"])
def test_inverse_is_public_and_exact(coupling: str) -> None:
    net, (x1, x2) = chain(coupling=coupling), streams(False)
    skip = torch.randn(SHAPE, dtype=torch.float64)
    z1, z2 = net.inverse(*net(x1, x2, extras={2: (skip,)}), extras={2: (skip,)})
    torch.testing.assert_close((z1, z2), (x1, x2), rtol=1e-11, atol=1e-11)
    assert not z1.requires_grad


def test_chains_nest_in_each_other_and_in_torch_checkpoint() -> None:
    inner = WiredSequence([Body(), Body()]).double()
    torch.manual_seed(0)
    outer, (x1, x2) = ReversibleSequence([inner, Body(), inner]).double(), streams()

    def run():
        y1, y2 = torch.utils.checkpoint.checkpoint(outer, x1, x2, use_reentrant=False)
        return (y1 * y2).sum(), [x1, x2]

    compare(outer, run)


def test_gradcheck_of_a_whole_chain() -> None:
    torch.manual_seed(0)
    net = ReversibleSequence([nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)]).double()
    x1, x2 = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: net(a[0], a[1]), (x1, x2, *net.parameters()))


def test_wired_sequence_is_the_wiring_written_out() -> None:
    net = WiredSequence([Body() for _ in range(3)]).double()
    with torch.no_grad():
        net.input_scale.fill_(0.7)
        net.merge_scale.fill_(0.3)
    x, _ = streams()
    x1, x2 = x, 0.7 * x
    for body, v in zip(net.chain.bodies, net.chain.v, strict=True):
        x1, x2 = (1 - v) * body(x1) + v * x2, x1
    torch.testing.assert_close(net(x), x1 + 0.3 * x2)


def test_second_derivatives_are_refused_with_the_remedy() -> None:
    net, (x1, x2) = chain(), streams()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(net(x1, x2)[0].square().sum(), x1, create_graph=True)


def test_copies_and_pickles() -> None:
    net, (x1, x2) = chain(), streams()
    again = copy.deepcopy(net)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x1, x2), net(x1, x2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_streams_are_refused_with_the_reason(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="cannot be inverted"):
        ReversibleSequence([Body()], stream_dtype=dtype)


def test_v_at_zero_is_refused_by_name() -> None:
    net, (x1, x2) = chain(), streams()
    with torch.no_grad():
        net.v[2].zero_()
    with pytest.raises(ValueError, match="v.2: "):
        net(x1, x2)


def test_body_that_changes_the_shape_is_named() -> None:
    net = ReversibleSequence([Body(), nn.Conv2d(8, 4, 1)])
    with pytest.raises(ValueError, match=r"body 1 \(Conv2d\) turned"):
        net(torch.zeros(SHAPE), torch.zeros(SHAPE))


def test_body_that_changes_its_input_in_place_is_named() -> None:
    net = ReversibleSequence([nn.Identity(), nn.ReLU(inplace=True)])
    with pytest.raises(RuntimeError, match=r"body 1 \(ReLU\) changed its input in place"):
        net(torch.randn(SHAPE), torch.randn(SHAPE))


def test_body_that_does_something_else_the_second_time_is_named() -> None:
    class Fickle(Body):
        def forward(self, x: Tensor) -> Tensor:
            first = self.runs == 0
            return super().forward(x) if first else super().forward(x).sin()

    net, (x1, x2) = ReversibleSequence([Body(), Fickle()]).double(), streams()
    with pytest.raises(RuntimeError, match=r"body 1 \(Fickle\) kept .* when it was run again"):
        net(x1, x2)[0].sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: net(x, x[:1]), "two streams must have one shape"),
        (lambda net, x: net(x, x, extras={5: (x,)}), r"extras: \[5\] are no layers"),
        (lambda net, x: ReversibleSequence([], coupling="odd"), "coupling: 'odd'"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(chain(), streams()[0])


def test_reversible_layers_do_not_import_diffusers() -> None:
    code = "import sys, idm_fast.reversible; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
