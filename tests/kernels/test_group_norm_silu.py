"""Parity of GroupNorm–SiLU's kernels."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, around_100, assert_parity, draw, run
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = {  # of x, and its groups
    "one element": ((1, 1, 1), 1),
    "no spatial side": ((5, 8), 2),
    "odd": ((2, 15, 7, 11), 5),
    "prime": ((1, 7, 13), 7),
    "one group": ((2, 6, 5, 5), 1),
    "channels over several tiles": ((1, 70, 6, 11), 5),
    "positions over several chunks": ((1, 2, 71, 73), 1),
    "volume": ((2, 4, 3, 2, 5), 2),
    "empty batch": ((0, 4, 3), 2),
}


def forward_arguments(x: Tensor, groups: int, silu: bool, dtype: torch.dtype) -> tuple:
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (draw(x.shape[1], dtype=parameter, device=x.device.type, seed=seed) for seed in (1, 2))
    return x, weight, bias, groups, 1e-5, silu, dtype


def backward_arguments(dout: Tensor, x: Tensor, groups: int, silu: bool) -> tuple:
    given = forward_arguments(x, groups, silu, x.dtype)
    _, mean, rstd = run("group_norm_silu", "reference", given)
    return dout, *given[:3], mean, rstd, groups, silu


def forward_scales(given: tuple) -> dict[int, Tensor]:
    """A unit of the mean is one of the standard deviation: what it shifts the output by."""
    return {1: 1 / run("group_norm_silu", "reference", given)[2].double().min()} if given[0].numel() else {}


def backward_scales(given: tuple) -> dict[int, Tensor]:
    """Of dx, its largest term; of dweight and dbias, the root sum of squares of their terms, largest over the channels."""
    dout, x, weight, bias, mean, rstd, groups, silu = (a.double() if isinstance(a, Tensor) else a for a in given)
    if x.numel() == 0:
        return {}
    spatial = (1,) * (x.ndim - 2)
    m, r = (t.repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *spatial) for t in (mean, rstd))
    w, shift = (t.view(1, -1, *spatial).abs() for t in (weight, bias))
    normalized = ((x - m) * r).abs()
    g = dout.abs() * (1 + silu * (normalized * w + shift))  # silu' = σ + u·σ·(1 − σ), before its terms cancel
    terms = g * normalized
    if given[1].dtype == torch.float64:
        terms = terms + g * m.abs() * r  # the oracle's own: it computes dweight as rstd·(Σg·x − mean·Σg)
    rest = [0, *range(2, x.ndim)]
    return {0: (r * g * w).max()} | {k: t.square().sum(rest).sqrt().max() for k, t in ((1, terms), (2, g))}


def assert_both_ways(implementation: str, x: Tensor, dout: Tensor, groups: int, silu: bool) -> None:
    forward, backward = forward_arguments(x, groups, silu, x.dtype), backward_arguments(dout, x, groups, silu)
    assert_parity("group_norm_silu", implementation, forward, forward_scales(forward))
    assert_parity("group_norm_silu_backward", implementation, backward, backward_scales(backward))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_parity_in_every_dtype_and_size(device: str, case: str, dtype: torch.dtype, implementation: str) -> None:
    shape, groups = SHAPES[case]
    x, dout = (draw(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 5))
    assert_both_ways(implementation, x, dout, groups, True)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_without_silu(device: str, dtype: torch.dtype, implementation: str) -> None:
    x, dout = (draw(2, 6, 5, 7, dtype=dtype, device=device, seed=seed) for seed in (0, 5))
    assert_both_ways(implementation, x, dout, 3, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dout_layout", ["contiguous", "channels_last", "expanded"])
def test_parity_in_every_layout(device: str, layout: str, dout_layout: str) -> None:
    x = draw(2, 6, 7, 9, dtype=torch.float32, device=device, layout=layout)
    dout = draw(2, 6, 7, 9, dtype=torch.float32, device=device, seed=5, layout=dout_layout)
    for implementation in ("reference", "triton"):
        assert_both_ways(implementation, x, dout, 3, True)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradient_lie_in_memory_as_the_input_does(device: str, layout: str, implementation: str) -> None:
    x = draw(2, 6, 7, 9, dtype=torch.float32, device=device, layout=layout)
    dout = draw(2, 6, 7, 9, dtype=torch.float32, device=device, seed=5)
    expected = torch.empty_like(x).stride()
    for dtype in (torch.bfloat16, torch.float32):
        assert run("group_norm_silu", implementation, forward_arguments(x, 3, True, dtype))[0].stride() == expected
    assert run("group_norm_silu_backward", implementation, backward_arguments(dout, x, 3, True))[0].stride() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "transposed"])
def test_parity_in_layouts_in_the_other_dtypes(device: str, layout: str, dtype: torch.dtype) -> None:
    x, dout = (draw(2, 6, 7, 9, dtype=dtype, device=device, seed=seed, layout=layout) for seed in (0, 5))
    assert_both_ways("triton", x, dout, 3, True)


def test_one_image_makes_more_programs_than_a_gpu_has_multiprocessors() -> None:
    from idm_fast.kernels import group_norm_silu
    from idm_fast.kernels.launch import recording

    x, w = torch.empty(1, 320, 128, 128, device="meta"), torch.empty(320, device="meta")
    for layout in (torch.contiguous_format, torch.channels_last):
        with recording() as launches:
            group_norm_silu.group_norm_silu(x.contiguous(memory_format=layout), w, w, 32, 1e-5, True, x.dtype)
        assert min(launch.programs for launch in launches[::2]) >= 1024  # a GPU has up to some 150


def test_parity_in_channels_last_over_several_tiles(device: str) -> None:
    x, dout = (draw(1, 70, 7, 11, dtype=torch.float32, device=device, seed=s, layout="channels_last") for s in (0, 5))
    assert_both_ways("triton", x, dout, 5, True)


@pytest.mark.parametrize("groups", [3, 42])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_digits_are_kept_on_a_mean_of_100_and_a_deviation_of_a_hundredth(device: str, layout: str, groups: int) -> None:
    """With a channel a group, the mean of a tile shows; with 14, how means are merged."""
    x = around_100(1, 42, 336, device=device).unflatten(2, (14, 24))
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    found = run("group_norm_silu", "triton", forward_arguments(x, groups, True, torch.float32))[1]
    exact = x.double().unflatten(1, (groups, -1)).mean((2, 3, 4))
    half_a_unit = torch.finfo(torch.float32).eps * 64 / 2
    assert (found - exact).abs().max() <= half_a_unit * 1.01  # of the rounding itself, and of nothing before it
    dout = draw(1, 42, 14, 24, dtype=torch.float32, device=device, seed=5)
    assert_both_ways("triton", x, dout, groups, True)


@pytest.mark.parametrize("outlier", [1e4, -1e4])
def test_one_outlier_in_front_does_not_spoil_the_statistics(device: str, outlier: float) -> None:
    x = draw(1, 2, 40, 40, dtype=torch.float32, device=device)
    x[0, :, 0, 0] = outlier
    given = forward_arguments(x, 1, False, torch.float32)
    assert_parity("group_norm_silu", "triton", given, forward_scales(given))


def test_constant_input_gives_the_bias(device: str) -> None:
    given = forward_arguments(torch.full((1, 4, 5, 5), 3.7, device=device), 2, False, torch.float32)
    out, mean, rstd = run("group_norm_silu", "triton", given)
    assert torch.equal(out, given[2].view(1, 4, 1, 1).expand_as(out))
    assert (mean == 3.7).all() and torch.allclose(rstd, torch.tensor(1e-5, device=device).rsqrt())


def test_no_positions_give_an_empty_output_and_no_gradient(device: str) -> None:
    x = torch.empty(2, 4, 0, device=device)
    out, mean, rstd = run("group_norm_silu", "triton", forward_arguments(x, 2, True, torch.bfloat16))
    assert (out.shape, out.dtype, mean.shape, rstd.shape) == (x.shape, torch.bfloat16, (2, 2), (2, 2))
    dx, *rest = run("group_norm_silu_backward", "triton", backward_arguments(x, x, 2, True))
    assert dx.shape == x.shape and not any(t.any() for t in rest)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_output_has_the_dtype_that_is_asked_for(device: str, dtype: torch.dtype) -> None:
    x = draw(2, 6, 5, 7, dtype=torch.float32, device=device)
    assert_parity("group_norm_silu", "triton", (given := forward_arguments(x, 3, True, dtype)), forward_scales(given))


def test_gradients_are_the_same_from_run_to_run(device: str) -> None:
    x, dout = (draw(2, 4, 71, 59, dtype=torch.float32, device=device, seed=seed) for seed in (0, 5))
    given = backward_arguments(dout, x, 2, True)
    first, second = (run("group_norm_silu_backward", "triton", given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operators_obey_opcheck(device: str, layout: str) -> None:
    x, dout = (draw(2, 6, 3, 5, dtype=torch.float32, device=device, seed=seed, layout=layout) for seed in (0, 5))
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS["group_norm_silu"].overload, forward_arguments(x, 3, True, torch.bfloat16))
        torch.library.opcheck(registry.OPS["group_norm_silu_backward"].overload, backward_arguments(dout, x, 3, True))


def test_cost_counts_what_is_read_twice_twice() -> None:
    from idm_fast.kernels.group_norm_silu import group_norm_silu_backward_cost, group_norm_silu_cost

    x, w = torch.empty(2, 4, 10, dtype=torch.bfloat16, device="meta"), torch.empty(4, device="meta")
    statistics = torch.empty(2, 2, device="meta")
    forward = group_norm_silu_cost(x, w, w, 2, 1e-5, True, torch.float32)
    assert (forward.read, forward.written) == (2 * 160 + 32, 320 + 32)
    backward = group_norm_silu_backward_cost(x, x, w, w, statistics, statistics, 2, True)
    assert (backward.read, backward.written) == (4 * 160 + 64, 160 + 32)
