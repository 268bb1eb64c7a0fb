"""Parity of the CUDA kernels in C++, on a GPU where there is one, and everywhere on an emulation of one (emulated.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import test_couple as coupling
import test_geglu as gated
import test_group_norm_silu as norm
import test_inject as injector
import test_layer_norm as rows
import test_project as projection
import test_whole_model as whole
import torch
from builder import CannotBuild
from parity import LAYOUTS, around_100, assert_parity, draw, run
from test_whole_model import exact_convolutions
from torch.utils._python_dispatch import TorchDispatchMode

from idm_fast import ops
from idm_fast.ops import native, registry
from idm_fast.ops import projection as operators

__all__ = ["exact_convolutions"]


@pytest.fixture(scope="session")
def emulated_functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Any]]:
    """The ops on the emulation; IDM_FAST_EMULATED names a library that was built before, with sanitizers."""
    given = os.environ.get("IDM_FAST_EMULATED")
    try:
        return emulated.functions(Path(given) if given else emulated.build(tmp_path_factory.mktemp("emulated")))
    except CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a test's tensors; on the CPU, implementation "cuda" is the emulated one for the time of the test."""
    reason = native.load_cuda()
    if request.param == "cuda":
        if reason:
            pytest.skip(reason)
        return "cuda"
    for name, function in request.getfixturevalue("emulated_functions").items():
        monkeypatch.setitem(registry.OPS[name].implementations, "cuda", (function, ("cpu",)))
    return "cpu"


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty and its kin give NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_twice(name: str, arguments: tuple) -> None:
    first, second = (run(name, "cuda", arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(1,), (3, 7, 61), (0, 3, 5), (4 * 1024 + 8,)], ids=str)
@pytest.mark.parametrize("dtypes", coupling.DTYPES)
@pytest.mark.parametrize("name", coupling.OPS)
def test_coupling_in_every_dtype_and_size(device: str, name: str, dtypes: str, shape: tuple) -> None:
    body, stream = coupling.DTYPES[dtypes]
    given = coupling.arguments(name, draw(*shape, dtype=body, device=device), 0.4, stream)
    assert_parity(name, "cuda", given, coupling.scales(name, given))


@pytest.mark.parametrize(("body_layout", "stream_layout"), coupling.PAIRS)
@pytest.mark.parametrize("name", coupling.OPS)
def test_coupling_in_every_layout(device: str, name: str, body_layout: str, stream_layout: str) -> None:
    F = draw(3, 16, 9, 17, dtype=torch.bfloat16, device=device, layout=body_layout)
    given = coupling.arguments(name, F, 0.7, torch.float32, stream_layout)
    assert_parity(name, "cuda", given, coupling.scales(name, given))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_uncouple_in_place_writes_what_uncouple_returns(device: str, layout: str) -> None:
    F = draw(3, 6, 5, 7, dtype=torch.bfloat16, device=device, layout=layout)
    y1, F, d1, v = coupling.arguments("uncouple", F, 0.4, torch.float32, layout)
    expected = run("uncouple", "cuda", (y1, F, d1, v))
    found = run("uncouple_", "cuda", (y1, F, d1, v))
    assert all(torch.equal(a, b) for a, b in zip(expected, (y1, *found), strict=True))


def test_coupling_keeps_the_layout_and_is_the_same_from_run_to_run(device: str) -> None:
    F = draw(2, 8, 29, 31, dtype=torch.bfloat16, device=device, layout="channels_last")
    given = coupling.arguments("uncouple", F, 0.4, torch.float32, "channels_last")
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in run("uncouple", "cuda", given)[:3])
    assert_same_twice("uncouple", given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda F, x2, v: (F[:1], x2, v), r"x2 is \(2, 3\), expected \(1, 3\) as F"),
        (lambda F, x2, v: (F, x2.half(), v), "x2 must be float32 or float64"),
        (lambda F, x2, v: (F.int(), x2, v), "F: its dtype is none of"),
        (lambda F, x2, v: (F, x2, v.expand(2)), r"v is \(2\), expected one element"),
    ],
)
def test_couple_refuses_what_does_not_fit(device: str, change: Callable[..., tuple], message: str) -> None:
    given = coupling.arguments("couple", draw(2, 3, dtype=torch.float32, device=device), 0.4, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        run("couple", "cuda", change(*given))


NORM_SHAPES = norm.SHAPES | {
    "16-byte pieces": ((2, 16, 24, 32), 4),
}


@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
@pytest.mark.parametrize("case", NORM_SHAPES)
def test_group_norm_silu_in_every_dtype_and_size(device: str, case: str, dtype: torch.dtype) -> None:
    shape, groups = NORM_SHAPES[case]
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        x, dout = (draw(*shape, dtype=dtype, device=device, seed=seed, layout=layout) for seed in (0, 5))
        norm.assert_both_ways("cuda", x, dout, groups, silu=True)


def test_group_norm_silu_with_more_channels_than_a_block_takes(device: str) -> None:
    x, dout = (draw(1, 1040, 1, 2, dtype=torch.float32, device=device, seed=s, layout="channels_last") for s in (0, 5))
    norm.assert_both_ways("cuda", x, dout, 13, silu=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dout_layout", ["contiguous", "channels_last", "expanded"])
def test_group_norm_without_silu_in_every_layout(device: str, layout: str, dout_layout: str) -> None:
    x = draw(2, 6, 7, 9, dtype=torch.bfloat16, device=device, layout=layout)
    dout = draw(2, 6, 7, 9, dtype=torch.bfloat16, device=device, seed=5, layout=dout_layout)
    norm.assert_both_ways("cuda", x, dout, 3, silu=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("offset", "scale", "outlier"), [(100.0, 0.01, None), (0.0, 1.0, 1e4), (0.0, 1.0, -1e4)])
def test_group_norm_keeps_digits(device: str, layout: str, offset: float, scale: float, outlier: float | None) -> None:
    x = (draw(2, 6, 40, 40, dtype=torch.float64, device=device, layout=layout) * scale + offset).float()
    if outlier is not None:
        x[:, :, 0, 0] = outlier
    given = norm.forward_arguments(x, 3, False, torch.float32)
    assert_parity("group_norm_silu", "cuda", given, norm.forward_scales(given))


@pytest.mark.parametrize("out", norm.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", norm.DTYPES, ids=str)
def test_group_norm_silu_takes_and_gives_any_pair_of_dtypes(device: str, dtype: torch.dtype, out: torch.dtype) -> None:
    x = draw(2, 8, 5, 7, dtype=dtype, device=device, layout="channels_last")
    given = norm.forward_arguments(x, 4, True, out)
    assert_parity("group_norm_silu", "cuda", given, norm.forward_scales(given))
    dout, *rest = norm.backward_arguments(draw(2, 8, 5, 7, dtype=out, device=device, seed=5), x, 4, True)
    assert_parity("group_norm_silu_backward", "cuda", (dout, *rest), norm.backward_scales((dout, *rest)))


def test_group_norm_silu_keeps_the_layout_and_is_the_same_from_run_to_run(device: str) -> None:
    x, dout = (draw(2, 8, 71, 29, dtype=torch.float32, device=device, seed=s, layout="channels_last") for s in (0, 5))
    out = run("group_norm_silu", "cuda", norm.forward_arguments(x, 2, True, torch.bfloat16))[0]
    given = norm.backward_arguments(dout, x, 2, True)
    assert all(t.stride() == x.stride() for t in (out, run("group_norm_silu_backward", "cuda", given)[0]))
    assert_same_twice("group_norm_silu_backward", given)


@pytest.mark.parametrize("dtype", [*projection.DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*projection.SHAPES, (0, 4, 4, 8, 3)], ids=str)
@pytest.mark.parametrize("name", projection.OPS)
def test_projection_in_every_dtype_and_size(device: str, name: str, shape: tuple, dtype: torch.dtype) -> None:
    given = projection.arguments(name, shape, dtype, device)
    if shape[0] == 0:
        assert all(t.shape[0] == 0 or not t.any() for t in run(name, "cuda", given))
    else:
        assert_parity(name, "cuda", given, projection.scales(name, given))


@pytest.mark.parametrize("layout", ["strided", "expanded", "unaligned", "transposed"])
@pytest.mark.parametrize("name", projection.OPS)
def test_projection_in_every_layout(device: str, name: str, layout: str) -> None:
    given = projection.arguments(name, (2, 6, 8, 16, 5), torch.float16, device, layout)
    assert_parity(name, "cuda", given, projection.scales(name, given))


def test_gradients_of_a_step_are_the_same_from_run_to_run(device: str) -> None:
    given = projection.arguments("project_step_backward", (3, 8, 16, 64, 7), torch.float32, device)
    assert_same_twice("project_step_backward", given)


@pytest.mark.parametrize("entry", [-1, 48, 2**62, -(2**63)])
@pytest.mark.parametrize("name", projection.OPS)
def test_entries_of_the_permutation_out_of_range_are_not_followed(device: str, name: str, entry: int) -> None:
    given = projection.arguments(name, (2, 6, 8, 16, 5), torch.float32, device)
    permutation = next(t for t in given if isinstance(t, torch.Tensor) and t.dtype == torch.int64)
    lost = int(permutation[3])
    permutation[3] = entry
    outputs = run(name, "cuda", given)
    if name == "measure":  # the first row of each image has no value for one of its pixels
        assert outputs[0].isnan().any(2).tolist() == [[True, False, False]] * 2
    else:
        assert outputs[0].flatten(1).isnan()[:, lost].all()  # nobody writes it; memory was NaN


def test_a_projection_refuses_what_does_not_fit(device: str) -> None:
    x, matrix, permutation = projection.arguments("measure", (2, 6, 8, 16, 5), torch.float32, device)
    for change, message in (
        ((x[:, 0], matrix, permutation), r"x is \(2, 6, 8\), expected \(B, 1, H, W\)"),
        ((x, matrix.double(), permutation), "matrix must have the dtype of x"),
        ((x, matrix, permutation.int()), "permutation must be int64"),
        ((x, matrix, permutation[1:]), r"permutation is \(47\), expected \(48,\)"),
        ((x, matrix[1:], permutation), "48 pixels cannot be cut into rows of 15"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("measure", "cuda", change)


def assert_geglu_both_ways(h: torch.Tensor, dout: torch.Tensor) -> None:
    assert_parity("geglu", "cuda", (h,))
    assert_parity("geglu_backward", "cuda", (dout, h))


@pytest.mark.parametrize("dtype", gated.DTYPES, ids=str)
@pytest.mark.parametrize("shape", gated.SHAPES, ids=str)
def test_geglu_in_every_dtype_and_size(device: str, shape: tuple, dtype: torch.dtype) -> None:
    h = draw(*shape, dtype=dtype, device=device)
    assert_geglu_both_ways(h, draw(*shape[:-1], shape[-1] // 2, dtype=dtype, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_geglu_in_every_layout(device: str, layout: str) -> None:
    h = draw(3, 4, 5, 16, dtype=torch.float32, device=device, layout=layout)
    assert_geglu_both_ways(h, draw(3, 4, 5, 8, dtype=torch.float32, device=device, layout=layout))


RUNS = injector.SHAPES + [(2, 5, 4, 6, 2), (1, 67, 3, 4, 2), (1, 2, 2, 3, 3), (1, 3, 12, 30, 4)]
"""Also runs of pixels for 16-byte accesses, more channels than a block sums at once, r² that no run divides, many blocks."""


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [*injector.DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", RUNS, ids=str)
@pytest.mark.parametrize("name", injector.OPS)
def test_injector_in_every_dtype_and_size(device: str, name: str, shape: tuple, dtype: torch.dtype, layout: str) -> None:
    B, c, height, width, r = shape
    given = injector.arguments(name, draw(B, c * r * r, height, width, dtype=dtype, device=device, layout=layout), r)
    assert_parity(name, "cuda", given, injector.scales(name, given))


@pytest.mark.parametrize("layout", ["strided", "expanded", "unaligned", "transposed"])
@pytest.mark.parametrize("name", injector.OPS)
def test_injector_in_every_layout(device: str, name: str, layout: str) -> None:
    given = injector.arguments(name, draw(2, 12, 5, 6, dtype=torch.float16, device=device, layout=layout), 2)
    assert_parity(name, "cuda", given, injector.scales(name, given))


@pytest.mark.parametrize("stream_layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float64),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["inject_couple", "inject_couple_backward", "inject_uncouple"])
def test_coupled_injector_with_any_stream(
    device: str, name: str, dtype: torch.dtype, stream: torch.dtype, stream_layout: str
) -> None:
    h = draw(2, 12, 4, 6, dtype=dtype, device=device, layout="channels_last")
    streams = [draw(*h.shape, dtype=stream, device=device, seed=seed, layout=stream_layout) for seed in (9, 10)]
    given = tuple(
        streams.pop(0) if isinstance(a, torch.Tensor) and a.shape == h.shape and a is not h else a
        for a in injector.arguments(name, h, 2)
    )
    assert_parity(name, "cuda", given, injector.scales(name, given))


@pytest.mark.parametrize("name", injector.OPS)
def test_injector_keeps_the_layout_and_is_the_same_from_run_to_run(device: str, name: str) -> None:
    given = injector.arguments(name, draw(2, 20, 9, 13, dtype=torch.float32, device=device, layout="channels_last"), 2)
    features = [t for t in run(name, "cuda", given) if t.shape == (2, 20, 9, 13)]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in features)
    assert_same_twice(name, given)


@pytest.mark.parametrize("name", injector.OPS)
def test_injector_of_an_empty_batch_gives_empty_images_and_no_gradient(device: str, name: str) -> None:
    outputs = run(name, "cuda", injector.arguments(name, torch.empty(0, 12, 2, 2, device=device), 2))
    assert all(t.shape[0] == 0 or not t.any() for t in outputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_uncoupling_an_injector_in_place_gives_the_bits_of_uncoupling(device: str, layout: str) -> None:
    h = draw(2, 12, 5, 6, dtype=torch.bfloat16, device=device, layout="channels_last")
    _, *rest = injector.arguments("inject_uncouple", h, 2)
    y1 = draw(2, 12, 5, 6, dtype=torch.float32, device=device, seed=9, layout=layout)
    expected = run("inject_uncouple", "cuda", (y1, *rest))
    found = run("inject_uncouple_", "cuda", (y1, *rest))
    assert all(torch.equal(a, b) for a, b in zip(expected, (y1, *found), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": lambda h: h[:, :11]}, "r is 2, expected 1 … 64 with r² a divisor of the 11 channels of h"),
        ({"z": lambda z: z[..., 1:]}, r"z is \(2, 1, 8, 11\), expected \(2, 1, 8, 12\)"),
        ({"aty": lambda aty: aty.double()}, "aty must have the dtype of h"),
        ({"bias": lambda bias: bias[1:]}, r"bias is \(2\), expected \(3,\)"),
        ({"x2": lambda x2: x2[:, :8]}, r"x2 is \(2, 8, 4, 6\), expected \(2, 12, 4, 6\) as h"),
        ({"d1": lambda d1: d1.double()}, "d1 must have the dtype of x2"),
        ({"d1": lambda d1: d1.half(), "x2": lambda x2: x2.half()}, "x2 must be float32 or float64"),
        ({"v": lambda v: v.expand(2)}, r"v is \(2\), expected one element"),
    ],
)
def test_a_coupled_injector_refuses_what_does_not_fit(device: str, changes: dict[str, Callable], message: str) -> None:
    names = ("d1", "h", "z", "gz", "aty", "weight", "bias", "x2", "v", "r")
    given = injector.arguments("inject_couple_backward", draw(2, 12, 4, 6, dtype=torch.float32, device=device), 2)
    damaged = [changes[name](value) if name in changes else value for name, value in zip(names, given, strict=True)]
    with pytest.raises(RuntimeError, match=message):
        run("inject_couple_backward", "cuda", tuple(damaged))


ROWS = [*(shape for shape in rows.SHAPES if shape[-1]), (70, 37), (33, 16), (2, 8200)]
"""Also several blocks of rows, aligned and not, and more columns than a block takes at a time."""


@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_layer_norm_in_every_dtype_and_size(device: str, shape: tuple, dtype: torch.dtype) -> None:
    x, dout = (draw(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 5))
    rows.assert_both_ways("cuda", x, dout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dout_layout", ["contiguous", "expanded", "transposed"])
def test_layer_norm_in_every_layout(device: str, layout: str, dout_layout: str) -> None:
    x = draw(2, 3, 5, 14, dtype=torch.float32, device=device, layout=layout)
    dout = draw(2, 3, 5, 14, dtype=torch.float32, device=device, seed=5, layout=dout_layout)
    rows.assert_both_ways("cuda", x, dout)


@pytest.mark.parametrize("out", rows.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_layer_norm_takes_and_gives_any_pair_of_dtypes(device: str, dtype: torch.dtype, out: torch.dtype) -> None:
    given = rows.forward_arguments(draw(5, 48, dtype=dtype, device=device), out)
    assert_parity("layer_norm", "cuda", given, rows.forward_scales(given))
    given = rows.backward_arguments(draw(5, 48, dtype=out, device=device, seed=5), given[0])
    assert_parity("layer_norm_backward", "cuda", given, rows.backward_scales(given))


def test_layer_norm_keeps_digits(device: str) -> None:
    x, dout = around_100(32, 336, device=device), draw(32, 336, dtype=torch.float32, device=device, seed=5)
    assert torch.equal(run("layer_norm", "cuda", rows.forward_arguments(x, x.dtype))[1].double(), x.double().mean(-1, True))
    rows.assert_both_ways("cuda", x, dout)
    x = draw(3, 320, dtype=torch.float32, device=device)
    x[:, 0] = torch.tensor([1e4, -1e4, 1e4])
    given = rows.forward_arguments(x, torch.float32)
    assert_parity("layer_norm", "cuda", given, rows.forward_scales(given))


def test_gradients_of_layer_norm_are_the_same_from_run_to_run(device: str) -> None:
    x, dout = (draw(300, 24, dtype=torch.float32, device=device, seed=seed) for seed in (0, 5))
    assert_same_twice("layer_norm_backward", rows.backward_arguments(dout, x))


def test_layer_norm_refuses_what_does_not_fit(device: str) -> None:
    x, weight, bias, eps, dtype = rows.forward_arguments(draw(3, 8, dtype=torch.float32, device=device), torch.float32)
    for change, message in (
        ((x[:, :0], weight, bias), r"x is \(3, 0\), expected \(…, C\)"),
        ((x, weight[1:], bias), r"weight is \(7\), expected \(8,\)"),
        ((x, weight, bias.int()), "bias: its dtype is none of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("layer_norm", "cuda", (*change, eps, dtype))
    dout, *given, mean, rstd = rows.backward_arguments(x, x)
    with pytest.raises(RuntimeError, match=r"mean is \(2, 1\), expected one number for each row of x, \(3, 8\)"):
        run("layer_norm_backward", "cuda", (dout, *given, mean[1:], rstd))


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch is asked for TF32 in matrix products of float32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """To 10 stored bits of the significand, ties away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def eager_in_tf32(tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference multiplies in TF32. On a GPU, too, it needs telling: cuBLAS multiplies some shapes in float32 even so."""

    def measure(x: torch.Tensor, matrix: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        return exact["measure"](rounded(x), rounded(matrix), permutation)

    def adjoint(y: torch.Tensor, matrix: torch.Tensor, *where: Any) -> torch.Tensor:
        return exact["adjoint"](rounded(y), rounded(matrix), *where)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return rounded_to_tf32(t) if t.dtype == torch.float32 else t

    exact = {name: registry.OPS[name].implementations["reference"][0] for name in ("measure", "adjoint")}
    for name, function in (("measure", measure), ("adjoint", adjoint)):
        monkeypatch.setattr(operators, f"{name}_reference", function)
        monkeypatch.setitem(registry.OPS[name].implementations, "reference", (function, None))


@pytest.mark.parametrize("shape", [*projection.SHAPES, (1, 40, 32, 64, 33)], ids=str)
@pytest.mark.parametrize("name", projection.OPS)
def test_projection_in_tf32_errs_as_eager_does(device: str, eager_in_tf32: None, name: str, shape: tuple) -> None:
    given = projection.arguments(name, shape, torch.float32, device)
    scales = projection.scales(name, given)
    # A gradient of ᾱ is a single sum; its terms, not it, are as exact as TF32, whose unit is 2¹³ of float32's.
    scales |= {k: scales[k] * 2**13 for k in (3, 4) if k in scales}
    assert_parity(name, "cuda", given, scales)


@pytest.mark.parametrize("name", ["measure", "adjoint"])
def test_products_in_tf32_are_those_of_rounded_factors(device: str, tf32: None, name: str) -> None:
    data, matrix, *rest = projection.arguments(name, (3, 12, 16, 96, 50), torch.float32, device)
    factors = [rounded_to_tf32(t) for t in (data, matrix)]
    assert torch.equal(run(name, "cuda", (data, matrix, *rest))[0], run(name, "cuda", (*factors, *rest))[0])
    assert_parity(name, "cuda", (*factors, *rest), projection.scales(name, (*factors, *rest)))


@pytest.mark.parametrize("name", projection.OPS)
def test_tf32_is_used_for_float32_alone_and_only_when_asked_for(device: str, name: str) -> None:
    matmul = torch.backends.cuda.matmul
    given = projection.arguments(name, (2, 8, 16, 64, 20), torch.float32, device)
    exact, before = run(name, "cuda", given), matmul.fp32_precision
    for ask in (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(matmul, "allow_tf32", True),
        lambda: setattr(matmul, "fp32_precision", "tf32"),
    ):
        try:
            ask()
            assert not torch.equal(run(name, "cuda", given)[0], exact[0])
        finally:
            torch.set_float32_matmul_precision("highest")
        assert torch.equal(run(name, "cuda", given)[0], exact[0])
    matmul.fp32_precision = before
    for dtype in (torch.bfloat16, torch.float64):
        given = projection.arguments(name, (2, 8, 16, 64, 20), dtype, device)
        exact = run(name, "cuda", given)
        torch.set_float32_matmul_precision("high")
        try:
            assert all(torch.equal(a, b) for a, b in zip(run(name, "cuda", given), exact, strict=True))
        finally:
            torch.set_float32_matmul_precision("highest")


def test_not_a_number_stays_one_in_tf32(device: str, tf32: None) -> None:
    x, matrix, permutation = projection.arguments("measure", (1, 4, 8, 16, 5), torch.float32, device)
    x.view(-1)[permutation[3]] = torch.nan
    assert run("measure", "cuda", (x, matrix, permutation))[0].isnan().any(2).tolist() == [[True, False]]


class Recorded(TorchDispatchMode):
    """Collects the names of the package's ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "idm_fast":
            self.names.add(func._schema.name.removeprefix("idm_fast::"))
        return func(*args, **kwargs or {})


def test_every_op_of_the_network_has_a_kernel(emulated_functions: dict[str, Callable]) -> None:
    with Recorded() as recorded:
        for schedule in ("store", "flat", "two_level"):
            whole.step(2, "reference", "cpu", schedule=schedule)
    assert {"inject_write_backward", "inject_uncouple_", "layer_norm_backward", "project_step_backward"} <= recorded.names
    assert recorded.names <= emulated_functions.keys()


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize(("schedule", "steps"), [("store", 2), ("flat", 1), ("two_level", 2)])
def test_output_and_every_gradient_of_the_network_are_right(device: str, schedule: str, steps: int) -> None:
    exact = whole.step(steps, "reference", device, torch.float64)
    found = whole.step(steps, "cuda", device, schedule=schedule)
    assert whole.error(found.pop("output"), exact["output"]) <= 1e-4
    assert max((whole.error(t, exact[name]), name) for name, t in found.items()) <= (1e-3, "")


@pytest.mark.usefixtures("exact_convolutions")
def test_output_and_gradients_of_the_network_are_as_right_as_eager_under_autocast(device: str) -> None:
    exact = whole.step(1, "reference", device, torch.float64)
    eager, found = (whole.step(1, name, device, autocast=torch.bfloat16) for name in ("reference", "cuda"))
    assert whole.error(found["output"], exact["output"]) <= 2 * whole.error(eager["output"], exact["output"])
    together = [torch.cat([t.flatten() for name, t in parts.items() if name != "output"]) for parts in (found, eager, exact)]
    assert whole.error(together[0], together[2]) <= 2 * whole.error(together[1], together[2])


def test_an_op_without_a_kernel_is_refused_by_name(device: str) -> None:
    with ops.use("cuda"), pytest.raises(RuntimeError, match="pack_bits has no 'cuda' implementation"):
        ops.pack_bits(torch.zeros(3, dtype=torch.uint8, device=device), 1)


@pytest.mark.gpu
def test_all_ops_are_captured_in_a_cuda_graph_on_another_stream(tf32: None) -> None:
    if reason := native.load_cuda():
        pytest.skip(reason)
    step = projection.arguments("project_step_backward", (2, 16, 16, 64, 7), torch.bfloat16, "cuda")
    x, dout = (draw(2, 8, 9, 11, dtype=torch.float32, device="cuda", seed=s) for s in (0, 5))
    h = draw(2, 12, 6, 10, dtype=torch.bfloat16, device="cuda", layout="channels_last")
    calls = {
        "uncouple": coupling.arguments("uncouple", draw(1000, dtype=torch.bfloat16, device="cuda"), 0.4, torch.float32),
        "project_step_backward": step,
        "measure": projection.arguments("measure", (2, 16, 16, 64, 7), torch.float32, "cuda"),
        "group_norm_silu_backward": norm.backward_arguments(dout, x, 2, True),
        "layer_norm_backward": rows.backward_arguments(dout, x),
        "geglu_backward": (draw(3, 8, dtype=torch.bfloat16, device="cuda"), draw(3, 16, dtype=torch.bfloat16, device="cuda")),
        "inject_read_backward": injector.arguments("inject_read_backward", h, 2),
        "inject_uncouple": injector.arguments("inject_uncouple", h, 2),
    }
    expected = {name: run(name, "cuda", given) for name, given in calls.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = {name: run(name, "cuda", given) for name, given in calls.items()}
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for name in calls for a, b in zip(expected[name], found[name], strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on the path")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run([*command, "-k", "every_dtype_and_size", __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
