"""The published network and its ways to train it, modelled on the weights of an `IDM`: what ours is measured against.

The layers are plain PyTorch as diffusers has them: GroupNorm, then SiLU in place, GEGLU as two halves and a product, the
injector and the sampling step operation by operation, both streams of a chain concatenated along the channels. Backward has
what it needs by one of these schedules:

- "plain": autograd stores it;
- "checkpoint": torch.utils.checkpoint around every layer of a chain and around what changes shape between the chains;
- "published": reversible as in the published code. A chain is an autograd Function that runs without a graph and keeps its
  outputs. Its backward takes the layers from the last to the first: runs the body again with a graph, calls `.backward` on
  that, and inverts the coupling. The sampling steps are such a chain too, whose bodies hold the chains of the U-Net. A skip
  is left with the resnet that reads it, graph and all, so the `.backward` of that resnet walks on through the part of the
  down path that made the skip, and recomputes it: the four halves of the down path are walked 4, 3, 2 and 1 times.

Parameters' gradients are the same to rounding, which the cases check before they count or time anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from idm_fast import IDM
from idm_fast.models.injector import Injector
from idm_fast.models.unet import DownBlock, ResnetBlock, SpatialTransformer, UpBlock

SCHEDULES = ("plain", "checkpoint", "published")


@dataclass(frozen=True)
class _Layer:
    """y1 = (1−v)·body(x1) + v·x2, y2 = x1."""

    body: Callable[[Tensor], Tensor]
    v: Tensor

    def y1(self, x1: Tensor, x2: Tensor) -> Tensor:
        return (1 - self.v) * self.body(x1) + self.v * x2

    def backward(self, y1: Tensor, y2: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x1, x2 and their gradients. Those of parameters, and of whatever else the body reads, are added up inside."""
        x1 = y2.detach().requires_grad_()
        with torch.enable_grad():
            F_v = (1 - self.v) * self.body(x1)
            # The graph that a skip carries is walked again by others.
            F_v.backward(d1, retain_graph=True)
        with torch.no_grad():
            assert x1.grad is not None and self.v.grad is not None
            dx1, x1.grad = x1.grad + d2, None
            dx2 = self.v * d1
            x2 = (y1 - F_v) / self.v
            self.v.grad += (x2 * d1).sum()
        return x1, x2, dx1, dx2


class _Replay(torch.autograd.Function):
    """A chain of layers on concatenated streams that keeps its outputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[_Layer], autocast_lost: bool) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        for layer in layers:
            x1, x2 = layer.y1(x1, x2), x1
        device = x.device.type
        enabled = torch.is_autocast_enabled(device) and not autocast_lost
        ctx.autocast = device, torch.get_autocast_dtype(device), enabled
        ctx.save_for_backward(x1.detach(), x2.detach())
        ctx.layers = layers
        return torch.cat([x1, x2], dim=1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        d1, d2 = d.chunk(2, dim=1)
        x1, x2 = ctx.saved_tensors
        with torch.autocast(*ctx.autocast):
            for layer in reversed(ctx.layers):
                x1, x2, d1, d2 = layer.backward(x1, x2, d1, d2)
        return torch.cat([d1, d2], dim=1), None, None


class PublishedNetwork(nn.Module):
    """What `model` computes, as the published code computes it.

    Args:
        model: whose weights are used; its own schedule does not count.
        schedule: one of `SCHEDULES`.
        autocast_lost: with "published", replays of the U-Net's layers run outside of autocast. So the published code behaves
            on a CPU: what it puts back in backward (torch.cuda.amp.custom_bwd) is CUDA's autocast alone.
    """

    def __init__(self, model: IDM, schedule: str, autocast_lost: bool = False) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: {schedule!r} is unknown, expected one of {SCHEDULES}")
        self.model, self.schedule, self._autocast_lost = model, schedule, autocast_lost
        self._skips: dict[UpBlock, tuple[Tensor, ...]] = {}
        """What the resnets inside an up chain read. The published code registers it with them as buffers, so with "published"
        it lives, graph and all, until the next run of the block."""

    def release(self) -> None:
        """Let go of what lives until the next run: a second network on the same GPU should not find it there."""
        self._skips.clear()

    def forward(self, y: Tensor, physics: Any) -> Tensor:
        """(B, H·W/N, q) → (B, 1, H, W); `physics` is a BlockCompressedSensing."""
        model = self.model
        sensing = _Sensing(physics.matrix, physics.permutation, physics.permutation.argsort(), physics.image_size)
        device = y.device.type
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            abar = torch.cat([model.alpha.new_ones(1), model.alpha.cumprod(0)])
            aty = sensing.adjoint(y)
            x = abar[-1].pow(0.5) * torch.cat([aty, model.input_scale * aty], dim=1)
            T = len(model.v)
            step = partial(self._step, y=y, aty=aty, sensing=sensing, abar=abar, autocast=autocast)
            layers = [_Layer(partial(step, t=t), v) for t, v in zip(range(T, 0, -1), model.v, strict=True)]
            # Checkpoints are around the layers of the U-Net: the steps hold them.
            x = self._chain(layers, x, "plain" if self.schedule == "checkpoint" else self.schedule)
            return x[:, :1] + model.merge_scale * x[:, 1:]

    def _chain(self, layers: Sequence[_Layer], x: Tensor, schedule: str) -> Tensor:
        if schedule == "published":
            return cast(Tensor, _Replay.apply(x, layers, self._autocast_lost))
        x1, x2 = x.chunk(2, dim=1)
        for layer in layers:
            y1 = checkpoint(layer.y1, x1, x2, use_reentrant=False) if schedule == "checkpoint" else layer.y1(x1, x2)
            x1, x2 = y1, x1
        return torch.cat([x1, x2], dim=1)

    def _between(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs) if self.schedule == "plain" else checkpoint(function, *inputs, use_reentrant=False)

    def _step(
        self,
        x: Tensor,
        y: Tensor,
        aty: Tensor,
        sensing: _Sensing,
        abar: Tensor,
        autocast: tuple[str, torch.dtype, bool],
        t: int,
    ) -> Tensor:
        with torch.autocast(*autocast, cache_enabled=False):
            inject = partial(_inject, aty=aty, sensing=sensing, t=t)
            e = F.pixel_shuffle(self._unet(F.pixel_unshuffle(x, 2), inject), 2)
            x = (x - (1 - abar[t]).pow(0.5) * e) / abar[t].pow(0.5)
            x = x - sensing.adjoint(sensing.measure(x) - y)
            return abar[t - 1].pow(0.5) * x + (1 - abar[t - 1]).pow(0.5) * e

    def _unet(self, x: Tensor, inject: Callable[[Injector, Tensor], Tensor]) -> Tensor:
        unet = self.model.unet
        x = _conv(unet.conv_in, x)
        skips = [x]
        for down in unet.down_blocks:
            x, made = self._down(cast(DownBlock, down), x, inject)
            skips += made
        x = x.repeat(1, 2, 1, 1)
        for up in unet.up_blocks:
            x = self._up(cast(UpBlock, up), x, skips[-3:], inject)
            del skips[-3:]
        return _conv(unet.conv_out, F.silu(unet.conv_norm_out(x), inplace=True))

    def _down(self, block: DownBlock, x: Tensor, inject: Callable[[Injector, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        if block.first_resnet is not None:
            x = self._between(partial(_resnet, block.first_resnet), x)
        x = torch.cat([x, block.input_scale * x], dim=1)
        layers, skips = _layers(block.chain, inject), []
        for part, m in zip((layers[: block.first_part], layers[block.first_part :]), block.merge_scales, strict=True):
            x = self._chain(part, x, self.schedule)
            y1, y2 = x.chunk(2, dim=1)
            skips.append(y1 + m * y2)
        if block.downsampler is None:
            return skips[-1], skips
        skips.append(self._between(partial(_conv, block.downsampler), skips[-1]))
        return skips[-1], skips

    def _up(self, block: UpBlock, x: Tensor, skips: list[Tensor], inject: Callable[[Injector, Tensor], Tensor]) -> Tensor:
        x = self._between(partial(_resnet, block.first_resnet), torch.cat([x, skips[-1]], dim=1))
        inside = skips[-2], skips[-3]
        if self.schedule == "published":
            self._skips[block] = inside
        x = torch.cat([x, block.chain.input_scale * x], dim=1)
        x = self._chain(_layers(block.chain.chain, inject, inside), x, self.schedule)
        y1, y2 = x.chunk(2, dim=1)
        x = y1 + block.chain.merge_scale * y2
        if block.upsampler is None:
            return x
        return self._between(lambda x: _conv(block.upsampler, F.interpolate(x, scale_factor=2.0, mode="nearest")), x)


def _layers(chain: Any, inject: Callable[[Injector, Tensor], Tensor], skips: Sequence[Tensor] = ()) -> list[_Layer]:
    """The layers of a chain; its resnets read a skip each, as long as there are any."""
    remaining = iter(skips)

    def body_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        if isinstance(module, Injector):
            return partial(inject, module)
        if isinstance(module, SpatialTransformer):
            return partial(_transformer, module)
        assert isinstance(module, ResnetBlock)
        return partial(_resnet, module, skip=next(remaining, None))

    return [_Layer(body_of(module), v) for module, v in zip(chain.bodies, chain.v, strict=True)]


@dataclass(frozen=True)
class _Sensing:
    """Φ, the permutation, its inverse, and the image's size; A and Aᵀ as gathers and products under autograd."""

    matrix: Tensor
    permutation: Tensor
    inverse: Tensor
    size: tuple[int, int]

    def measure(self, x: Tensor) -> Tensor:
        B, N = x.shape[0], self.matrix.shape[0]
        return x.reshape(B, -1)[:, self.permutation].reshape(B, -1, N) @ self.matrix

    def adjoint(self, y: Tensor) -> Tensor:
        B = y.shape[0]
        return (y @ self.matrix.t()).reshape(B, -1)[:, self.inverse].reshape(B, 1, *self.size)


def _conv(layer: Any, x: Tensor) -> Tensor:
    """torch's own convolution: autocast casts the weights at every call."""
    return cast(Tensor, layer._conv_forward(x, layer.weight, layer.bias))


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _resnet(block: ResnetBlock, x: Tensor, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    h = _conv(block.conv1, F.silu(block.norm1(x), inplace=True))
    h = _conv(block.conv2, F.silu(block.norm2(h), inplace=True))
    return h + (x if block.conv_shortcut is None else _conv(block.conv_shortcut, x))


def _transformer(body: SpatialTransformer, x: Tensor) -> Tensor:
    B, C, height, width = x.shape
    h = _conv(body.proj_in, body.norm(x)).permute(0, 2, 3, 1).reshape(B, height * width, C)
    for block in body.transformer_blocks:
        h = h + _attention(block.attn1, block.norm1(h))
        value, gate = _linear(block.ff.net[0].proj, block.norm3(h)).chunk(2, dim=-1)
        h = h + _linear(block.ff.net[2], value * F.gelu(gate))
    return _conv(body.proj_out, h.reshape(B, height, width, C).permute(0, 3, 1, 2)) + x


def _attention(layer: Any, x: Tensor) -> Tensor:
    B, N, C = x.shape
    q, k, v = (_linear(p, x).view(B, N, layer.heads, -1).transpose(1, 2) for p in (layer.to_q, layer.to_k, layer.to_v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
    return _linear(layer.to_out[0], h) / 1.0  # diffusers' rescale_output_factor


def _inject(body: Injector, h: Tensor, aty: Tensor, sensing: _Sensing, t: int) -> Tensor:
    z = _conv(body.read[t - 1], F.pixel_shuffle(h, body.r))
    z = torch.cat([z, sensing.adjoint(sensing.measure(z)), aty], dim=1)
    return h + F.pixel_unshuffle(_conv(body.write[t - 1], z), body.r)
