"""Parity of GEGLU's C++ kernels, with every instruction set."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, assert_parity, draw, run
from test_geglu import DTYPES, SHAPES

from idm_fast import ops
from idm_fast.ops import native, registry

pytestmark = [
    pytest.mark.skipif(native.load_cpu() is not None, reason=f"no C++ extension: {native.load_cpu()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2 * 1500), (9000, 4)], ids=str)
def test_parity_in_every_dtype_and_size(instruction_set: str, shape: tuple, dtype: torch.dtype) -> None:
    h = draw(*shape, dtype=dtype, device="cpu")
    dout = draw(*shape[:-1], shape[-1] // 2, dtype=dtype, device="cpu")
    assert_parity("geglu", "cpu", (h,))
    assert_parity("geglu_backward", "cpu", (dout, h))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_in_every_layout(layout: str) -> None:
    h = draw(3, 4, 5, 14, dtype=torch.float32, device="cpu", layout=layout)
    dout = draw(3, 4, 5, 7, dtype=torch.float32, device="cpu", layout=layout)
    assert_parity("geglu", "cpu", (h,))
    assert_parity("geglu_backward", "cpu", (dout, h))


def test_far_out_gates_give_neither_nan_nor_a_gradient_of_their_own(instruction_set: str) -> None:
    h = torch.tensor([[1.0, 1.0, 1.0, 1.0, -40.0, 40.0, -1e4, 1e4]])
    assert_parity("geglu", "cpu", (h,))
    assert_parity("geglu_backward", "cpu", (torch.ones(1, 4), h))


def test_nan_in_a_gate_stays_nan(instruction_set: str) -> None:
    h = torch.tensor([[1.0, float("nan")], [float("nan"), 1.0], [1.0, 1.0]])
    assert run("geglu", "cpu", (h,))[0].isnan().flatten().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(two_threads: None, dtype: torch.dtype) -> None:
    h, dout = draw(700, 150, dtype=dtype, device="cpu"), draw(700, 75, dtype=dtype, device="cpu")
    of_two = run("geglu", "cpu", (h,)) + run("geglu_backward", "cpu", (dout, h))
    torch.set_num_threads(1)
    of_one = run("geglu", "cpu", (h,)) + run("geglu_backward", "cpu", (dout, h))
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


@pytest.mark.parametrize("name", ["geglu", "geglu_backward"])
def test_operator_obeys_opcheck(name: str) -> None:
    h = draw(3, 5, 14, dtype=torch.float32, device="cpu", layout="transposed")
    dout = draw(3, 5, 7, dtype=torch.float32, device="cpu")
    with ops.use("cpu"):
        torch.library.opcheck(registry.OPS[name].overload, (h,) if name == "geglu" else (dout, h))


def test_wrong_arguments_are_named() -> None:
    h = torch.ones(2, 6)
    for arguments, message in (((torch.ones(2, 2), h), "dout is"), ((torch.ones(2, 3), h.long()), "h: its dtype")):
        with pytest.raises(RuntimeError, match=message):
            run("geglu_backward", "cpu", arguments)
    with pytest.raises(RuntimeError, match=r"h is \(2, 5\), expected"):
        run("geglu", "cpu", (torch.ones(2, 5),))
