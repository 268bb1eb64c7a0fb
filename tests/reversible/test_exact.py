"""Fixed-point streams: recovered to the bit where floating point cannot be inverted, with the gradients of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ReversibleSequence, WiredSequence, ops
from idm_fast.memory.count import AllocationCounter, count_step

SHAPE = (2, 8, 5, 7)
BFLOAT16_ROUNDING = 2**-8


class Body(nn.Module):
    """Residual GroupNorm–SiLU–convolution."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.dropout(self.conv(F.silu(self.norm(x))))
        return x + (h if skip is None else h + skip.tanh())


def chain(layers: int = 5, v: float | None = None, dropout: float = 0.0, **options: object) -> ReversibleSequence:
    torch.manual_seed(0)
    net = ReversibleSequence([Body(dropout) for _ in range(layers)], **{"stream_dtype": torch.int32, **options})
    with torch.no_grad():
        for weight in net.v:
            weight.fill_(v) if v is not None else weight.uniform_(0.25, 1)
    return net


def streams(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_(requires_grad) for _ in range(2))
    return x1, x2


def autocast(dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def record_inputs(net: ReversibleSequence) -> list[Tensor]:
    """Filled with what each body is given, in the order of the calls."""
    seen: list[Tensor] = []
    for body in net.bodies:
        body.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    return seen


def gradients(net: ReversibleSequence, recovery: str, run: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    net.recovery = recovery
    torch.manual_seed(7)
    return list(torch.autograd.grad(run(), [*inputs, *net.parameters()], allow_unused=True))


@pytest.mark.parametrize("body", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("v", "min_v"), [(0.25, 0.25), (0.3, 0.25), (0.5, 0.5), (0.5, 0.25), (0.9, 0.5), (1.0, 0.5)])
def test_every_body_of_64_sees_its_input_again_to_the_bit(v: float, min_v: float, body: torch.dtype) -> None:
    net, (x1, x2) = chain(64, v, min_v=min_v), streams(requires_grad=True)
    seen = record_inputs(net)
    with autocast(body):
        loss = net(x1, x2)[0].square().mean()
    loss.backward()
    assert len(seen) == 2 * 64
    for first, again in zip(seen[:64], reversed(seen[64:]), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("body", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coupling", ["convex", "additive"])
def test_inverse_exact_returns_the_inputs_of_64_layers_to_the_bit(coupling: str, body: torch.dtype) -> None:
    net, (x1, x2) = chain(64, coupling=coupling, fraction_bits=16), streams()
    extras = {3: (torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)),)}
    if coupling == "additive":  # residual bodies would double the streams at every layer, beyond any range
        net.bodies = nn.ModuleList(nn.Sequential(body.norm, body.conv) for body in net.bodies)
        extras = {}
    with autocast(body):
        outputs = net.run_exact(x1, x2, extras=extras)
        z1, z2 = net.inverse_exact(outputs, extras=extras)
        with torch.no_grad():
            y1, y2 = net(x1, x2, extras=extras)
    for found, given in ((z1, x1), (z2, x2)):
        assert torch.equal(found, torch.round(given * 2**16) / 2**16)
    for found, expected in zip(outputs.values(), (y1, y2), strict=True):
        assert torch.equal(found, expected)
    assert len(outputs.codes) == (64 if coupling == "convex" else 0)


@pytest.mark.parametrize("coupling", ["convex", "additive"])
@pytest.mark.parametrize("recovery", ["invert", "keep"])
def test_gradients_are_those_of_plain_autograd_through_the_same_rounding(recovery: str, coupling: str) -> None:
    net = chain(6, dropout=0.3, coupling=coupling).double()
    x1, x2 = streams(torch.float64, requires_grad=True)
    source = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        y1, y2 = net(x1, x2, extras={1: (source.exp(),), 4: (source.exp(),)})
        return y1.square().sum() + 2 * y2.sin().sum()

    expected = gradients(net, "store", run, [x1, x2, source])
    found = gradients(net, recovery, run, [x1, x2, source])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_plain_autograd_through_the_rounding_is_the_wiring_with_the_rounding_taken_for_the_identity() -> None:
    net, (x1, x2) = chain(4, recovery="store").double(), streams(torch.float64, requires_grad=True)

    def rounded(x: Tensor) -> Tensor:
        return x + (torch.round(x * 2**20) / 2**20 - x).detach()

    def written_out() -> Tensor:
        y1, y2 = rounded(x1), rounded(x2)
        for body, v in zip(net.bodies, net.v, strict=True):
            y1, y2 = (1 - v) * body(y1) + v * y2, y1
        return (y1 * y2).sum()

    wanted = [x1, x2, *net.parameters()]
    found = torch.autograd.grad(torch.mul(*net(x1, x2)).sum(), wanted)
    expected = torch.autograd.grad(written_out(), wanted)
    # A rounding of one unit a layer is all that the two differ in.
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 100 * 2**-20 * b.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.int32, 0.0), (torch.float64, BFLOAT16_ROUNDING)])
def test_gradients_of_32_bfloat16_bodies_are_those_of_store(dtype: torch.dtype, tolerance: float) -> None:
    net, (x1, x2) = chain(32, 0.5, stream_dtype=dtype), streams(requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y1, y2 = net(x1, x2)
        return (y1 * y2).sum()

    # Another implementation would sum dv in another order, and equal means equal here.
    with ops.use("reference"):
        expected = gradients(net, "store", run, [x1, x2])
        for found, wanted in zip(gradients(net, "invert", run, [x1, x2]), expected, strict=True):
            assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_stored_are_the_last_streams_and_the_packed_bits() -> None:
    def held(layers: int, run: Callable = lambda net, *x: net(*x), **options: object) -> int:
        net, (x1, x2) = chain(layers, 0.5, preserve_rng_state=False, **options), streams()
        counter = AllocationCounter()
        counter.ignore([x1, x2, *net.parameters()])
        with counter:
            loss = run(net, x1, x2)[0].sum()
            moment = counter.mark()
        del loss
        return counter.summarize([], moment)[1]

    numel, the_loss = torch.Size(SHAPE).numel(), 4
    for min_v, bits in ((0.25, 2), (0.5, 1)):
        for layers in (3, 12):
            assert held(layers, min_v=min_v) == the_loss + 2 * 4 * numel + layers * (numel * bits // 8)
    assert held(12, coupling="additive") == the_loss + 2 * 4 * numel
    assert held(12, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)) == the_loss


def test_backward_needs_no_more_than_the_packed_bits_for_further_layers() -> None:
    def peak(layers: int) -> int:
        net, (x1, x2) = chain(layers, 0.5, preserve_rng_state=False), streams()
        return count_step(lambda: net(x1, x2)[0].sum(), net.parameters(), (x1, x2)).peak_bytes

    assert peak(24) - peak(12) == 12 * torch.Size(SHAPE).numel() * 2 // 8


def test_chains_nest_in_each_other_and_in_torch_checkpoint() -> None:
    torch.manual_seed(0)
    inner = WiredSequence([Body(), Body()], stream_dtype=torch.int32)
    outer = ReversibleSequence([inner, Body(), inner], stream_dtype=torch.int32).double()
    x1, x2 = streams(torch.float64, requires_grad=True)

    def run() -> Tensor:
        y1, y2 = torch.utils.checkpoint.checkpoint(outer, x1, x2, use_reentrant=False)
        return (y1 * y2).sum()

    expected = gradients(outer, "store", run, [x1, x2])
    found = gradients(outer, "invert", run, [x1, x2])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_backward_twice_and_of_the_last_layers_alone() -> None:
    net, (x1, x2) = chain(), streams(requires_grad=True)
    loss = net(x1, x2)[0].square().sum()
    first = torch.autograd.grad(loss, [x1, *net.parameters()], retain_graph=True)
    again = torch.autograd.grad(loss, [x1, *net.parameters()], retain_graph=True)
    early = torch.autograd.grad(loss, list(net.bodies[1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    wanted = [g for g, p in zip(first[1:], net.parameters(), strict=True) if any(p is q for q in net.bodies[1].parameters())]
    assert all(torch.equal(a, b) for a, b in zip(early, wanted, strict=True))


def test_layers_that_no_gradient_reaches_are_inverted_on_the_way() -> None:
    net, (x1, x2) = chain().requires_grad_(False), streams()
    net.bodies[1].requires_grad_(True)
    net.bodies[2].register_forward_hook(lambda m, args, F: F.detach())
    seen = record_inputs(net)
    wanted = list(net.bodies[1].parameters())
    found = torch.autograd.grad(net(x1, x2)[0].square().sum(), wanted)
    assert torch.equal(seen[1], seen[-1])  # run again last, layer 0 being frozen
    assert len(seen) == 5 + 4
    net.recovery = "store"
    assert all(map(torch.equal, found, torch.autograd.grad(net(x1, x2)[0].square().sum(), wanted)))


def test_streams_keep_their_memory_format_so_that_bodies_run_the_same_kernels() -> None:
    net = chain(4, 0.5)
    x1, x2 = (x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in streams())
    formats = []
    for body in net.bodies:
        body.register_forward_pre_hook(lambda m, args: formats.append(args[0].stride()))
    net(x1, x2)[0].sum().backward()
    assert set(formats) == {x1.stride()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_come_in_the_dtype_of_the_inputs_but_never_in_half(dtype: torch.dtype) -> None:
    net = chain(2).to(torch.promote_types(dtype, torch.float32))
    y1, y2 = net(*streams(dtype))
    assert y1.dtype == y2.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("recovery", ["invert", "keep", "store"])
def test_overflow_is_an_error_and_unchecked_it_is_nan(recovery: str) -> None:
    x1, x2 = streams(requires_grad=True)
    for where in range(3):
        net = chain(3, 0.5, recovery=recovery)
        with torch.no_grad():
            net.bodies[where].conv.bias.fill_(1e5)
        with pytest.raises(OverflowError, match="fraction_bits: with 20"):
            net(x1, x2)
        net.check_v = False
        assert sum(y.sum() for y in net(x1, x2)).isnan()


@pytest.mark.parametrize(("v", "min_v"), [(0.2, 0.25), (1.01, 0.25), (0.49, 0.5), (float("nan"), 0.25)])
def test_v_out_of_range_is_refused_by_name_in_training_and_out_of_it(v: float, min_v: float) -> None:
    net, (x1, x2) = chain(3, 0.5, min_v=min_v), streams()
    with torch.no_grad():
        net.v[1].fill_(v)
    for call in (net, net.run_exact, net.eval()):
        with pytest.raises(ValueError, match=r"v\.1: v = "):
            call(x1, x2)
    net.check_v = False
    assert net(x1, x2)[0].isnan().any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: net.inverse(x, x), "run_exact returns all of it"),
        (lambda net, x: chain(2, stream_dtype=torch.float32).run_exact(x, x), "only torch.int32 can"),
        (lambda net, x: net.inverse_exact(chain(3).run_exact(x, x)), "codes of 3 layers"),
        (lambda net, x: chain(2, min_v=0.2), "min_v: 0.2"),
        (lambda net, x: chain(2, fraction_bits=31), "fraction_bits: 31"),
    ],
)
def test_wrong_use_is_refused_with_the_remedy(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(chain(2), streams()[0])
