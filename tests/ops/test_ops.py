"""Every op against opcheck, gradcheck, and a formula written independently of the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast import ops
from idm_fast.memory.count import count_step
from idm_fast.ops import registry
from idm_fast.ops.coupling import couple_op, decouple_op
from idm_fast.ops.feed_forward import chunked_feed_forward
from idm_fast.ops.geglu import geglu_op
from idm_fast.ops.group_norm import group_norm_silu_op
from idm_fast.ops.injector import inject_couple_op, inject_read_op, inject_write_op
from idm_fast.ops.layer_norm import layer_norm_op
from idm_fast.ops.projection import adjoint_op, gram_op, measure_op, project_step_op

B, H, W, N, q = 2, 6, 8, 16, 5
ON_INTEGERS = {"pack_bits", "unpack_bits", "to_fixed", "from_fixed"}  # test_bits.py and test_fixed_point.py hold these
ON_INTEGERS |= {"fixed_add", "fixed_couple", "fixed_decouple", "fixed_uncouple"}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def operator(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Φ (N, q) with orthonormal columns, and a permutation of H·W pixels."""
    matrix = torch.linalg.qr(draw(N, q).detach()).Q.to(dtype)
    return matrix, torch.randperm(H * W, generator=torch.Generator().manual_seed(1))


def dense(matrix: Tensor, permutation: Tensor) -> Tensor:
    """A as one (H·W/N·q, H·W) matrix, written from the definition."""
    rows = []
    for row in permutation.view(-1, N):
        for column in matrix.t():
            a = torch.zeros(H * W, dtype=matrix.dtype)
            a[row] = column
            rows.append(a)
    return torch.stack(rows)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def cases() -> dict[str, tuple[Callable, tuple]]:
    x = draw(B, 1, H, W)
    matrix, permutation = operator()
    y = draw(B, H * W // N, q)
    h, image = draw(B, 8, H // 2, W // 2), draw(B, 1, H, W, seed=3)
    x2, read, write = draw(B, 8, H // 2, W // 2, seed=6), draw(1, 2, 1, 1), draw(2, 3, 1, 1)
    stream, body = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    norm = (draw(2, 6, 5, 3), draw(6), draw(6, seed=1), 3, 1e-5)
    return {
        "couple": (couple_op, (body, stream, scalar(0.4))),
        "decouple": (decouple_op, (stream, body, scalar(0.4))),
        "geglu": (geglu_op, (draw(3, 4, 10),)),
        "group_norm": (lambda *a: group_norm_silu_op(*a)[0], (*norm, False, torch.float64)),
        "group_norm_silu": (lambda *a: group_norm_silu_op(*a)[0], (*norm, True, torch.float64)),
        "inject_read": (inject_read_op, (h, read, draw(1), 2)),
        "inject_write": (inject_write_op, (h, x, image, draw(B, 1, H, W, seed=5), write, draw(2), 2)),
        "inject_couple": (inject_couple_op, (h, x, image, draw(B, 1, H, W, seed=5), write, draw(2), x2, scalar(0.4), 2)),
        "layer_norm": (lambda *a: layer_norm_op(*a)[0], (draw(2, 3, 6), draw(6), draw(6, seed=1), 1e-5, torch.float64)),
        "measure": (measure_op, (x, matrix, permutation)),
        "adjoint": (adjoint_op, (y, matrix, permutation, H, W)),
        "gram": (gram_op, (x, matrix, permutation)),
        "project_step": (project_step_op, (x, image, y, matrix, permutation, scalar(0.3), scalar(0.7))),
    }


def backward_cases() -> dict[str, tuple]:
    matrix, permutation = operator()
    x, y, h = draw(B, 1, H, W), draw(B, H * W // N, q), draw(B, 8, H // 2, W // 2)
    x2 = draw(B, 8, H // 2, W // 2, seed=4)
    x_norm, statistics = draw(2, 6, 5, 3), (draw(2, 3), draw(2, 3, seed=1))
    return {
        "couple_backward": (draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2), scalar(0.4)),
        "uncouple": (draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2), scalar(0.4)),
        "uncouple_": (draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2), scalar(0.4)),
        "geglu_backward": (draw(3, 5), draw(3, 10)),
        "group_norm_silu_backward": (draw(2, 6, 5, 3, seed=4), x_norm, draw(6), draw(6, seed=1), *statistics, 3, True),
        "inject_read_backward": (x, h, draw(1, 2, 1, 1), 2, draw(B, 8, H // 2, W // 2, seed=4)),
        "inject_write_backward": (h, x, x, x, draw(2, 3, 1, 1), 2),
        "inject_couple_backward": (h, h, x, x, x, draw(2, 3, 1, 1), draw(2), h, scalar(0.4), 2),
        "inject_uncouple": (h, h, h, x, x, x, draw(2, 3, 1, 1), draw(2), scalar(0.4), 2),
        "inject_uncouple_": (x2, h, h, x, x, x, draw(2, 3, 1, 1), draw(2), scalar(0.4), 2),
        "layer_norm_backward": (
            draw(2, 3, 6, seed=4), draw(2, 3, 6), draw(6), draw(6, seed=1), draw(2, 3, 1), draw(2, 3, 1, seed=1)
        ),
        "project_step_backward": (x, x, x, y, matrix, permutation, scalar(0.3), scalar(0.7)),
    }


@pytest.mark.parametrize("name", cases())
def test_gradient_written_by_hand_is_that_of_finite_differences(name: str) -> None:
    op, arguments = cases()[name]
    assert torch.autograd.gradcheck(op, arguments, fast_mode=False)


@pytest.mark.parametrize("name", cases())
def test_operator_obeys_opcheck(name: str) -> None:
    op, arguments = cases()[name]
    overload = registry.OPS["group_norm_silu" if name.startswith("group_norm") else name].overload
    torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("name", backward_cases())
def test_backward_operator_obeys_opcheck(name: str) -> None:
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in backward_cases()[name])
    torch.library.opcheck(registry.OPS[name].overload, arguments)


def test_every_operator_has_schema_fake_kernel_and_reference() -> None:
    expected = {"couple", "uncouple", "project_step", "measure", "adjoint", "gram", "inject_read", "inject_write"}
    expected |= {"group_norm_silu", "geglu"}
    assert expected <= set(registry.OPS)
    assert set(cases()) - {"group_norm"} | set(backward_cases()) | ON_INTEGERS == set(registry.OPS)  # none goes unchecked
    for name, op in registry.OPS.items():
        assert "reference" in op.implementations, name
        assert str(op.overload._schema).startswith(f"idm_fast::{name}(")


def test_couple_is_the_convex_combination_and_decouple_undoes_it() -> None:
    body, x2, v = draw(4, 7), draw(4, 7, seed=1), scalar(0.3)
    y1 = ops.couple(body, x2, v)
    torch.testing.assert_close(y1, 0.7 * body + 0.3 * x2)
    torch.testing.assert_close(ops.decouple(y1, body, v), x2)


@pytest.mark.parametrize("body_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uncouple_is_the_inverse_and_the_gradient_of_couple(body_dtype: torch.dtype) -> None:
    body, x2, v = draw(4, 7, dtype=body_dtype), draw(4, 7, seed=1), scalar(0.3)
    y1 = ops.couple(body, x2, v)
    d1 = draw(4, 7, seed=2).detach()
    dF, dx2, dv = torch.autograd.grad(y1, (body, x2, v), d1)
    found = ops.uncouple(y1.detach(), body.detach(), d1, v.detach())
    for value, expected in zip(found, (x2, dF, dx2, dv), strict=True):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected.detach())


def test_uncouple_in_place_writes_what_uncouple_returns() -> None:
    y1, body, d1, v = (t.detach() for t in (draw(4, 7), draw(4, 7, seed=1), draw(4, 7, seed=2), scalar(0.3)))
    x2, *gradients = ops.uncouple(y1, body, d1, v)
    found = registry.OPS["uncouple_"].overload(y1, body, d1, v)
    torch.testing.assert_close((y1, *found), (x2, *gradients), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 100])
def test_chunked_feed_forward_is_the_whole_one_forward_and_backward(rows: int) -> None:
    tensors = draw(2, 3, 4), draw(16, 4), draw(16), draw(5, 8), draw(5)

    def whole(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        value, gate = F.linear(x, w1, b1).chunk(2, -1)
        return F.linear(value * F.gelu(gate), w2, b2)

    found, expected = chunked_feed_forward(*tensors, rows), whole(*tensors)
    torch.testing.assert_close(found, expected)
    d = draw(2, 3, 5, seed=9).detach()
    for a, b in zip(torch.autograd.grad(found, tensors, d), torch.autograd.grad(expected, tensors, d), strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_feed_forward_never_holds_its_hidden_layer() -> None:
    shapes = (64, 8), (64, 8), (64,), (8, 32), (8,)
    x, w1, b1, w2, b2 = (draw(*shape, dtype=torch.float32).detach().requires_grad_() for shape in shapes)
    peaks = {}
    for rows in (64, 8):
        weights = [w1, b1, w2, b2]
        for t in (x, *weights):
            t.grad = None
        step = count_step(lambda rows=rows: chunked_feed_forward(x, w1, b1, w2, b2, rows).sum(), [x, *weights])
        peaks[rows] = step.peak_bytes
    whole = 64 * 64 * 4
    assert peaks[64] >= 2 * whole  # value, gate and their gradients
    assert 4 * peaks[8] <= peaks[64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_is_as_exact_as_eager_and_gives_the_dtype_asked_for(dtype: torch.dtype) -> None:
    x, weight, bias = draw(5, 33, dtype=dtype).detach() + 3, draw(33).detach(), draw(33, seed=1).detach()
    found = ops.layer_norm(x, weight.float(), bias.float(), dtype=dtype)
    eager = F.layer_norm(x.float(), (33,), weight.float(), bias.float()).to(dtype)
    exact = F.layer_norm(x.double(), (33,), weight, bias)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_measure_adjoint_and_gram_are_the_dense_operator() -> None:
    matrix, permutation = operator()
    A = dense(matrix, permutation)
    x, y = draw(B, 1, H, W).detach(), draw(B, H * W // N, q).detach()
    torch.testing.assert_close(ops.measure(x, matrix, permutation).flatten(1), x.flatten(1) @ A.t())
    torch.testing.assert_close(ops.adjoint(y, matrix, permutation, H, W).flatten(1), y.flatten(1) @ A)
    torch.testing.assert_close(ops.gram(x, matrix, permutation).flatten(1), x.flatten(1) @ A.t() @ A)


def test_project_step_is_the_published_sampling_step() -> None:
    matrix, permutation = operator()
    A = dense(matrix, permutation)
    x, e = draw(B, 1, H, W).detach(), draw(B, 1, H, W, seed=1).detach()
    y = draw(B, H * W // N, q).detach()
    a, a_prev = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    x0 = ((x - (1 - a) ** 0.5 * e) / a**0.5).flatten(1)
    x0 = x0 - (x0 @ A.t() - y.flatten(1)) @ A
    expected = a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * e.flatten(1)
    torch.testing.assert_close(ops.project_step(x, e, y, matrix, permutation, a, a_prev).flatten(1), expected)


def test_project_step_at_the_last_step_gives_finite_gradients() -> None:
    matrix, permutation = operator()
    x, e, a = draw(B, 1, H, W), draw(B, 1, H, W, seed=1), scalar(0.3)
    y = draw(B, H * W // N, q)
    one = torch.ones(1, dtype=torch.float64)
    ops.project_step(x, e, y, matrix, permutation, a, one).square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, e, y, a))


@pytest.mark.parametrize("r", [2, 4])
def test_inject_is_the_published_pair_of_convolutions(r: int) -> None:
    C = 3 * r * r
    h, z, gz, aty = draw(B, C, 3, 5), draw(B, 1, 3 * r, 5 * r), draw(B, 1, 3 * r, 5 * r, seed=1), draw(B, 1, 3 * r, 5 * r)
    w_read, b_read, w_write, b_write = draw(1, 3, 1, 1), draw(1), draw(3, 3, 1, 1), draw(3)
    read = F.conv2d(F.pixel_shuffle(h, r), w_read, b_read)
    torch.testing.assert_close(ops.inject_read(h, w_read, b_read, r), read)
    written = h + F.pixel_unshuffle(F.conv2d(torch.cat([z, gz, aty], 1), w_write, b_write), r)
    torch.testing.assert_close(ops.inject_write(h, z, gz, aty, w_write, b_write, r), written)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "one image, channels last", "strided", "expanded"])
def test_group_norm_silu_is_its_two_modules_in_any_layout(silu: bool, layout: str) -> None:
    x = draw(2, 6, 7, 10).detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "one image, channels last":
        x = draw(7, 10, 6, 1).detach().permute(3, 2, 0, 1)  # its first stride is 1
    elif layout == "strided":
        x = x[..., ::2]
    elif layout == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    weight, bias = draw(6), draw(6, seed=1)
    expected = F.group_norm(x, 3, weight, bias)
    expected = F.silu(expected) if silu else expected
    for implementation in ("reference", None):
        with ops.use(implementation):
            torch.testing.assert_close(ops.group_norm_silu(x, weight, bias, 3, silu=silu), expected)


def test_group_norm_silu_keeps_its_digits_on_a_mean_of_100_and_a_deviation_of_a_hundredth() -> None:
    x = draw(2, 6, 40, 40).detach() * 0.01 + 100
    weight, bias = draw(6).detach(), draw(6, seed=1).detach()
    found = ops.group_norm_silu(x.float(), weight.float(), bias.float(), 3)
    eager = F.silu(F.group_norm(x.float(), 3, weight.float(), bias.float()))
    exact = F.silu(F.group_norm(x.float().double(), 3, weight, bias))
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geglu_is_value_times_exact_gelu(dtype: torch.dtype) -> None:
    h = draw(30, 50, 14, dtype=dtype).detach()
    value, gate = h.double().chunk(2, -1)
    exact = value * F.gelu(gate)
    eager = h.chunk(2, -1)[0] * F.gelu(h.chunk(2, -1)[1])
    assert (ops.geglu(h) - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_ops_keep_their_precision_under_autocast() -> None:
    matrix, permutation = operator(torch.float32)
    x = draw(B, 1, H, W, dtype=torch.float32).detach()
    plain = ops.measure(x, matrix, permutation)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.measure(x, matrix, permutation)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: ops.measure(torch.zeros(1, 2, H, W), m, p), "expected \\(B, 1, H, W\\)"),
        (lambda m, p: ops.measure(torch.zeros(1, 1, H, W + 1), m, p), "permutation is"),
        (lambda m, p: ops.measure(torch.zeros(1, 1, H, W).double(), m, p), "matrix is"),
        (lambda m, p: ops.measure(torch.zeros(1, 1, H, W), m.clone().requires_grad_(), p), "Φ is fixed"),
        (lambda m, p: ops.adjoint(torch.zeros(1, 3, q + 1), m, p, H, W), "y is"),
        (lambda m, p: ops.couple(torch.zeros(2), torch.zeros(3), torch.ones(1)), "must preserve the shape"),
        (lambda m, p: ops.couple(torch.zeros(3), torch.zeros(3), torch.ones(2)), "one element"),
        (lambda m, p: ops.geglu(torch.zeros(2, 3)), "even"),
        (lambda m, p: ops.group_norm_silu(torch.zeros(1, 6, 2), torch.ones(6), torch.ones(6), 4), "does not divide"),
        (lambda m, p: ops.layer_norm(torch.zeros(1, 6), torch.ones(5), torch.ones(5)), "the last dimension of x"),
        (lambda m, p: chunked_feed_forward(*[torch.zeros(2, 2)] * 5, 0), "rows: 0"),
        (lambda m, p: ops.inject_read(torch.zeros(1, 7, 2, 2), torch.ones(1, 2, 1, 1), torch.ones(1), 2), "h is"),
    ],
)
def test_wrong_arguments_are_refused_with_their_name(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*operator(torch.float32))


@pytest.mark.parametrize("stream", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("body", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["couple", "decouple", "couple_backward", "uncouple"])
def test_references_lie_in_memory_as_compiled_code_expects(
    name: str, body: torch.memory_format, stream: torch.memory_format
) -> None:
    """torch.compile goes by the fake kernel, whatever implementation runs."""
    torch.manual_seed(0)
    F, s, d = (torch.randn(2, 3, 4, 5).contiguous(memory_format=f) for f in (body, stream, stream))
    v = torch.tensor([0.4])
    given = {"couple": (F, s, v), "decouple": (s, F, v), "couple_backward": (d, F, s, v), "uncouple": (s, F, d, v)}[name]
    with registry.use("reference"):
        torch.library.opcheck(registry.OPS[name].overload, given, test_utils=("test_faketensor",))


def test_geglu_of_transposed_tokens_lies_as_compiled_code_expects() -> None:
    h = torch.randn(2, 8, 3).mT
    with registry.use("reference"):
        torch.library.opcheck(registry.OPS["geglu"].overload, (h,), test_utils=("test_faketensor",))
