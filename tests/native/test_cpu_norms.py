"""Parity of the C++ kernels of GroupNorm–SiLU and LayerNorm, with every instruction set."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, assert_parity, draw, run
from test_group_norm_silu import (
    DTYPES,
    SHAPES,
    assert_both_ways,
    backward_arguments,
    forward_arguments,
    forward_scales,
)
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import native, registry

pytestmark = [
    pytest.mark.skipif(native.load_cpu() is not None, reason=f"no C++ extension: {native.load_cpu()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]

ROWS = [(1,), (5,), (3, 7), (2, 5, 24), (2, 1, 48), (4, 5, 640), (2, 3000), (700, 6), (0, 4), (3, 0, 8)]


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels innermost, in any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_parity_in_every_dtype_and_size(instruction_set: str, case: str, dtype: torch.dtype) -> None:
    shape, groups = SHAPES[case]
    x, dout = (draw(*shape, dtype=dtype, device="cpu", seed=seed) for seed in (0, 5))
    assert_both_ways("cpu", x, dout, groups, True)
    assert_both_ways("cpu", channels_last(x), channels_last(dout), groups, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_without_silu(instruction_set: str, dtype: torch.dtype) -> None:
    x, dout = (draw(2, 6, 5, 7, dtype=dtype, device="cpu", seed=seed) for seed in (0, 5))
    assert_both_ways("cpu", x, dout, 3, False)
    assert_both_ways("cpu", channels_last(x), channels_last(dout), 3, False)


@pytest.mark.parametrize("dout_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_in_every_layout(layout: str, dout_layout: str) -> None:
    x = draw(2, 6, 7, 9, dtype=torch.float32, device="cpu", layout=layout)
    dout = draw(2, 6, 7, 9, dtype=torch.float32, device="cpu", seed=5, layout=dout_layout)
    assert_both_ways("cpu", x, dout, 3, True)


@pytest.mark.parametrize("channels", [4, 300])
def test_parity_in_channels_last_over_several_chunks(instruction_set: str, channels: int) -> None:
    side = (40000 // channels) ** 0.5
    shape = (2, channels, int(side), int(side) + 3)
    x, dout = (channels_last(draw(*shape, dtype=torch.float32, device="cpu", seed=s)) for s in (0, 5))
    assert_both_ways("cpu", x, dout, 2, True)


@pytest.mark.parametrize("lies", [Tensor.contiguous, channels_last])
def test_digits_are_kept_on_a_mean_of_100_and_a_deviation_of_a_hundredth(lies) -> None:
    x = lies((draw(2, 6, 40, 40, dtype=torch.float64, device="cpu") * 0.01 + 100).float())
    dout = draw(2, 6, 40, 40, dtype=torch.float32, device="cpu", seed=5)
    assert_both_ways("cpu", x, dout, 3, True)


@pytest.mark.parametrize("lies", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("outlier", [1e4, -1e4])
def test_one_outlier_in_front_does_not_spoil_the_statistics(outlier: float, lies) -> None:
    x = draw(1, 2, 40, 40, dtype=torch.float32, device="cpu")
    x[0, :, 0, 0] = outlier
    given = forward_arguments(lies(x), 1, False, torch.float32)
    assert_parity("group_norm_silu", "cpu", given, forward_scales(given))


@pytest.mark.parametrize("lies", [Tensor.contiguous, channels_last])
def test_a_step_between_runs_does_not_spoil_the_statistics(lies) -> None:
    x = draw(1, 2, 60, 60, dtype=torch.float32, device="cpu")
    x[:, :, 30:] = x[:, :, 30:] * 1e-3 + 1e3
    given = forward_arguments(lies(x), 1, False, torch.float32)
    assert_parity("group_norm_silu", "cpu", given, forward_scales(given))


def test_constant_input_gives_the_bias(instruction_set: str) -> None:
    for x in (torch.full((1, 4, 5, 5), 3.7), channels_last(torch.full((1, 4, 5, 5), 3.7))):
        given = forward_arguments(x, 2, False, torch.float32)
        out, mean, rstd = run("group_norm_silu", "cpu", given)
        assert torch.equal(out, given[2].view(1, 4, 1, 1).expand_as(out))
        assert (mean == 3.7).all() and torch.allclose(rstd, torch.tensor(1e-5).rsqrt())


def test_no_positions_give_an_empty_output_and_no_gradient() -> None:
    x = torch.empty(2, 4, 0)
    out, mean, rstd = run("group_norm_silu", "cpu", forward_arguments(x, 2, True, torch.bfloat16))
    assert (out.shape, out.dtype, mean.shape, rstd.shape) == (x.shape, torch.bfloat16, (2, 2), (2, 2))
    dx, *rest = run("group_norm_silu_backward", "cpu", backward_arguments(x, x, 2, True))
    assert dx.shape == x.shape and not any(t.any() for t in rest)


@pytest.mark.parametrize("lies", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_the_dtype_that_is_asked_for(dtype: torch.dtype, lies) -> None:
    x = lies(draw(2, 6, 5, 7, dtype=torch.float32, device="cpu"))
    given = forward_arguments(x, 3, True, dtype)
    out, *_ = run("group_norm_silu", "cpu", given)
    assert (out.dtype, out.stride()) == (dtype, x.stride())
    if dtype != torch.float64:
        assert_parity("group_norm_silu", "cpu", given, forward_scales(given))


@pytest.mark.parametrize("lies", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(two_threads: None, dtype: torch.dtype, lies) -> None:
    x, dout = (lies(draw(3, 8, 71, 59, dtype=dtype, device="cpu", seed=seed)) for seed in (0, 5))
    forward, backward = forward_arguments(x, 2, True, dtype), backward_arguments(dout, x, 2, True)
    of_two = run("group_norm_silu", "cpu", forward) + run("group_norm_silu_backward", "cpu", backward)
    torch.set_num_threads(1)
    of_one = run("group_norm_silu", "cpu", forward) + run("group_norm_silu_backward", "cpu", backward)
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_operators_obey_opcheck(layout: str) -> None:
    x, dout = (draw(2, 6, 3, 5, dtype=torch.float32, device="cpu", seed=seed, layout=layout) for seed in (0, 5))
    with ops.use("cpu"):
        torch.library.opcheck(registry.OPS["group_norm_silu"].overload, forward_arguments(x, 3, True, torch.bfloat16))
        torch.library.opcheck(registry.OPS["group_norm_silu_backward"].overload, backward_arguments(dout, x, 3, True))


def test_wrong_arguments_are_named() -> None:
    x, w = torch.ones(2, 6, 4), torch.ones(6)
    for arguments, message in (
        ((x, w, w, 4, 1e-5, True, torch.float32), "groups is 4"),
        ((x, w[:5], w, 3, 1e-5, True, torch.float32), r"weight is \(5\)"),
        ((x, w, w, 3, 1e-5, True, torch.int64), "dtype: its dtype"),
        ((x.long(), w, w, 3, 1e-5, True, torch.float32), "x: its dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("group_norm_silu", "cpu", arguments)
    given = backward_arguments(x, x, 3, True)
    with pytest.raises(RuntimeError, match=r"rstd is \(2, 2\), expected \(2, 3\)"):
        run("group_norm_silu_backward", "cpu", (*given[:5], given[5][:, :2], *given[6:]))


def row_arguments(x: Tensor, dtype: torch.dtype) -> tuple:
    """Of layer_norm."""
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (draw(x.shape[-1], dtype=parameter, device="cpu", seed=seed) for seed in (1, 2))
    return x, weight, bias, 1e-5, dtype


def assert_rows_both_ways(x: Tensor, dout: Tensor) -> None:
    """Parity of layer_norm and its gradient; a unit of what cancels is one of its terms, as with GroupNorm."""
    forward = row_arguments(x, x.dtype)
    _, mean, rstd = run("layer_norm", "reference", forward)
    backward = (dout, *forward[:3], mean, rstd)
    if not x.numel():
        assert_parity("layer_norm", "cpu", forward)
        assert_parity("layer_norm_backward", "cpu", backward)
        return
    assert_parity("layer_norm", "cpu", forward, {1: 1 / rstd.double().min()})
    d, m, r, w = (t.double() for t in (dout, mean, rstd, forward[1]))
    terms = d * (x.double() - m) * r
    if x.dtype == torch.float64:
        terms = terms.abs() + (d * m * r).abs()  # the oracle's own: it computes dweight as rstd·(Σg·x − mean·Σg)
    terms = terms.reshape(-1, x.shape[-1])
    of_weight, of_bias = (t.square().sum(0).sqrt().max() for t in (terms, d.reshape(-1, x.shape[-1])))
    assert_parity("layer_norm_backward", "cpu", backward, {0: (r * d * w).abs().max(), 1: of_weight, 2: of_bias})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_layer_norm_has_parity_in_every_dtype_and_size(instruction_set: str, shape: tuple, dtype: torch.dtype) -> None:
    x, dout = (draw(*shape, dtype=dtype, device="cpu", seed=seed) for seed in (0, 5))
    assert_rows_both_ways(x, dout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_has_parity_in_every_layout(layout: str) -> None:
    x = draw(3, 4, 5, 14, dtype=torch.float32, device="cpu", layout=layout)
    assert_rows_both_ways(x, draw(3, 4, 5, 14, dtype=torch.float32, device="cpu", seed=5, layout=layout))


def test_layer_norm_keeps_digits_on_a_mean_of_100_and_a_deviation_of_a_hundredth(instruction_set: str) -> None:
    x = (draw(40, 100, dtype=torch.float64, device="cpu") * 0.01 + 100).float()
    assert_rows_both_ways(x, draw(40, 100, dtype=torch.float32, device="cpu", seed=5))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_layer_norm_has_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    assert_parity("layer_norm", "cpu", given := row_arguments(draw(5, 24, dtype=torch.float32, device="cpu"), dtype))
    assert run("layer_norm", "cpu", given)[0].dtype == dtype


def test_layer_norm_does_not_depend_on_the_number_of_threads(two_threads: None) -> None:
    x, dout = (draw(2000, 40, dtype=torch.float32, device="cpu", seed=seed) for seed in (0, 5))
    forward = row_arguments(x, torch.float32)
    backward = (dout, *forward[:3], *run("layer_norm", "reference", forward)[1:])
    of_two = run("layer_norm", "cpu", forward) + run("layer_norm_backward", "cpu", backward)
    torch.set_num_threads(1)
    of_one = run("layer_norm", "cpu", forward) + run("layer_norm_backward", "cpu", backward)
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


def test_layer_norm_obeys_opcheck() -> None:
    x, dout = (draw(3, 5, 14, dtype=torch.float32, device="cpu", seed=s, layout="transposed") for s in (0, 5))
    forward = row_arguments(x, torch.bfloat16)
    statistics = run("layer_norm", "reference", forward)[1:]
    with ops.use("cpu"):
        torch.library.opcheck(registry.OPS["layer_norm"].overload, forward)
        torch.library.opcheck(registry.OPS["layer_norm_backward"].overload, (dout, *forward[:3], *statistics))


def test_layer_norm_names_wrong_arguments() -> None:
    x, w = torch.ones(2, 6), torch.ones(6)
    with pytest.raises(RuntimeError, match=r"bias is \(5\), expected \(6,\)"):
        run("layer_norm", "cpu", (x, w, w[:5], 1e-5, torch.float32))
    with pytest.raises(RuntimeError, match=r"dout is \(2, 5\), expected \(2, 6\)"):
        run("layer_norm_backward", "cpu", (x[:, :5], x, w, w, x[:, :1], x[:, :1]))
