"""What an injector layer of a reversible chain moves through memory at setting S (DESIGN §5), counted on fake tensors.

Every launched op reads its tensors once and writes its results once; ops of idm_fast are one launch, as a kernel is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idm_fast import ReversibleSequence, ops
from idm_fast.memory.count import _FREE_OF_CHARGE
from idm_fast.models.injector import Injector

BATCH, SIZE = 8, 256
LEVELS = [(320, 2), (640, 4)]
"""Channels and r of the U-Net's two resolutions."""


class Traffic(TorchDispatchMode):
    """Bytes that launched ops read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or str(func).startswith(_FREE_OF_CHARGE)):
            moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in moved)
        return out


class Sensing:
    """AᵀA at ratio 0.1."""

    def __init__(self) -> None:
        self.matrix, self.permutation = torch.empty(1024, 103), torch.empty(SIZE**2, dtype=torch.int64)

    def gram(self, x: Tensor) -> Tensor:
        return ops.gram(x, self.matrix, self.permutation)


class PublishedInjector(nn.Module):
    """The published code's sequence of operations."""

    def __init__(self, channels: int, r: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.PixelShuffle(r), nn.Conv2d(channels // r**2, 1, 1))
        self.write = nn.Sequential(nn.Conv2d(3, channels // r**2, 1), nn.PixelUnshuffle(r))

    def forward(self, x: Tensor, aty: Tensor, physics: Sensing) -> Tensor:
        image = self.read(x)
        return x + self.write(torch.cat([image, physics.gram(image.float()).to(image.dtype), aty.to(image.dtype)], 1))


@pytest.fixture(autouse=True)
def without_data() -> Iterator[None]:
    with FakeTensorMode():
        yield


def published_bytes(channels: int, r: int, autocast: bool) -> tuple[int, int]:
    """Of a layer's forward, and of its forward and backward: the coupling, its inverse and its gradients written out."""
    body, physics, v, aty = PublishedInjector(channels, r), Sensing(), torch.empty(1), torch.empty(BATCH, 1, SIZE, SIZE)
    x1, x2, d1, d2 = (torch.empty(BATCH, channels, SIZE // r, SIZE // r) for _ in range(4))
    with Traffic() as traffic, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        with torch.no_grad():
            y1 = (1 - v) * body(x1, aty, physics) + v * x2
        forward = traffic.bytes
        with torch.enable_grad():
            y2 = x1.detach().requires_grad_()
            out = body(y2, aty, physics)
        with torch.no_grad():
            x2 = (y1 - (1 - v) * out) / v
            _ = v * d1, (d1 * (x2 - out)).sum()  # dx2, dv
        dx1, *_ = torch.autograd.grad(out, [y2, *body.parameters()], (1 - v) * d1)
        dx1 += d2
    return forward, traffic.bytes


def our_bytes(channels: int, r: int, autocast: bool) -> tuple[int, int]:
    """The same of a chain of one layer; its gradients of the streams are both there, as inside of a longer chain."""
    chain = ReversibleSequence([Injector(channels, r, 1)], check_v=False, preserve_rng_state=False)
    x1, x2, d1, d2 = (torch.empty(BATCH, channels, SIZE // r, SIZE // r) for _ in range(4))
    aty = torch.empty(BATCH, 1, SIZE, SIZE)
    with Traffic() as traffic, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        y = chain(x1.requires_grad_(), x2.requires_grad_(), aty, Sensing(), 1)
        forward = traffic.bytes
        torch.autograd.grad(y, [x1, x2, *chain.parameters()], [d1, d2])
    return forward, traffic.bytes


@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("channels", "r"), LEVELS)
def test_a_layer_moves_at_most_two_fifths_of_what_eager_moves(channels: int, r: int, autocast: bool) -> None:
    for ours, published in zip(our_bytes(channels, r, autocast), published_bytes(channels, r, autocast), strict=True):
        assert ours <= 0.4 * published


@pytest.mark.parametrize(("channels", "r"), LEVELS)
def test_a_layer_passes_over_the_features_4_times_forward_and_17_times_in_all(channels: int, r: int) -> None:
    """Forward reads x1 twice, x2, and writes y1. Backward reads x1 for the images; x1, y1, d1 for x2, dx2 and the gradient of
    the output; x1 and that for dx1; and adds d2 to it."""
    features = 4 * BATCH * channels * (SIZE // r) ** 2
    forward, both = our_bytes(channels, r, True)
    assert 4 * features <= forward <= 4.5 * features
    assert 17 * features <= both <= 18.5 * features
