"""`attend`: the library's attention by whichever kernel the table names, alone, kept, and compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from idm_fast import ReversibleSequence
from idm_fast.models import attention
from idm_fast.models.attention import attend
from idm_fast.models.unet import SelfAttention

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.by_name[str(func).rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def draw(head_dim: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 16, head_dim, generator=generator).requires_grad_() for _ in range(3)]


@pytest.fixture(params=[None, "cudnn", "math"])
def first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The kernel that the table names for a head_dim of 40 on a CPU, which has "flash" and "math"."""
    if request.param is not None:
        monkeypatch.setitem(attention.FASTEST, ("cpu", 40), request.param)
    return request.param


def test_attention_is_a_softmax_of_scaled_products_whatever_the_table_says(first: str | None) -> None:
    q, k, v = draw()
    expected = torch.softmax(q @ k.transpose(2, 3) / 40**0.5, -1) @ v
    torch.testing.assert_close(attend(q, k, v), expected)


def test_the_kernel_in_the_table_is_asked_for_first_and_for_its_head_dim_alone(
    first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, orders = torch._C._get_sdp_priority_order(), []
    call = lambda q, k, v: orders.append(torch._C._get_sdp_priority_order())  # noqa: E731
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", call)
    for head_dim in (80, 40):
        attend(*draw(head_dim))
    assert orders[0] == usual == torch._C._get_sdp_priority_order()
    assert orders[1][0] == (usual[0] if first is None else int(attention.BACKENDS[first]))
    assert set(orders[1]) >= {int(backend) for backend in attention.BACKENDS.values()}


def test_kept_attention_does_not_run_again_and_gives_the_same_gradients(first: str | None) -> None:
    torch.manual_seed(0)
    chain = ReversibleSequence([SelfAttention(80, heads=2) for _ in range(2)], stream_dtype=torch.float64)
    x = torch.randn(2, 16, 80)
    gradients, runs = [], []
    for recovery, keep in (("store", False), ("invert", False), ("invert", True)):
        with Calls() as calls:
            y1, y2 = chain(x, x, keep, recovery=recovery)
            gradients.append(torch.autograd.grad((y1 * y2).sum(), list(chain.parameters())))
        runs.append(calls.by_name[FLASH])
    assert runs == [2, 4, 2]
    for stored, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, stored)


def test_attention_compiles_without_a_graph_break(first: str | None) -> None:
    q, k, v = draw()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_table_names_kernels_that_there_are() -> None:
    assert set(attention.FASTEST.values()) <= set(attention.BACKENDS)
