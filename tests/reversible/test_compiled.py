"""Compiled chains (`fullgraph=True`) against the same modules run eagerly under plain autograd, and what their graphs hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from idm_fast import IDM, BlockCompressedSensing, ReversibleSequence, WiredSequence
from idm_fast.memory.count import AllocationCounter
from idm_fast.reversible import kept

SHAPE = (2, 6, 5, 4)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Body(nn.Module):
    """Convolutions with a wide middle, side inputs of every kind, and dropout or BatchNorm on request."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.GroupNorm(2, 6)
        self.widen = nn.Conv2d(6, 24, 1)
        self.narrow = nn.Conv2d(24, 6, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, more: dict[str, Any] | None = None) -> Tensor:
        h = self.dropout(self.narrow(F.silu(self.widen(self.norm(x)))))
        h = h if skip is None else h + skip.tanh()
        return x + (h if more is None else h * more["scale"][0] * more["factor"])


def chain(layers: int = 2, coupling: str = "convex", **options: Any) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([Body(**options) for _ in range(layers)], coupling).double()


def tensors(count: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def compiled(module: nn.Module, backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(module, backend=backend, fullgraph=True)


def compare(
    module: nn.Module, run: Callable[[Callable[..., Any]], Tensor], inputs: list[Tensor], backend: str = "aot_eager"
) -> None:
    """Loss and gradients of `run(module)`: compiled as it stands, and eager under plain autograd from the same state."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if isinstance(part, ReversibleSequence):
            part.recovery = "store"
    results = []
    for function, owner in ((compiled(module, backend), module), (plain, plain)):
        torch.manual_seed(7)
        loss = run(function)
        results.append((loss, *torch.autograd.grad(loss, [*inputs, *owner.parameters()], allow_unused=True)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize("recovery", ["invert", "keep"])
@pytest.mark.parametrize("coupling", ["convex", "additive"])
def test_gradients_are_those_of_plain_autograd(coupling: str, recovery: str) -> None:
    net, (x1, x2) = chain(3, coupling), tensors()
    net.recovery = recovery
    compare(net, lambda f: sum((i + y.sin()).square().sum() for i, y in enumerate(f(x1, x2))), [x1, x2])


def test_side_inputs_positional_keyword_and_nested() -> None:
    net, (x1, x2, source) = chain(3), tensors(3)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def run(f: Callable[..., Any]) -> Tensor:
        skip = source.exp()
        y1, y2 = f(x1, x2, extras={0: (skip,), 1: (None,), 2: (skip,)}, more={"scale": [scale], "factor": 0.7})
        return (y1 * y2).sum()

    compare(net, run, [x1, x2, source, scale])


def test_shared_frozen_and_unused_parameters() -> None:
    body = Body()
    body.unused = nn.Parameter(torch.zeros(2))
    frozen = Body().requires_grad_(False)
    frozen.narrow.weight.requires_grad_()
    body.norm.weight = body.norm.bias  # tied inside one body, too
    net, (x1, x2) = ReversibleSequence([body, frozen, body]).double(), tensors()
    run = net.forward

    def gradients(function: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        wanted = [p for p in net.parameters() if p.requires_grad]
        return torch.autograd.grad(function(x1, x2)[0].square().sum(), wanted, allow_unused=True)

    found, expected = gradients(compiled(net)), gradients(run)
    assert sum(gradient is None for gradient in found) == 1  # `unused`
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_dropout_masks_are_those_of_eager_and_are_not_drawn_again() -> None:
    net, (x1, x2) = chain(dropout=0.4), tensors()
    compare(net, lambda f: (f(x1, x2)[0] ** 2).sum(), [x1, x2])


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept, _ = torch.native_dropout(x.sin(), 0.4, True)  # the operation of CUDA's dropout
        return kept + torch.rand_like(x) * x


def test_random_operations_that_return_what_they_drew() -> None:
    net, (x1, x2) = ReversibleSequence([Noisy(), Noisy()]).double(), tensors()
    compare(net, lambda f: (f(x1, x2)[0] ** 2).sum(), [x1, x2])


def test_batch_norm_statistics_move_once() -> None:
    net, (x1, x2) = chain(batch_norm=True), tensors()
    compare(net, lambda f: (f(x1, x2)[0] ** 2).sum(), [x1, x2])  # compares the buffers, too
    assert int(net.bodies[0].norm.num_batches_tracked) == 1


def test_random_numbers_that_cannot_be_noted_are_refused_with_the_remedy() -> None:
    net, (x1, x2) = ReversibleSequence([nn.RReLU()]).double(), tensors()
    with pytest.raises(Exception, match='cannot be compiled.*set recovery="store"'):
        compiled(net)(x1, x2)


def test_body_that_changes_the_shape_is_named() -> None:
    net, (x1, x2) = ReversibleSequence([Body(), nn.Conv2d(6, 3, 1)]).double(), tensors()
    with pytest.raises(Exception, match=r"body 1 \(Conv2d\) turned"):
        compiled(net)(x1, x2)


def test_body_may_work_in_place_but_not_on_its_input() -> None:
    body, (x1, x2) = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True)), tensors()
    net = ReversibleSequence([body]).double()
    compare(net, lambda f: (f(x1, x2)[0] ** 2).sum(), [x1, x2])
    with pytest.raises(Exception, match="in-place operation"):
        compiled(ReversibleSequence([body[1]]).double())(x1, x2)


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_body_that_ignores_its_input() -> None:
    net, (x1, x2) = ReversibleSequence([Ones(), nn.Tanh()]).double(), tensors()
    compare(net, lambda f: (f(x1, x2)[0] ** 2).sum(), [x1, x2])


class Operator(nn.Module):
    """A module that is passed along, as the measurement operator is; its weight is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1, 6).reshape(6, 1, 1))
        self.register_buffer("offset", torch.ones(6, 1, 1))


class Measured(nn.Module):
    def forward(self, x: Tensor, operator: Operator, power: int) -> Tensor:
        return (x * operator.weight**power + operator.offset).tanh()


class WithOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.operator = Operator()
        self.net = ReversibleSequence([Measured(), Measured()])

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.net(x1, x2, self.operator, 2)[0]


def test_modules_as_side_inputs_get_their_gradients() -> None:
    net, (x1, x2) = WithOperator().double(), tensors()
    compare(net, lambda f: f(x1, x2).square().sum(), [x1, x2])


def test_other_batch_sizes_through_one_dynamic_graph() -> None:
    net, counter = chain(), CompileCounterWithBackend("aot_eager")
    function = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for size in (2, 3, 5):
        x = torch.randn(size, *SHAPE[1:], dtype=torch.float64)
        found, expected = (torch.autograd.grad(f(x, x)[0].square().sum(), list(net.parameters())) for f in (function, net))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert counter.frame_count == 1


def test_second_derivatives_are_refused() -> None:
    net, (x1, x2) = chain(1), tensors()
    (gradient,) = torch.autograd.grad(compiled(net)(x1, x2)[0].square().sum(), x1, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


def test_another_list_of_bodies_is_refused_with_the_remedy() -> None:
    net, (x1, x2) = chain(1), tensors()
    net.bodies = nn.ModuleList([nn.Tanh()])
    with pytest.raises(Exception, match="compile a ReversibleSequence that was made from that one"):
        compiled(net)(x1, x2)


class Lowered(nn.Module):
    """Autocast around the chain alone, so that backward is traced outside it."""

    def __init__(self, net: ReversibleSequence) -> None:
        super().__init__()
        self.net = net

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x1, x2)[0]


def test_autocast_is_that_of_the_forward_pass() -> None:
    net, (x1, x2) = Lowered(chain().float()), [x.detach().float() for x in tensors()]
    dtypes = []
    net.net.bodies[0].widen.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    wanted = list(net.parameters())
    found, expected = (torch.autograd.grad(f(x1, x2).square().sum(), wanted) for f in (compiled(net), net))
    assert len(dtypes) > 2 and set(dtypes) == {torch.bfloat16}  # whenever the graph was traced, forward and replay
    for compiled_gradient, eager in zip(found, expected, strict=True):
        # The same bfloat16 operations; recovered inputs differ by float32 rounding, and bfloat16 may round those apart.
        assert (compiled_gradient - eager).norm() <= 2**-8 * eager.norm()


class Model(nn.Module):
    """Two wired chains at two resolutions, the first made of a chain and a body; the second reads a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = WiredSequence([WiredSequence([Body(), Body()]), Body()])
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.second = WiredSequence([Body(), Body()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.first(x))
        return self.second(x, extras={1: (x,)})


def test_model_of_several_chains_one_inside_another() -> None:
    torch.manual_seed(0)
    model, (x, _) = Model().double(), tensors()
    compare(model, lambda f: f(x).square().sum(), [x])


STREAM = torch.Size(SHAPE).numel() * 8
"""Bytes of one float64 stream."""


@pytest.mark.slow
def test_inductor_gives_the_same_gradients_and_holds_the_last_streams_alone() -> None:
    torch.manual_seed(0)
    net = ReversibleSequence([nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)]).double()
    x1, x2 = tensors()
    compare(net, lambda f: f(x1, x2)[0].square().sum(), [x1, x2], backend="inductor")
    outputs = compiled(net, "inductor")(x1, x2)
    saved = outputs[0].grad_fn.saved_tensors
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*saved, *net.parameters())}
    assert sum(storages.values()) == 2 * STREAM + sum(p.untyped_storage().nbytes() for p in net.parameters())


class Graphs:
    """A backend with AOTAutograd's own partitioner that measures what the forward graph leaves for backward, and backward's
    peak, in bytes."""

    def __init__(self, net: nn.Module) -> None:
        self.held, self.peak, self.targets = 0, 0, []
        self._parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.backend = aot_autograd(
            fw_compiler=self._forward, bw_compiler=self._backward, partition_fn=min_cut_rematerialization_partition
        )

    def _forward(self, graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            outputs = graph(*inputs)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs if isinstance(t, Tensor)}
            self.held = sum(size for pointer, size in storages.items() if pointer not in self._parameters)
            return outputs

        return make_boxed_func(run)

    def _backward(self, graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            counter = AllocationCounter()
            counter.ignore([t for t in inputs if isinstance(t, Tensor)])
            with counter:
                outputs = graph(*inputs)
            results = [t for t in outputs if isinstance(t, Tensor) and t.shape != SHAPE]
            self.peak = counter.summarize(results, counter.mark())[0]
            return outputs

        self.targets = [str(node.target) for node in graph.graph.nodes]
        return make_boxed_func(run)


def measured(layers: int, coupling: str, recovery: str = "invert", **options: Any) -> Graphs:
    net, (x1, x2) = chain(layers, coupling, **options), tensors()
    net.recovery = recovery
    graphs = Graphs(net)
    (compiled(net, graphs.backend)(x1, x2)[0] ** 2).sum().backward()
    return graphs


@pytest.mark.parametrize("coupling", ["convex", "additive"])
def test_graph_leaves_the_last_streams_for_backward_and_nothing_else(coupling: str) -> None:
    short, long = measured(4, coupling), measured(5, coupling)
    assert short.held == long.held == 2 * STREAM
    # Every body runs again; of an additive chain's first body, whose output nothing needs, all but the last convolution.
    assert long.targets.count("aten.convolution.default") == 2 * 5 - (coupling == "additive")
    assert long.peak == short.peak


def test_graph_of_a_chain_that_stores_holds_the_inside_of_its_bodies() -> None:
    assert measured(2, "convex", "store").held >= 2 * 4 * STREAM  # the wide middles alone


class Attending(nn.Module):
    """Self-attention whose result is kept, or is not."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x)
        attend = F.scaled_dot_product_attention
        return x + (kept(attend, q, q, q) if self.keep else attend(q, q, q))


@pytest.mark.parametrize("keep", [True, False])
def test_attention_inside_kept_does_not_run_again(keep: bool) -> None:
    torch.manual_seed(0)
    net, (x1, x2) = ReversibleSequence([Attending(keep), Attending(keep)]).double(), tensors()
    graphs = Graphs(net)
    compare(net, lambda f: f(x1, x2)[0].square().sum(), [x1, x2], backend=graphs.backend)
    assert graphs.targets.count("aten._scaled_dot_product_flash_attention_for_cpu.default") == (0 if keep else 2)


def test_graph_that_keeps_leaves_the_streams_of_every_layer() -> None:
    assert measured(3, "convex", "keep").held == (3 + 2) * STREAM


def test_same_chain_is_compiled_once_and_again_when_it_goes_to_eval() -> None:
    net, (x1, x2) = chain(dropout=0.5), tensors()
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(net, counter)
    for _ in range(3):
        function(x1, x2)
    assert counter.frame_count == 1
    net.bodies[1].eval()
    function(x1, x2)
    assert counter.frame_count == 2
    net.eval()
    torch.testing.assert_close(function(x1, x2), net(x1, x2))


def test_sequence_without_bodies() -> None:
    net, (x1, x2) = ReversibleSequence([]), tensors()
    y1, y2 = compiled(net)(x1, x2)
    assert torch.equal(y1, x1) and torch.equal(y2, x2)


def test_copy_of_a_compiled_chain_runs_its_own_bodies() -> None:
    net, (x1, x2) = chain(1), tensors()
    compiled(net)(x1, x2)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.bodies[0].narrow.bias += 1
    torch.testing.assert_close(compiled(other)(x1, x2), other(x1, x2))


def test_idm_reconstructs_without_a_graph_break() -> None:
    torch.manual_seed(0)
    physics = BlockCompressedSensing((16, 16), ratio=0.25, block_size=8)
    model = IDM.tiny(steps=1, widths=(16, 16)).eval()
    y = physics.A(torch.rand(1, 1, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(y, physics), model(y, physics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "keep", "attention"),
    [("store", None, False), ("flat", None, False), ("two_level", None, False), ("flat", ["attention"], True)],
)
def test_idm_trains_without_a_graph_break(schedule: str, keep: list[str] | None, attention: bool) -> None:
    torch.manual_seed(0)
    physics = BlockCompressedSensing((32, 32), ratio=0.25, block_size=8).double()
    model = IDM.tiny(steps=1 if attention else 2, widths=(16, 16), attention=(False, attention)).double()
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    y = physics.A(x).requires_grad_()

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        loss = (function(y, physics) - x).abs().mean()
        return (loss, *torch.autograd.grad(loss, [y, *model.parameters()], allow_unused=True))

    model.set_schedule("store")
    expected = gradients(model)
    model.set_schedule(schedule, keep)
    torch.testing.assert_close(gradients(compiled(model)), expected, rtol=1e-9, atol=1e-9)


def test_operator_that_a_graph_cannot_take_is_refused_with_the_remedy() -> None:
    net, (x1, x2) = ReversibleSequence([Measured()]).double(), tensors()
    with pytest.raises(Exception, match="make its class an nn.Module"):
        compiled(net)(x1, x2, object(), 2)
