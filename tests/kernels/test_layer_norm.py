"""Parity of LayerNorm's kernels."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, around_100, assert_parity, draw, run
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1, 1), (7,), (2, 5, 320), (3, 640), (29, 31), (2, 2053), (0, 4), (2, 0, 4)]
"""One element, no batch, Stable Diffusion's widths, primes in several programs, a row beyond a tile, nothing."""


def forward_arguments(x: Tensor, dtype: torch.dtype) -> tuple:
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (draw(x.shape[-1], dtype=parameter, device=x.device.type, seed=seed) for seed in (1, 2))
    return x, weight, bias, 1e-5, dtype


def backward_arguments(dout: Tensor, x: Tensor) -> tuple:
    given = forward_arguments(x, x.dtype)
    _, mean, rstd = run("layer_norm", "reference", given)
    return dout, *given[:3], mean, rstd


def forward_scales(given: tuple) -> dict[int, Tensor]:
    """A unit of the mean is one of the standard deviation: what it shifts the output by."""
    return {1: 1 / run("layer_norm", "reference", given)[2].double().min()} if given[0].numel() else {}


def backward_scales(given: tuple) -> dict[int, Tensor]:
    """Of dx, its largest term; of dweight and dbias, the root sum of squares of their terms, largest over the columns."""
    dout, x, weight, _, mean, rstd = (a.double() for a in given)
    if x.numel() == 0:
        return {}
    normalized, g = ((x - mean) * rstd).abs(), dout.abs()
    terms = g * normalized
    if given[1].dtype == torch.float64:
        terms = terms + g * mean.abs() * rstd  # the oracle's own: it normalizes as rstd·x − rstd·mean
    columns = {k: t.reshape(-1, x.shape[-1]).square().sum(0).sqrt().max() for k, t in ((1, terms), (2, g))}
    return {0: (rstd * g * weight.abs()).max()} | columns


def assert_both_ways(implementation: str, x: Tensor, dout: Tensor) -> None:
    forward, backward = forward_arguments(x, x.dtype), backward_arguments(dout, x)
    assert_parity("layer_norm", implementation, forward, forward_scales(forward))
    assert_parity("layer_norm_backward", implementation, backward, backward_scales(backward))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_in_every_dtype_and_size(device: str, shape: tuple, dtype: torch.dtype, implementation: str) -> None:
    x, dout = (draw(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 5))
    assert_both_ways(implementation, x, dout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_parity_in_layouts_in_the_other_dtypes(device: str, layout: str, dtype: torch.dtype) -> None:
    x, dout = (draw(2, 3, 14, dtype=dtype, device=device, seed=seed, layout=layout) for seed in (0, 5))
    assert_both_ways("triton", x, dout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dout_layout", ["contiguous", "expanded", "transposed"])
def test_parity_in_every_layout(device: str, layout: str, dout_layout: str) -> None:
    x = draw(2, 3, 5, 14, dtype=torch.float32, device=device, layout=layout)
    dout = draw(2, 3, 5, 14, dtype=torch.float32, device=device, seed=5, layout=dout_layout)
    for implementation in ("reference", "triton"):
        assert_both_ways(implementation, x, dout)


def test_parity_where_a_program_walks_over_many_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from idm_fast.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "BACKWARD_PROGRAMS", 2)
    x, dout = (draw(43, 320, dtype=torch.float32, device=device, seed=seed) for seed in (0, 5))
    assert_both_ways("triton", x, dout)


def test_digits_are_kept_on_a_mean_of_100_and_a_deviation_of_a_hundredth(device: str) -> None:
    x, dout = around_100(32, 336, device=device), draw(32, 336, dtype=torch.float32, device=device, seed=5)
    assert torch.equal(run("layer_norm", "triton", forward_arguments(x, x.dtype))[1].double(), x.double().mean(-1, True))
    assert_both_ways("triton", x, dout)


@pytest.mark.parametrize("outlier", [1e4, -1e4])
def test_one_outlier_in_front_does_not_spoil_the_statistics(device: str, outlier: float) -> None:
    x = draw(3, 320, dtype=torch.float32, device=device)
    x[:, 0] = outlier
    given = forward_arguments(x, torch.float32)
    assert_parity("layer_norm", "triton", given, forward_scales(given))


def test_no_columns_give_an_empty_output_and_no_gradient(device: str) -> None:
    x = torch.empty(3, 0, device=device)
    out, mean, rstd = run("layer_norm", "triton", forward_arguments(x, torch.bfloat16))
    assert (out.shape, out.dtype, mean.shape, rstd.shape) == (x.shape, torch.bfloat16, (3, 1), (3, 1))
    assert all(t.numel() == 0 for t in run("layer_norm_backward", "triton", backward_arguments(x, x)))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_output_has_the_dtype_that_is_asked_for(device: str, dtype: torch.dtype) -> None:
    given = forward_arguments(draw(5, 37, dtype=torch.float32, device=device), dtype)
    assert_parity("layer_norm", "triton", given, forward_scales(given))


def test_gradients_are_the_same_from_run_to_run(device: str) -> None:
    x, dout = (draw(300, 17, dtype=torch.float32, device=device, seed=seed) for seed in (0, 5))
    given = backward_arguments(dout, x)
    first, second = (run("layer_norm_backward", "triton", given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_obey_opcheck(device: str) -> None:
    x, dout = (draw(2, 3, 10, dtype=torch.float32, device=device, seed=s, layout="transposed") for s in (0, 5))
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS["layer_norm"].overload, forward_arguments(x, torch.bfloat16))
        torch.library.opcheck(registry.OPS["layer_norm_backward"].overload, backward_arguments(dout, x))


def test_it_is_one_launch_and_its_gradient_two() -> None:
    from idm_fast.kernels import layer_norm
    from idm_fast.kernels.launch import recording

    x, w, statistics = (torch.empty(*shape, device="meta") for shape in ((8, 4096, 640), (640,), (8, 4096, 1)))
    with recording() as launches:
        layer_norm.layer_norm(x, w, w, 1e-5, torch.bfloat16)
    assert len(launches) == 1
    with recording() as launches:
        layer_norm.layer_norm_backward(x, x, w, w, statistics, statistics)
    assert len(launches) == 2


def test_cost_counts_every_tensor_once() -> None:
    from idm_fast.kernels.layer_norm import layer_norm_backward_cost, layer_norm_cost

    x, w = torch.empty(3, 10, dtype=torch.bfloat16, device="meta"), torch.empty(10, device="meta")
    statistics = torch.empty(3, 1, device="meta")
    forward = layer_norm_cost(x, w, w, 1e-5, torch.float32)
    assert (forward.read, forward.written) == (60 + 80, 120 + 24)
    backward = layer_norm_backward_cost(x, x, w, w, statistics, statistics)
    assert (backward.read, backward.written) == (2 * 60 + 40 + 24, 60 + 80)
