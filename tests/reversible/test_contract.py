"""The rest of the engine's contract (DESIGN §4) in one process, against plain autograd on the same modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ReversibleSequence, WiredSequence

SHAPE = (2, 6, 5, 7)


class Body(nn.Module):
    """Residual convolutions; out of place first, in place after."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU(inplace=True), nn.Conv2d(12, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x).add_(x)


class Conditioned(Body):
    """Reads tensors in nested containers, positional and keyword."""

    def forward(self, x: Tensor, pair: tuple[Tensor, list[Any]], *, by_name: dict[str, Tensor], sign: int = 1) -> Tensor:
        shift, (scale, _) = pair
        return super().forward(x) * scale + sign * shift + by_name["bias"]


def chain(body: Callable[[], nn.Module] = Body, layers: int = 4, **options: Any) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([body() for _ in range(layers)], **options).double()


def streams(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SHAPE, dtype=dtype, requires_grad=True), torch.randn(SHAPE, dtype=dtype, requires_grad=True)


def gradients(net: nn.Module, loss: Callable[[], Tensor], recovery: str, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Of the inputs, then the parameters, by `recovery`."""
    for part in net.modules():
        if isinstance(part, ReversibleSequence):
            part.recovery = recovery
    wanted = [t for t in (*inputs, *net.parameters()) if t.requires_grad]
    return torch.autograd.grad(loss(), wanted, allow_unused=True)


def compare(net: nn.Module, loss: Callable[[], Tensor], *inputs: Tensor, tolerance: float = 1e-10) -> None:
    expected = gradients(net, loss, "store", *inputs)
    for recovery in ("invert", "keep"):
        found = gradients(net, loss, recovery, *inputs)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_bodies_that_work_in_place_behind_their_first_operation() -> None:
    net, (x1, x2) = chain(), streams()
    compare(net, lambda: (net(x1, x2)[0] ** 2).sum(), x1, x2)


def test_side_inputs_nested_in_containers_carry_their_graph_in_one_traversal() -> None:
    net, (x1, x2) = chain(Conditioned), streams()
    source = torch.randn(1, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    traversals = []

    def loss() -> Tensor:
        shift, scale, bias = source.sin(), source.exp(), source.square()
        for tensor in (shift, scale, bias):
            tensor.register_hook(lambda gradient: traversals.append(1))
        return (net(x1, x2, (shift, [scale, "ignored"]), by_name={"bias": bias}, sign=-1)[0] ** 2).sum()

    compare(net, loss, x1, x2, source)
    assert len(traversals) == 3 * 3  # three tensors, three recoveries


def test_one_tensor_as_stream_and_side_input_at_once() -> None:
    net, (x1, _) = chain(Conditioned), streams()
    compare(net, lambda: net(x1, x1, (x1, [x1, 0]), by_name={"bias": x1})[0].square().sum(), x1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bodies_on_float32_streams(dtype: torch.dtype) -> None:
    net = chain(lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())).to(dtype)
    reference = copy.deepcopy(net).float()
    x1, x2 = streams(dtype)

    def loss(run: ReversibleSequence, body_dtype: torch.dtype) -> Tensor:
        return run(x1, x2, body_dtype=body_dtype)[0].square().sum()

    exact = gradients(reference, lambda: loss(reference, torch.float32), "store", x1, x2)
    found = {r: gradients(net, lambda: loss(net, dtype), r, x1, x2) for r in ("store", "invert")}
    assert net(x1, x2, body_dtype=dtype)[0].dtype == torch.float32
    for stored, inverted, expected in zip(found["store"], found["invert"], exact, strict=True):
        assert inverted.dtype == dtype
        # No worse than plain autograd in the same dtype, but for one rounding of the result.
        allowed = 1.5 * (stored - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (inverted - expected).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_of_a_wired_sequence(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = WiredSequence([Body() for _ in range(3)])
    x = streams(dtype)[0]
    assert net(x).dtype == torch.float32
    compare(net, lambda: net(x).square().sum(), x, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_streams_of_any_layout(layout: str) -> None:
    net, (x1, x2) = chain(), streams()

    def laid_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return x.transpose(2, 3) if layout == "transposed" else x[:, :, :1].expand(-1, -1, 5, -1)

    compare(net, lambda: (net(laid_out(x1), laid_out(x2))[0] ** 2).sum(), x1, x2)
    with torch.no_grad():
        z1, z2 = net.inverse(*net(laid_out(x1), laid_out(x2)))
    torch.testing.assert_close((z1, z2), (laid_out(x1), laid_out(x2)), rtol=1e-10, atol=1e-10)


def test_empty_batch_gives_zero_gradients() -> None:
    net, (x1, x2) = chain(), (x[:0] for x in streams())
    found = gradients(net, lambda: net(x1, x2)[0].sum(), "invert")
    assert all(not gradient.any() for gradient in found[: len(list(net.bodies.parameters()))])
    compare(net, lambda: net(x1, x2)[0].sum())


def test_unused_parameters_get_none_and_used_ones_their_gradient() -> None:
    net, (x1, x2) = chain(), streams()
    net.bodies[1].spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    compare(net, lambda: net(x1, x2)[0].square().sum(), x1, x2)
    net(x1, x2)[0].sum().backward()
    assert net.bodies[1].spare.grad is None
    assert net.bodies[1].inside[0].weight.grad is not None


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_body_that_ignores_its_input() -> None:
    net, (x1, x2) = ReversibleSequence([Body(), Ones(), Body()]).double(), streams()
    compare(net, lambda: (net(x1, x2)[0] ** 2).sum(), x1, x2)


def test_gradients_accumulate_over_steps_as_in_plain_autograd() -> None:
    grads = {}
    for recovery in ("store", "invert"):
        net, (x1, x2) = chain(recovery=recovery), streams()
        for _ in range(2):
            net(x1, x2)[0].square().sum().backward()
        grads[recovery] = [p.grad for p in net.parameters()]
    torch.testing.assert_close(grads["invert"], grads["store"], rtol=1e-10, atol=1e-10)


def test_hooks_on_parameters_fire_once_with_the_whole_gradient() -> None:
    seen: dict[str, list[tuple[str, Tensor]]] = {}
    for recovery in ("store", "invert"):
        net, (x1, x2) = chain(recovery=recovery), streams()
        seen[recovery] = calls = []
        for name, parameter in net.named_parameters():
            parameter.register_hook(lambda g, name=name, calls=calls: calls.append((name, g.clone())))
            parameter.register_post_accumulate_grad_hook(lambda p, name=name, calls=calls: calls.append((name, p.grad)))
        net(x1, x2)[0].square().sum().backward()
        calls.sort(key=lambda call: call[0])
    assert [name for name, _ in seen["invert"]] == [name for name, _ in seen["store"]]
    torch.testing.assert_close([g for _, g in seen["invert"]], [g for _, g in seen["store"]], rtol=1e-10, atol=1e-10)


def test_backward_hooks_on_modules_fire_once_and_forward_hooks_on_every_run() -> None:
    counts: dict[str, list[int]] = {}
    for recovery in ("store", "invert"):
        net, (x1, x2) = chain(lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh()), recovery=recovery), streams()
        counts[recovery] = count = [0, 0, 0]
        for body in net.bodies:
            body[0].register_full_backward_hook(lambda m, i, o, count=count: count.__setitem__(0, count[0] + 1))
            body.register_forward_pre_hook(lambda m, i, count=count: count.__setitem__(1, count[1] + 1))
            body.register_forward_hook(lambda m, i, o, count=count: count.__setitem__(2, count[2] + 1))
        net(x1, x2)[0].square().sum().backward()
    assert counts == {"store": [4, 4, 4], "invert": [4, 8, 8]}


def test_backward_hook_of_the_chain_and_of_its_input() -> None:
    seen = {}
    for recovery in ("store", "invert"):
        net, (x1, x2) = chain(recovery=recovery), streams()
        calls: list[Tensor] = []
        net.register_full_backward_hook(lambda m, inner, outer, calls=calls: calls.extend((*inner, *outer)))
        x1.register_hook(lambda g, calls=calls: calls.append(g))
        net(x1, x2)[0].square().sum().backward()
        seen[recovery] = calls
    torch.testing.assert_close(seen["invert"], seen["store"], rtol=1e-10, atol=1e-10)


def through_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def through_torch_save(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save, copy.deepcopy])
def test_copies_of_a_chain_between_forward_and_backward_have_no_effect_and_work(copied: Callable) -> None:
    net, (x1, x2) = chain(), streams()
    expected = gradients(net, lambda: net(x1, x2)[0].square().sum(), "store", x1, x2)
    net.recovery = "invert"
    loss = net(x1, x2)[0].square().sum()
    again = copied(net)
    found = torch.autograd.grad(loss, [x1, x2, *net.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    other = gradients(again, lambda: again(x1, x2)[0].square().sum(), "invert", x1, x2)
    torch.testing.assert_close(other, expected, rtol=1e-10, atol=1e-10)


def test_two_chains_interleaved_and_passes_that_share_bodies_and_weights() -> None:
    """memcnn's chained shared passes: forward, other chain, forward again, all through the same modules."""
    net, other, (x1, x2) = chain(), chain(layers=2), streams()
    other.bodies[0] = net.bodies[3]
    both = nn.ModuleList([net, other])

    def loss() -> Tensor:
        y1, y2 = net(*other(*net(x1, x2)))
        return (y1 * y2.cos()).sum()

    compare(both, loss, x1, x2)


def test_inverse_of_a_pass_through_several_chains_gives_the_first_input() -> None:
    first, second, (x1, x2) = chain(), chain(coupling="additive"), streams()
    with torch.no_grad():
        z = first.inverse(*second.inverse(*second(*first(x1, x2))))
    torch.testing.assert_close(z, (x1, x2), rtol=1e-10, atol=1e-10)


def test_inverse_moves_no_batch_norm_statistics() -> None:
    net = chain(lambda: nn.BatchNorm2d(6))
    y1, y2 = net(*streams())
    before = copy.deepcopy(net.state_dict())
    net.inverse(y1.detach(), y2.detach())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_inverse_of_bodies_that_draw_afresh_is_not_the_input() -> None:
    net, (x1, x2) = chain(lambda: nn.Dropout(0.5)), streams()
    with torch.no_grad():
        z1, _ = net.inverse(*net(x1, x2))
    assert (z1 - x1).abs().max() > 0.1


def test_gradcheck_with_side_inputs_and_shared_body() -> None:
    torch.manual_seed(0)

    class Small(nn.Linear):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return F.softplus(super().forward(x)) * shift.sigmoid()

    body = Small(3, 3)
    net = ReversibleSequence([body, Small(3, 3), body]).double()
    x1, x2, shift = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda a, b, c, *p: net(a, b, c), (x1, x2, shift, *net.parameters()))


def test_graph_of_a_failed_backward_can_be_thrown_away_and_the_chain_used_again() -> None:
    net, (x1, x2) = chain(), streams()
    handle = net.bodies[1].inside[2].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x1, x2)[0].square().sum().backward()
    handle.remove()
    compare(net, lambda: net(x1, x2)[0].square().sum(), x1, x2)


def test_backward_from_another_thread_gives_the_same_gradients() -> None:
    net, (x1, x2) = chain(), streams()
    expected = gradients(net, lambda: net(x1, x2)[0].square().sum(), "store", x1, x2)
    net.recovery = "invert"
    loss = net(x1, x2)[0].square().sum()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, loss, [x1, x2, *net.parameters()]).result(timeout=60)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
