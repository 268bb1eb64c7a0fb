"""What runs again in backward (`recompute`), what is exempted (`kept`), and what a chain gives besides its end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ops
from idm_fast.memory.count import count_step
from idm_fast.ops import registry
from idm_fast.reversible import ReversibleSequence, kept, recompute, segment


class Attending(nn.Module):
    """A body with an attention whose runs are counted."""

    def __init__(self, keep: bool, width: int = 8) -> None:
        super().__init__()
        self.project, self.keep, self.runs = nn.Linear(width, 3 * width), keep, 0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.runs += 1
            return F.scaled_dot_product_attention(q, k, v)

        out = kept(attend, q, k, v) if self.keep else attend(q, k, v)
        return x + out.transpose(1, 2).flatten(2).tanh()


def attending(keep: bool, layers: int = 3, **options: object) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([Attending(keep) for _ in range(layers)], **options).double()


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 8, dtype=torch.float64)


def gradients(net: nn.Module, loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [*inputs, *net.parameters()])


@pytest.mark.parametrize("recovery", ["invert", "keep"])
def test_kept_results_are_not_computed_again_and_gradients_are_those_of_plain_autograd(recovery: str) -> None:
    x1, x2 = pair()
    plain, net = attending(False, recovery="store"), attending(True, recovery=recovery)
    expected = gradients(plain, plain(x1, x2)[0].sin().sum(), x1)
    found = gradients(net, net(x1, x2)[0].sin().sum(), x1)
    assert [body.runs for body in net.bodies] == [1, 1, 1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_kept_the_function_runs_twice() -> None:
    net, (x1, x2) = attending(False), pair()
    net(x1, x2)[0].sum().backward()
    assert [body.runs for body in net.bodies] == [2, 2, 2]


def test_kept_results_are_all_that_is_held_more() -> None:
    def held(keep: bool) -> int:
        net, (x1, x2) = attending(keep, preserve_rng_state=False), pair()
        return count_step(lambda: net(x1, x2)[0].sum(), net.parameters(), [x1, x2]).held_bytes

    output, logsumexp = 2 * 5 * 8 * 8, 2 * 2 * 5 * 8
    assert 3 * output <= held(True) - held(False) <= 3 * (output + logsumexp)


def test_kept_inside_chains_inside_recompute() -> None:
    x1, x2 = pair()
    plain, net = attending(False, recovery="store"), attending(True)
    expected = gradients(plain, plain(x1, x2)[0].sin().sum(), x1)
    found = gradients(net, recompute(lambda *a: net(*a)[0], x1, x2).sin().sum(), x1)
    assert [body.runs for body in net.bodies] == [2, 2, 2]  # forward, and forward again; not in the replay of the layers
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_kept_twice_backward_with_retained_graph() -> None:
    net, (x1, x2) = attending(True), pair()
    loss = net(x1, x2)[0].sum()
    first = torch.autograd.grad(loss, x1, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, x1), first, rtol=0, atol=0)


class Modulated(nn.Module):
    """`kept` of a side input and of the stream itself, which may lie in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return x + self.linear(kept(lambda a, b: b.transpose(1, 2).sin().transpose(1, 2) * a * b, side, x))


@pytest.mark.parametrize("recovery", ["invert", "keep"])
def test_kept_of_a_stream_that_is_part_of_a_larger_tensor(recovery: str) -> None:
    """The recovered stream lies in memory of its own, in another layout."""
    torch.manual_seed(0)
    net = ReversibleSequence([Modulated(), Modulated()]).double()
    whole = torch.randn(3, 12, 4, dtype=torch.float64).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = []
    for net.recovery in (recovery, "store"):
        x1, side, x2 = whole.chunk(3, dim=1)
        found.append(gradients(net, net(x1, x2, side)[0].sin().sum(), whole))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_kept_result_changed_in_place_is_named() -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kept(torch.exp, x).mul_(2)

    net, (x1, x2) = ReversibleSequence([Careless()]), pair()
    with pytest.raises(RuntimeError, match=r"body 0 \(Careless\) changed in place what `kept` returned"):
        net(x1, x2)


def test_kept_outside_of_anything_is_the_function_itself() -> None:
    x = torch.rand(3, requires_grad=True)
    assert torch.equal(kept(torch.exp, x), x.exp())


def test_what_backward_needs_and_a_body_changed_in_place_is_named_as_in_plain_autograd() -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            y.mul_(2)
            return y

    net, (x1, x2) = ReversibleSequence([Careless()]), pair()
    with pytest.raises(RuntimeError, match=r"body 0 \(Careless\) changed in place a tensor that its backward needs"):
        net(x1, x2)[0].sum().backward()


def test_recompute_stores_its_inputs_alone_and_has_the_gradients_of_plain_autograd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.3)))).double()
    x = torch.randn(16, 64, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    expected = gradients(net, net(x).square().sum(), x)
    torch.manual_seed(3)
    found = gradients(net, recompute(net, x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def held(run: object) -> int:
        return count_step(lambda: run(x).sum(), net.parameters(), [x]).held_bytes  # type: ignore[operator]

    assert held(lambda x: recompute(net, x, preserve_rng_state=False)) < 0.2 * held(net)


def test_recompute_stops_when_everything_is_there() -> None:
    runs = []

    def part(x: Tensor) -> Tensor:
        y = x.exp()  # saves its result, which is all that backward needs
        runs.append("after")
        return y + 1

    recompute(part, torch.rand(3, requires_grad=True)).sum().backward()
    assert runs == ["after"]


def test_recompute_puts_back_the_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def other(h: Tensor) -> Tensor:
        seen.append(registry.current_choice())
        return registry.OPS["geglu"].implementations["reference"][0](h)

    monkeypatch.setitem(registry.OPS["geglu"].implementations, "cpu", (other, ("cpu",)))
    with ops.use("cpu"):
        y = recompute(lambda h: ops.geglu(h).exp(), torch.rand(2, 4, requires_grad=True))
    monkeypatch.setitem(
        registry.OPS["geglu_backward"].implementations,
        "cpu",
        (registry.OPS["geglu_backward"].implementations["reference"][0], ("cpu",)),
    )
    y.sum().backward()
    assert seen == ["cpu", "cpu"]


def merging(recovery: str, parts: tuple[bool, bool] = (True, True)) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs and gradients of a chain that starts scaled and merges after layers 0 and 2; `parts` of its end are used."""
    net, (x, _) = attending(False, 4, recovery=recovery), pair()
    s, m0, m2 = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.7, 0.3, -0.4))
    y1, y2, (a, b) = net(x, input_scale=s, merges={0: m0, 2: m2})
    end = [y for y, used in zip((y1, y2), parts, strict=True) if used]
    loss = torch.stack([t.sin().sum() for t in (*end, a, 2 * b)]).sum()
    return [y1, y2, a, b], torch.autograd.grad(loss, [x, s, m0, m2, *net.parameters()], allow_unused=True)


@pytest.mark.parametrize("recovery", ["invert", "keep"])
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
def test_merges_and_a_scaled_start_are_the_formula_written_out(recovery: str, parts: tuple[bool, bool]) -> None:
    outputs, found = merging(recovery, parts)
    stored, expected = merging("store", parts)
    torch.testing.assert_close(outputs, stored, rtol=0, atol=0)
    for a, b in zip(found, expected, strict=True):
        assert a is not None if b is not None else a is None or not a.any()
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_merge_is_y1_plus_m_times_y2() -> None:
    net, (x1, x2) = attending(False, 3), pair()
    m = torch.full((1,), 0.3, dtype=torch.float64)
    merged = net(x1, x2, merges={1: m})[2][0]
    y1, y2 = ReversibleSequence.forward(shortened(net, 2), x1, x2)
    torch.testing.assert_close(merged, y1 + 0.3 * y2)


def shortened(net: ReversibleSequence, layers: int) -> ReversibleSequence:
    short = ReversibleSequence(list(net.bodies)[:layers])
    short.v = nn.ParameterList(list(net.v)[:layers])
    return short


def test_merges_and_a_scaled_start_store_nothing() -> None:
    def held(**options: object) -> int:
        net, (x, x2) = attending(False, 4, preserve_rng_state=False), pair()
        s = torch.ones(1, dtype=torch.float64, requires_grad=True)
        start = (x,) if options else (x, x2)
        if options:
            options = {"input_scale": s, "merges": {1: s}}

        def loss() -> Tensor:
            y1, y2 = net(*start, **options)[:2]
            return y1.sum() + y2.sum()

        return count_step(loss, net.parameters(), [x, x2, s]).held_bytes

    assert held(scaled=True) <= held() + 16  # a scalar or two


@pytest.mark.parametrize(
    ("arguments", "message"), [({}, "x2, input_scale"), ({"merges": {9: None}, "x2": 0}, r"merges: \[9\]")]
)
def test_wrong_starts_and_merges_are_refused(arguments: dict, message: str) -> None:
    x = torch.zeros(2, 5, 8)
    if "x2" in arguments:
        arguments["x2"] = x
    with pytest.raises(ValueError, match=message):
        attending(False)(x, **arguments)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(("cpu", "cuda:1"), "cuda:1"), (("cuda:0", "cuda:1"), "cuda:0"), (("cpu",), "cpu"), (("meta",), "meta")],
)
def test_random_numbers_and_autocast_are_the_accelerators(devices: tuple[str, ...], expected: str) -> None:
    """An index or lengths on the CPU may come first."""
    assert segment._device_of([SimpleNamespace(device=torch.device(d)) for d in devices]) == torch.device(expected)


def test_a_function_of_no_tensor_may_reach_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert segment._device_of([]) == torch.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert segment._device_of([]) == torch.device("cpu")
