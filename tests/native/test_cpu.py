"""Parity of the CPU kernels in C++ with the float64 oracle, under every instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import test_couple as coupling
import test_geglu as gated
import test_group_norm_silu as norm
import test_inject as injector
import test_project as projection
import torch
from parity import LAYOUTS, assert_parity, draw, run
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import native, registry

if reason := native.load_cpu():
    pytest.skip(f"the C++ extension is not here: {reason}", allow_module_level=True)

from idm_fast import _C

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def runs_here(name: str) -> bool:
    before = _C.instruction_set()
    try:
        _C.use_instruction_set(name)
    except RuntimeError:
        return False
    _C.use_instruction_set(before)
    return True


@pytest.fixture(params=[name for name in ("portable", "avx2", "avx512") if runs_here(name)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set whose kernels run."""
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty and its kin give NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer_arguments(x: Tensor, dout: Tensor) -> tuple[tuple, tuple]:
    """Arguments of layer_norm and of its gradient."""
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (draw(x.shape[-1], dtype=parameter, device="cpu", seed=seed) for seed in (1, 2))
    forward = (x, weight, bias, 1e-5, x.dtype)
    _, mean, rstd = run("layer_norm", "reference", forward)
    return forward, (dout, x, weight, bias, mean, rstd)


def assert_layer_parity(x: Tensor, dout: Tensor) -> None:
    forward, backward = layer_arguments(x, dout)
    rstd = backward[-1]
    assert_parity("layer_norm", "cpu", forward, {1: 1 / rstd.double().min()} if x.numel() else {})
    terms = (dout.double() * backward[2].double() * rstd).abs().max() if x.numel() else torch.tensor(0.0)
    # Of x̂ at least one: x and the mean, which it is the difference of, are not exact.
    normalized = ((x.double() - backward[4]) * rstd).abs().clamp(min=1)
    products = (dout.double() * normalized).reshape(-1, x.shape[-1]).norm(dim=0).max()
    assert_parity("layer_norm_backward", "cpu", backward, {0: terms, 1: products})


@pytest.mark.parametrize("dtypes", coupling.DTYPES)
@pytest.mark.parametrize("name", coupling.OPS)
def test_couplings_in_every_dtype_and_size(isa: str, name: str, dtypes: str) -> None:
    body, stream = coupling.DTYPES[dtypes]
    for shape in coupling.SHAPES:
        given = coupling.arguments(name, draw(*shape, dtype=body, device="cpu"), 0.4, stream)
        assert_parity(name, "cpu", given, coupling.scales(name, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", projection.OPS)
def test_projections_in_every_dtype_and_size(isa: str, name: str, dtype: torch.dtype) -> None:
    for shape in [*projection.SHAPES, (2, 32, 64, 1024, 103)]:
        given = projection.arguments(name, shape, dtype, "cpu")
        assert_parity(name, "cpu", given, projection.scales(name, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", injector.OPS)
def test_injectors_in_every_dtype_and_size(isa: str, name: str, dtype: torch.dtype) -> None:
    for B, c, height, width, r in [*injector.SHAPES, (2, 6, 24, 24, 2), (1, 3, 5, 700, 2)]:
        given = injector.arguments(name, draw(B, c * r * r, height, width, dtype=dtype, device="cpu"), r)
        assert_parity(name, "cpu", given, injector.scales(name, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", norm.SHAPES)
def test_group_norms_in_every_dtype_and_size(isa: str, case: str, dtype: torch.dtype) -> None:
    shape, groups = norm.SHAPES[case]
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        x, dout = (draw(*shape, dtype=dtype, device="cpu", seed=seed, layout=layout) for seed in (0, 5))
        for silu in (True, False):
            norm.assert_both_ways("cpu", x, dout, groups, silu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_and_layer_norm_in_every_dtype_and_size(isa: str, dtype: torch.dtype) -> None:
    for shape in gated.SHAPES:
        h = draw(*shape, dtype=dtype, device="cpu")
        dout = draw(*shape[:-1], shape[-1] // 2, dtype=dtype, device="cpu")
        assert_parity("geglu", "cpu", (h,))
        assert_parity("geglu_backward", "cpu", (dout, h))
    for shape in ((5, 7), (2, 3, 320), (1, 1), (0, 4), (130, 64)):
        assert_layer_parity(*(draw(*shape, dtype=dtype, device="cpu", seed=seed) for seed in (0, 5)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_op_in_every_layout(layout: str) -> None:
    x, dout = (draw(2, 12, 6, 9, dtype=torch.float32, device="cpu", seed=seed, layout=layout) for seed in (0, 5))
    norm.assert_both_ways("cpu", x, dout, 3, True)
    assert_layer_parity(x, dout)
    assert_parity("geglu", "cpu", (x[..., :8],))
    for name in coupling.OPS:
        given = coupling.arguments(name, x, 0.7, torch.float32, layout)
        assert_parity(name, "cpu", given, coupling.scales(name, given))
    for name in injector.OPS:
        given = injector.arguments(name, x, 2)
        assert_parity(name, "cpu", given, injector.scales(name, given))
    if layout != "channels_last":
        for name in projection.OPS:
            given = projection.arguments(name, (2, 6, 8, 16, 5), torch.float16, "cpu", layout)
            assert_parity(name, "cpu", given, projection.scales(name, given))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_digits_are_kept_on_a_mean_of_100_and_a_deviation_of_a_hundredth(isa: str, layout: str) -> None:
    x = (draw(2, 6, 40, 40, dtype=torch.float64, device="cpu", layout=layout) * 0.01 + 100).float()
    norm.assert_both_ways("cpu", x, draw(2, 6, 40, 40, dtype=torch.float32, device="cpu", seed=5), 3, True)


def test_dtypes_may_differ_between_x_and_the_output(isa: str) -> None:
    for dtype in DTYPES:
        for out in DTYPES:
            x, dout = draw(2, 6, 5, 7, dtype=dtype, device="cpu"), draw(2, 6, 5, 7, dtype=out, device="cpu", seed=5)
            forward = norm.forward_arguments(x, 3, True, out)
            backward = norm.backward_arguments(dout, x, 3, True)
            assert_parity("group_norm_silu", "cpu", forward, norm.forward_scales(forward))
            assert_parity("group_norm_silu_backward", "cpu", backward, norm.backward_scales(backward))


def test_float16_is_converted_as_pytorch_does(isa: str) -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    F = everything[everything.isfinite()]
    x2, v = torch.zeros(F.shape), torch.tensor([0.0])
    assert torch.equal(run("couple", "cpu", (F, x2, v))[0], F.float())
    d1 = draw(4096, dtype=torch.float32, device="cpu") * 10.0 ** torch.linspace(-9, 6, 4096)
    dF, *_ = run("couple_backward", "cpu", (d1, torch.zeros(4096, dtype=torch.float16), d1, v))
    assert torch.equal(dF, d1.half())


def many_calls() -> list[tuple[str, tuple]]:
    """Every op with enough elements for several pieces of work."""
    x, dout = (draw(2, 48, 31, 32, dtype=torch.float32, device="cpu", seed=seed) for seed in (0, 5))
    last = x.contiguous(memory_format=torch.channels_last)
    calls = [(name, injector.arguments(name, x, 4)) for name in injector.OPS]
    calls += [(name, coupling.arguments(name, x, 0.4, torch.float32)) for name in coupling.OPS]
    calls += [(name, projection.arguments(name, (3, 32, 32, 64, 30), torch.float32, "cpu")) for name in projection.OPS]
    for t in (x, last):
        calls.append(("group_norm_silu", norm.forward_arguments(t, 8, True, torch.float32)))
        calls.append(("group_norm_silu_backward", norm.backward_arguments(dout, t, 8, True)))
    calls += [("geglu", (x,)), ("geglu_backward", (dout[..., :16], x))]
    layer, layer_backward = layer_arguments(x, dout)
    return [*calls, ("layer_norm", layer), ("layer_norm_backward", layer_backward)]


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for name, given in many_calls():
            torch.set_num_threads(1)
            alone = run(name, "cpu", given)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert all(torch.equal(a, b) for a, b in zip(alone, run(name, "cpu", given), strict=True)), name
    finally:
        torch.set_num_threads(threads)


def test_every_op_of_the_network_has_a_cpu_kernel() -> None:
    missing = {name for name, op in registry.OPS.items() if "cpu" not in op.implementations}
    assert missing == {"pack_bits", "unpack_bits", "to_fixed", "from_fixed"} | {
        f"fixed_{name}" for name in ("add", "couple", "decouple", "uncouple")
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operators_obey_opcheck(layout: str) -> None:
    h = draw(2, 12, 2, 4, dtype=torch.float32, device="cpu", layout=layout)
    calls = [(name, injector.arguments(name, h, 2)) for name in injector.OPS]
    calls += [(name, projection.arguments(name, (1, 4, 4, 8, 3), torch.float32, "cpu")) for name in projection.OPS]
    calls.append(("group_norm_silu", norm.forward_arguments(h, 3, True, torch.bfloat16)))
    calls.append(("group_norm_silu_backward", norm.backward_arguments(h, h, 3, True)))
    calls += [("geglu", (h,)), ("geglu_backward", (h[..., :2], h)), ("layer_norm", layer_arguments(h, h)[0])]
    with ops.use("cpu"):
        for name, given in calls:
            torch.library.opcheck(registry.OPS[name].overload, given)


@pytest.mark.parametrize("name", projection.OPS)
@pytest.mark.parametrize("entry", [-1, 64, 2**40])
def test_a_permutation_out_of_range_is_an_error(name: str, entry: int) -> None:
    given = projection.arguments(name, (1, 8, 8, 16, 5), torch.float32, "cpu")
    permutation = next(t for t in given if isinstance(t, Tensor) and t.dtype == torch.int64)
    permutation[17] = entry
    with pytest.raises(RuntimeError, match=r"permutation has entries outside of \[0, 64\)"):
        run(name, "cpu", given)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("measure", lambda x, m, p: (x[:, :, :7], m, p), "permutation is"),
        ("measure", lambda x, m, p: (x.double(), m, p), "matrix must have the dtype of x"),
        ("measure", lambda x, m, p: (x, m, p.int()), "permutation must be int64"),
        ("inject_read", lambda h, w, b, r: (h, w, b, 3), "r is 3"),
        ("inject_read", lambda h, w, b, r: (h, w[:, :1], b, r), "weight is"),
        ("group_norm_silu", lambda x, w, b, *rest: (x, w[:3], b, *rest), "weight is"),
        ("geglu", lambda h: (h[..., :3],), "h is"),
    ],
)
def test_wrong_arguments_are_named(name: str, spoil: Callable[..., tuple], message: str) -> None:
    h = draw(2, 12, 2, 4, dtype=torch.float32, device="cpu")
    given = {
        "measure": projection.arguments("measure", (1, 8, 8, 16, 5), torch.float32, "cpu"),
        "inject_read": injector.arguments("inject_read", h, 2),
        "group_norm_silu": norm.forward_arguments(h, 3, True, torch.float32),
        "geglu": (h,),
    }[name]
    with pytest.raises(RuntimeError, match=message):
        run(name, "cpu", spoil(*given))
