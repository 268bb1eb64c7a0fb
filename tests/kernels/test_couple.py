"""Parity of the coupling's kernels: forward, inverse, backward, and the inverse in place."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, assert_parity, draw, run
from torch import Tensor

from idm_fast.ops import registry

OPS = ("couple", "decouple", "couple_backward", "uncouple")
DTYPES = {
    "bf16 on fp32": (torch.bfloat16, torch.float32),
    "fp16 on fp32": (torch.float16, torch.float32),
    "fp32 on fp32": (torch.float32, torch.float32),
    "bf16 on fp64": (torch.bfloat16, torch.float64),
    "fp32 on fp64": (torch.float32, torch.float64),
    "fp64 on fp64": (torch.float64, torch.float64),
}
SHAPES = [(1,), (3, 7, 61), (2, 3, 29, 31), (0, 3, 5)]
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a == b or "contiguous" in (a, b)]


def arguments(name: str, F: Tensor, v: float, stream: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, ...]:
    """Arguments of op `name` for a body's output F: streams of its shape in another layout, v of one element."""
    a, b = (draw(*F.shape, dtype=stream, device=F.device.type, seed=seed, layout=layout) for seed in (1, 2))
    weight = torch.tensor([v], device=F.device)
    return {
        "couple": (F, a, weight),
        "decouple": (a, F, weight),
        "couple_backward": (b, F, a, weight),
        "uncouple": (a, F, b, weight),
    }[name]


def scales(name: str, given: tuple[Tensor, ...]) -> dict[int, Tensor]:
    """Root sum of squares of the terms of dv = <d1, x2 − F>, where the op gives one, before x2 and F cancel.

    Twice that where x2 is recovered first: a sum and a quotient more are rounded.
    """
    if name == "couple_backward":
        d1, F, x2, _ = (t.double().abs() for t in given)
        return {2: (d1 * (x2 + F)).norm()}
    if name == "uncouple":
        y1, F, d1, v = (t.double().abs() for t in given)
        return {3: 2 * (d1 * (y1 + F) / v).norm()}
    return {}


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_parity_in_every_dtype_and_size(device: str, name: str, dtypes: str, shape: tuple, implementation: str) -> None:
    body, stream = DTYPES[dtypes]
    given = arguments(name, draw(*shape, dtype=body, device=device), 0.4, stream)
    assert_parity(name, implementation, given, scales(name, given))


@pytest.mark.parametrize(("body_layout", "stream_layout"), PAIRS)
@pytest.mark.parametrize("name", OPS)
def test_parity_in_every_layout_and_beside_contiguous(device: str, name: str, body_layout: str, stream_layout: str) -> None:
    F = draw(3, 6, 5, 7, dtype=torch.bfloat16, device=device, layout=body_layout)
    given = arguments(name, F, 0.7, torch.float32, stream_layout)
    for implementation in ("reference", "triton"):
        assert_parity(name, implementation, given, scales(name, given))


@pytest.mark.parametrize("v", [0.0, 1.0])
def test_couple_is_exact_at_both_ends_of_v(device: str, v: float) -> None:
    F, x2, weight = arguments("couple", draw(5, 7, dtype=torch.float32, device=device), v, torch.float32)
    assert torch.equal(run("couple", "triton", (F, x2, weight))[0], x2 if v else F)


@pytest.mark.parametrize("name", OPS)
def test_operator_obeys_opcheck_on_mixed_layouts(device: str, name: str) -> None:
    from idm_fast import ops

    F = draw(2, 3, 4, 5, dtype=torch.float32, device=device, layout="channels_last")
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS[name].overload, arguments(name, F, 0.4, torch.float32))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uncouple_writes_over_its_inputs(device: str, layout: str) -> None:
    from idm_fast.kernels.couple import uncouple_into

    F = draw(3, 6, 29, 31, dtype=torch.bfloat16, device=device, layout=layout)
    y1, F, d1, v = arguments("uncouple", F, 0.4, torch.float32, layout)
    x2, dF, dx2, dv = run("uncouple", "triton", (y1, F, d1, v))
    in_place = uncouple_into(y1, F, d1, v, y1, d1)
    for expected, found in ((x2, y1), (dx2, d1), (dF, in_place[0]), (dv, in_place[1])):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_uncouple_in_place_op_writes_what_uncouple_returns(device: str, layout: str) -> None:
    F = draw(3, 6, 5, 7, dtype=torch.bfloat16, device=device, layout=layout)
    y1, F, d1, v = arguments("uncouple", F, 0.4, torch.float32, layout)
    expected = run("uncouple", "triton", (y1, F, d1, v))
    found = run("uncouple_", "triton", (y1, F, d1, v))
    for a, b in zip(expected, (y1, *found), strict=True):
        assert torch.equal(a, b)


def test_uncouple_refuses_to_write_where_elements_do_not_lie_densely(device: str) -> None:
    from idm_fast.kernels.couple import uncouple_into

    y1, F, d1, v = arguments("uncouple", draw(2, 3, dtype=torch.float32, device=device), 0.4, torch.float32, "strided")
    with pytest.raises(ValueError, match="x2 has strides \\(6, 2\\), expected those of a dense tensor"):
        uncouple_into(y1, F, d1, v, y1, d1)


def test_dv_is_the_same_from_run_to_run(device: str) -> None:
    given = arguments("uncouple", draw(7, 3, 29, 31, dtype=torch.bfloat16, device=device), 0.4, torch.float32)
    first, second = (run("uncouple", "triton", given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cost_counts_every_tensor_once() -> None:
    from idm_fast.kernels.couple import couple_cost, uncouple_cost

    F, x, v = (torch.empty(n, dtype=t, device="meta") for n, t in ((10, torch.bfloat16), (10, torch.float32), (1, None)))
    assert (couple_cost(F, x, v).read, couple_cost(F, x, v).written) == (60, 40)
    assert uncouple_cost(x, F, x, v).bytes == 200
