"""Parity of the injector's kernels."""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, draw, run
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPS = ("inject_read", "inject_read_backward", "inject_write", "inject_write_backward")
OPS += ("inject_couple", "inject_couple_backward", "inject_uncouple")
SHAPES = [(2, 3, 5, 7, 2), (1, 1, 1, 1, 1), (1, 1, 1, 1, 2), (1, 17, 3, 3, 1), (1, 10, 2, 3, 4), (1, 2, 9, 29, 2)]
"""Batch, channels a plane, height and width of the features, r."""


def arguments(name: str, h: Tensor, r: int) -> tuple:
    """Arguments of op `name` on the features, or the gradient, h."""
    B, C, height, width = h.shape
    c, device = C // (r * r), h.device.type
    parameter = torch.float64 if h.dtype == torch.float64 else torch.float32
    images = [draw(B, 1, height * r, width * r, dtype=h.dtype, device=device, seed=seed) for seed in (1, 2, 3)]
    read, write = (draw(*shape, dtype=parameter, device=device) for shape in ((1, c, 1, 1), (c, 3, 1, 1)))
    bias = [draw(n, dtype=parameter, device=device, seed=7) for n in (1, c)]
    layout = "contiguous" if h.is_contiguous() else "channels_last"
    stream = torch.promote_types(h.dtype, torch.float32)
    x2, d1 = (draw(*h.shape, dtype=stream, device=device, seed=seed, layout=layout) for seed in (9, 10))
    v = torch.tensor([0.4], dtype=parameter, device=device)
    both = (h, *images, write, bias[1])
    return {
        "inject_read": (h, read, bias[0], r),
        "inject_read_backward": (images[0], h, read, r, x2.to(h.dtype)),
        "inject_write": (h, *images, write, bias[1], r),
        "inject_write_backward": (h, *images, write, r),
        "inject_couple": (*both, x2, v, r),
        "inject_couple_backward": (d1, *both, x2, v, r),
        "inject_uncouple": (x2, d1, *both, v, r),
    }[name]


def scales(name: str, given: tuple) -> dict[int, Tensor]:
    """For what sums over c or over positions, the largest root sum of squares of the terms of one element."""
    exact = [a.double() if isinstance(a, Tensor) else a for a in given]
    if name == "inject_couple" or exact[0].numel() == 0:
        return {}
    if name in ("inject_couple_backward", "inject_uncouple"):
        return coupled_scales(name, exact)
    squares = [a.square() if isinstance(a, Tensor) else a for a in exact]
    found = run(name, "reference", tuple(squares))
    return {k: t.max().sqrt() for k, t in enumerate(found) if t.numel()}


def coupled_scales(name: str, exact: list) -> dict[int, Tensor]:
    """As `scales`: the gradient that `inject_write_backward` sees is (1−v)·d1, dv sums d1·(x2 − out) or d1·(y1 − out)/v.

    1 − v is rounded once for all terms, which moves a sum by as much as it is itself rounded.
    """
    *streams, h, z, gz, aty, weight, bias = exact[:-2] if name == "inject_uncouple" else exact[:-3]
    v, r = exact[-2:]
    d1, stream, steep = (streams[1], streams[0], v) if len(streams) == 2 else (streams[0], exact[-3], 1)
    out = run("inject_write", "reference", (h, z, gz, aty, weight, bias, r))[0]
    written = ((1 - v) * d1, z, gz, aty, weight, r)
    sums = [t.abs().max() for t in run("inject_write_backward", "reference", written)]
    found = {k + len(streams): t + sums[k] for k, t in scales("inject_write_backward", written).items()}
    return found | {6 + len(streams): ((stream.abs() + out.abs()) * d1 / steep).square().sum().sqrt()}


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_parity_in_every_dtype_and_size(device: str, name: str, shape: tuple, dtype: torch.dtype, implementation: str) -> None:
    B, c, height, width, r = shape
    given = arguments(name, draw(B, c * r * r, height, width, dtype=dtype, device=device), r)
    assert_parity(name, implementation, given, scales(name, given))


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded", "unaligned", "transposed"])
@pytest.mark.parametrize("name", OPS)
def test_parity_in_every_layout(device: str, name: str, layout: str) -> None:
    given = arguments(name, draw(2, 12, 5, 6, dtype=torch.float16, device=device, layout=layout), 2)
    for implementation in ("reference", "triton"):
        assert_parity(name, implementation, given, scales(name, given))


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded", "unaligned", "transposed"])
@pytest.mark.parametrize("name", OPS)
def test_parity_where_everything_but_the_features_lies_in_another_layout(device: str, name: str, layout: str) -> None:
    h = draw(2, 12, 5, 6, dtype=torch.float32, device=device)
    given = arguments(name, h, 2)

    def lies(t: Tensor) -> Tensor:
        return draw(*t.shape, dtype=t.dtype, device=device, seed=11, layout=layout)

    given = tuple(lies(a) if isinstance(a, Tensor) and a is not h and a.ndim == 4 else a for a in given)
    assert_parity(name, "triton", given, scales(name, given))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", OPS[4:])
def test_parity_on_float64_streams(device: str, name: str, dtype: torch.dtype) -> None:
    given = arguments(name, draw(2, 12, 5, 6, dtype=dtype, device=device), 2)
    streams = {"inject_couple": (6,), "inject_couple_backward": (0, 7), "inject_uncouple": (0, 1)}[name]
    given = tuple(a.double() if k in streams else a for k, a in enumerate(given))
    assert_parity(name, "triton", given, scales(name, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_of_reading_backward_without_what_comes_through(device: str, dtype: torch.dtype) -> None:
    dz, h, weight, r, _ = arguments("inject_read_backward", draw(2, 12, 5, 7, dtype=dtype, device=device), 2)
    given = (dz, h, weight, r, None)
    assert_parity("inject_read_backward", "triton", given, scales("inject_read_backward", given))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("r", [2, 4])
@pytest.mark.parametrize("name", OPS)
def test_parity_in_channels_last_which_is_kept(device: str, name: str, r: int, implementation: str) -> None:
    h = draw(1, 3 * r * r, 3, 7, dtype=torch.float32, device=device, layout="channels_last")
    given = arguments(name, h, r)
    assert_parity(name, implementation, given, scales(name, given))
    features = [t for t in run(name, implementation, given) if t.shape == h.shape]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in features)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_an_empty_batch_gives_empty_images_and_no_gradient(device: str, name: str, implementation: str) -> None:
    outputs = run(name, implementation, arguments(name, torch.empty(0, 12, 2, 2, device=device), 2))
    assert all(t.shape[0] == 0 or not t.any() for t in outputs)


@pytest.mark.parametrize("name", OPS)
def test_operators_obey_opcheck(device: str, name: str) -> None:
    h = draw(2, 12, 2, 3, dtype=torch.float32, device=device, layout="channels_last")
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS[name].overload, arguments(name, h, 2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_uncoupling_in_place_gives_the_bits_of_uncoupling(device: str, layout: str) -> None:
    y1, *rest = arguments("inject_uncouple", draw(2, 12, 5, 6, dtype=torch.float32, device=device, layout="channels_last"), 2)
    y1 = draw(2, 12, 5, 6, dtype=torch.float32, device=device, layout=layout)
    for implementation in ("reference", "triton"):
        x2, *gradients = run("inject_uncouple", implementation, (y1, *rest))
        over = torch.cat([y1, y1], -1)[..., : y1.shape[-1]].copy_(y1) if layout == "strided" else y1.clone()
        found = run("inject_uncouple_", implementation, (over, *rest))
        assert all(torch.equal(a, b) for a, b in zip((over, *found), (x2, *gradients), strict=True))


def test_cost_counts_the_features_once_each_way() -> None:
    from idm_fast.kernels.inject import inject_read_cost, inject_write_backward_cost, inject_write_cost

    h, image = torch.empty(2, 80, 3, 3, device="meta"), torch.empty(2, 1, 6, 6, device="meta")
    read, write, bias = (torch.empty(n, device="meta") for n in (20, 60, 20))
    assert inject_read_cost(h, read, bias[:1], 2).written == 4 * image.numel()
    assert inject_write_cost(h, image, image, image, write, bias, 2).written == 4 * h.numel()
    assert inject_write_backward_cost(h, image, image, image, write, 2).read == 4 * (h.numel() + 3 * image.numel() + 60)
