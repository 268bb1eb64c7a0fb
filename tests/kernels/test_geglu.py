"""Parity of GEGLU's kernels."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, assert_parity, draw

from idm_fast import ops
from idm_fast.ops import registry

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(2,), (1, 2), (5, 3, 74), (7, 2 * 257), (3, 1, 2 * 64), (2, 0, 6), (0, 4)]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_in_every_dtype_and_size(device: str, shape: tuple, dtype: torch.dtype, implementation: str) -> None:
    h = draw(*shape, dtype=dtype, device=device)
    dout = draw(*shape[:-1], shape[-1] // 2, dtype=dtype, device=device)
    assert_parity("geglu", implementation, (h,))
    assert_parity("geglu_backward", implementation, (dout, h))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_in_every_layout(device: str, layout: str, implementation: str) -> None:
    h = draw(3, 4, 5, 14, dtype=torch.float32, device=device, layout=layout)
    dout = draw(3, 4, 5, 7, dtype=torch.float32, device=device, layout=layout)
    assert_parity("geglu", implementation, (h,))
    assert_parity("geglu_backward", implementation, (dout, h))


def test_far_out_gates_give_neither_nan_nor_a_gradient_of_their_own(device: str) -> None:
    h = torch.tensor([[1.0, 1.0, 1.0, 1.0, -40.0, 40.0, -1e4, 1e4]], device=device)
    assert_parity("geglu", "triton", (h,))
    assert_parity("geglu_backward", "triton", (torch.ones(1, 4, device=device), h))


@pytest.mark.parametrize("name", ["geglu", "geglu_backward"])
def test_operator_obeys_opcheck(device: str, name: str) -> None:
    h = draw(3, 5, 14, dtype=torch.float32, device=device, layout="transposed")
    dout = draw(3, 5, 7, dtype=torch.float32, device=device)
    with ops.use("triton"):
        torch.library.opcheck(registry.OPS[name].overload, (h,) if name == "geglu" else (dout, h))


def test_cost_counts_every_tensor_once() -> None:
    from idm_fast.kernels.geglu import geglu_backward_cost, geglu_cost

    h, dout = (torch.empty(3, d, dtype=torch.bfloat16, device="meta") for d in (8, 4))
    assert geglu_cost(h).bytes == 48 + 24
    assert geglu_backward_cost(dout, h).bytes == 24 + 48 + 48
