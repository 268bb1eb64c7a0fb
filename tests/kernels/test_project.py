"""Parity of the projection's kernels."""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, draw, run
from torch import Tensor

from idm_fast import ops
from idm_fast.ops import registry

OPS = ("measure", "adjoint", "gram", "project_step", "project_step_backward")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(2, 6, 8, 16, 5), (1, 1, 1, 1, 1), (3, 7, 11, 77, 40), (1, 18, 4, 8, 8), (2, 16, 16, 256, 1)]
"""Batch, height, width, N, q: one row an image and several, N and q beyond a tile, q of one and of N."""


def arguments(name: str, shape: tuple, dtype: torch.dtype, device: str, layout: str = "contiguous") -> tuple:
    B, height, width, N, q = shape
    matrix = torch.linalg.qr(draw(N, q, dtype=torch.float64, device="cpu")).Q.to(dtype).to(device)
    permutation = torch.randperm(height * width, generator=torch.Generator().manual_seed(1)).to(device)
    g, x, e = (draw(B, 1, height, width, dtype=dtype, device=device, seed=s, layout=layout) for s in (0, 1, 2))
    y = draw(B, height * width // N, q, dtype=dtype, device=device, layout=layout)
    abar = tuple(torch.tensor([a], dtype=dtype, device=device) for a in (0.3, 0.7))
    return {
        "measure": (x, matrix, permutation),
        "adjoint": (y, matrix, permutation, height, width),
        "gram": (x, matrix, permutation),
        "project_step": (x, e, y, matrix, permutation, *abar),
        "project_step_backward": (g, x, e, y, matrix, permutation, *abar),
    }[name]


def scales(name: str, given: tuple) -> dict[int, Tensor]:
    """The size of what is added up, before it cancels.

    Of a product, the largest root sum of squares of the terms of one element, and half the root of their number: a running
    sum of n terms is rounded n times. Of a step, what is denoised. Of ᾱ, root sums of squares again; each of their terms went
    through the projection, which is sums of N terms.
    """
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given]
    if name in ("measure", "adjoint"):
        terms = given[1].shape[0 if name == "measure" else 1]
        exact[:2] = [a.square() for a in exact[:2]]
        return {0: run(name, "reference", tuple(exact))[0].max().sqrt() * max(1.0, terms**0.5 / 2)}
    if name == "gram":
        return {}
    *images, _, _, _, a, b = exact
    s, c, s_prev, c_prev = a.sqrt(), (1 - a).sqrt(), b.sqrt(), (1 - b).sqrt()
    x, e = (t.abs() for t in images[-2:])
    if name == "project_step":
        return {0: (s_prev * (x + c * e) / s).max()}
    g, x0 = images[0].abs(), (images[1] - c * images[2]) / s
    dx0 = s_prev * g  # the projection makes neither larger
    of_t = (dx0 * x0).norm() / (2 * a) + (dx0 * e).norm() / (2 * s * c)
    of_prev = (g * x0).norm() / (2 * s_prev) + (g * e).norm() / (2 * c_prev)
    rounded = max(1.0, given[-4].shape[0] ** 0.5 / 2)
    of_t, of_prev = (rounded * scale.squeeze() for scale in (of_t, of_prev))
    return {0: (dx0 / s).max(), 1: (c_prev * g + c / s * dx0).max(), 3: of_t, 4: of_prev}


def scale_of_large_gram(given: tuple) -> Tensor:
    """Each measurement is a sum that may cancel to nearly nothing, and no more exact than its terms; Φᵀ spreads that."""
    x, matrix, permutation = (a.double() if a.is_floating_point() else a for a in given)
    measured = scales("measure", given)[0] * matrix.norm(dim=1).max()
    y = run("measure", "reference", (x, matrix, permutation))[0].to(given[0].dtype)
    return torch.maximum(measured, scales("adjoint", (y, *given[1:], *x.shape[-2:]))[0])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_parity_in_every_dtype_and_size(device: str, name: str, shape: tuple, dtype: torch.dtype, implementation: str) -> None:
    given = arguments(name, shape, dtype, device)
    assert_parity(name, implementation, given, scales(name, given))


@pytest.mark.parametrize("name", ["gram", "project_step"])
@pytest.mark.parametrize(("N", "q"), [(1024, 1), (1024, 103), (1024, 1024), (256, 256)])
def test_parity_at_the_sizes_of_blocks_in_use(device: str, name: str, N: int, q: int) -> None:
    given = arguments(name, (1, 32, 32, N, q), torch.float32, device)
    assert_parity(name, "triton", given, {0: scale_of_large_gram(given)} if name == "gram" else scales(name, given))


@pytest.mark.parametrize("name", OPS)
def test_parity_with_a_matrix_and_a_permutation_that_are_views(device: str, name: str) -> None:
    given = arguments(name, (2, 6, 8, 16, 5), torch.float32, device)
    k = next(k for k, a in enumerate(given) if isinstance(a, Tensor) and a.dtype == torch.int64)
    matrix, permutation = given[k - 1].t().contiguous().t(), given[k].repeat_interleave(2)[::2]
    given = (*given[: k - 1], matrix, permutation, *given[k + 1 :])
    assert_parity(name, "triton", given, scales(name, given))


@pytest.mark.parametrize("layout", ["strided", "expanded", "unaligned", "transposed"])
@pytest.mark.parametrize("name", OPS)
def test_parity_in_every_layout(device: str, name: str, layout: str) -> None:
    given = arguments(name, (2, 6, 8, 16, 5), torch.float16, device, layout)
    assert_parity(name, "triton", given, scales(name, given))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_an_empty_batch_gives_empty_images_and_no_gradient(device: str, name: str, implementation: str) -> None:
    outputs = run(name, implementation, arguments(name, (0, 4, 4, 8, 3), torch.float32, device))
    assert all(t.shape[0] == 0 or not t.any() for t in outputs)


@pytest.mark.parametrize("entry", [-1, 48, 2**31, 2**62, -(2**63)])
@pytest.mark.parametrize("name", OPS)
def test_entries_of_the_permutation_out_of_range_are_not_followed(device: str, name: str, entry: int) -> None:
    given = arguments(name, (2, 6, 8, 16, 5), torch.float32, device)
    permutation = next(t for t in given if isinstance(t, Tensor) and t.dtype == torch.int64)
    lost = int(permutation[3])
    permutation[3] = entry
    outputs = run(name, "triton", given)
    if name == "measure":  # the first row of each image has no value for one of its pixels
        assert outputs[0].isnan().any(2).tolist() == [[True, False, False]] * 2
    else:
        assert outputs[0].flatten(1).isnan()[:, lost].all()  # nobody writes it; memory was NaN


@pytest.mark.parametrize("name", OPS)
def test_operators_obey_opcheck(device: str, name: str) -> None:
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS[name].overload, arguments(name, (1, 4, 4, 8, 3), torch.float32, device))


def test_gradients_of_abar_are_the_same_from_run_to_run(device: str) -> None:
    given = arguments("project_step_backward", (3, 16, 16, 64, 7), torch.float32, device)
    first, second = (run("project_step_backward", "triton", given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_step_is_two_launches_and_its_gradient_four() -> None:
    from idm_fast.kernels import project
    from idm_fast.kernels.launch import recording

    step, backward = (
        tuple(t.to("meta") for t in arguments(name, (8, 32, 32, 256, 26), torch.float32, "cpu")) for name in OPS[3:]
    )
    with recording() as launches:
        project.project_step(*step)
    assert len(launches) == 2
    with recording() as launches:
        project.project_step_backward(*backward)
    assert len(launches) == 4


def test_cost_counts_the_matrix_once_and_two_products() -> None:
    from idm_fast.kernels.project import gram_cost, measure_cost

    x, matrix = torch.empty(2, 1, 8, 8, device="meta"), torch.empty(16, 5, device="meta")
    permutation = torch.empty(64, dtype=torch.int64, device="meta")
    assert measure_cost(x, matrix, permutation).written == 4 * 2 * 4 * 5
    assert gram_cost(x, matrix, permutation).flop == 2 * (2 * 8 * 16 * 5)
    assert gram_cost(x, matrix, permutation).bytes == 4 * (128 + 80 + 128) + 8 * 64
