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
import test_project as projection
import torch
from parity import LAYOUTS, assert_parity, draw, run

from idm_fast import ops
from idm_fast.ops import native, registry


@pytest.fixture(scope="module")
def emulated_functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Any]]:
    """The ops on the emulation; IDM_FAST_EMULATED names a library that was built before, with sanitizers."""
    given = os.environ.get("IDM_FAST_EMULATED")
    try:
        return emulated.functions(Path(given) if given else emulated.build(tmp_path_factory.mktemp("emulated")))
    except emulated.build_script().CannotBuild as reason:
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


INJECTOR_OPS = ("inject_read", "inject_read_backward", "inject_write", "inject_write_backward")


@pytest.mark.parametrize("dtype", injector.DTYPES, ids=str)
@pytest.mark.parametrize("shape", injector.SHAPES, ids=str)
@pytest.mark.parametrize("name", INJECTOR_OPS)
def test_injector_in_every_dtype_and_size(device: str, name: str, shape: tuple, dtype: torch.dtype) -> None:
    B, c, height, width, r = shape
    given = injector.arguments(name, draw(B, c * r * r, height, width, dtype=dtype, device=device), r)
    assert_parity(name, "cuda", given, injector.scales(name, given))


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded", "unaligned", "transposed"])
@pytest.mark.parametrize("name", INJECTOR_OPS)
def test_injector_in_every_layout(device: str, name: str, layout: str) -> None:
    given = injector.arguments(name, draw(2, 12, 5, 6, dtype=torch.float16, device=device, layout=layout), 2)
    assert_parity(name, "cuda", given, injector.scales(name, given))


def test_an_op_without_a_kernel_is_refused_by_name(device: str) -> None:
    with ops.use("cuda"), pytest.raises(RuntimeError, match="pack_bits has no 'cuda' implementation"):
        ops.pack_bits(torch.zeros(3, dtype=torch.uint8, device=device), 1)


@pytest.mark.gpu
def test_all_ops_are_captured_in_a_cuda_graph_on_another_stream() -> None:
    if reason := native.load_cuda():
        pytest.skip(reason)
    step = projection.arguments("project_step_backward", (2, 16, 16, 64, 7), torch.bfloat16, "cuda")
    x, dout = (draw(2, 8, 9, 11, dtype=torch.float32, device="cuda", seed=s) for s in (0, 5))
    calls = {
        "uncouple": coupling.arguments("uncouple", draw(1000, dtype=torch.bfloat16, device="cuda"), 0.4, torch.float32),
        "project_step_backward": step,
        "group_norm_silu_backward": norm.backward_arguments(dout, x, 2, True),
    }
    expected = {name: run(name, "cuda", given) for name, given in calls.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = {name: run(name, "cuda", given) for name, given in calls.items()}
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for name in calls for a, b in zip(expected[name], found[name], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on the path")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run([*command, "-k", "every_dtype_and_size", __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
