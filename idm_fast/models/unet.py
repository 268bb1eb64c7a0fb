"""Stable Diffusion 1.5's U-Net as IDM uses it: two resolutions, no time embedding, no text, layers wired reversibly.

Parameter names below a block are diffusers' (`norm1`, `transformer_blocks.0.attn1.to_q`, …), so that weights move by prefix
alone (`convert.py`). What DESIGN §1 calls a chain is a `ReversibleSequence`; the rest (conv_in, first resnets, down- and
upsampler, conv_out) changes shape and is plain autograd. Skips are inputs and outputs, never buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from idm_fast.models.injector import Injector
from idm_fast.ops import geglu, group_norm_silu
from idm_fast.reversible import ReversibleSequence, WiredSequence

RESNET_EPS = 1e-5
ATTENTION_EPS = 1e-6


def layer_dtype(x: Tensor) -> torch.dtype:
    """What convolutions and products will compute in: autocast's dtype where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def norm(layer: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    return group_norm_silu(x, layer.weight, layer.bias, layer.num_groups, layer.eps, silu, layer_dtype(x))


class ResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D without time embedding: (B, C_in, h, w) → (B, C_out, h, w).

    With `skip`, its input is [x, skip] along the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, RESNET_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, RESNET_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.conv1(norm(self.norm1, x, silu=True))
        h = self.conv2(norm(self.norm2, h, silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nn.Module):
    """diffusers' Attention on (B, N, C), heads × (C/heads)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = (p(x).view(B, N, self.heads, C // self.heads).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).reshape(B, N, C))


class GatedProjection(nn.Module):
    """diffusers' GEGLU: a projection to twice the width, then value · gelu(gate)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """diffusers' FeedForward with GEGLU, hidden width 4·C; `net.1` is its dropout, which SD 1.5 leaves at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GatedProjection(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock without cross-attention (attn2, norm2)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel with one block: (B, C, h, w) → the same, with a residual around all of it."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: {heads} does not divide the {channels} channels of an attention")
        self.norm = nn.GroupNorm(groups, channels, ATTENTION_EPS)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, height, width = x.shape
        h = self.proj_in(norm(self.norm, x, silu=False))
        h = h.permute(0, 2, 3, 1).reshape(B, height * width, C)
        for block in self.transformer_blocks:
            h = block(h)
        h = h.reshape(B, height, width, C).permute(0, 3, 1, 2)
        return self.proj_out(h) + x


class Level:
    """What the blocks of one resolution have in common, and the bodies that they are made of."""

    def __init__(self, channels: int, r: int, steps: int, heads: int, groups: int, attention: bool) -> None:
        self.channels, self.groups = channels, groups
        self._injector = lambda: Injector(channels, r, steps)
        self._attention = (lambda: [SpatialTransformer(channels, heads, groups)]) if attention else (lambda: [])

    def resnet(self, in_channels: int) -> ResnetBlock:
        return ResnetBlock(in_channels, self.channels, self.groups)

    def injected_attention(self) -> list[nn.Module]:
        return [self._injector(), *self._attention(), self._injector()]


def injections(bodies: nn.ModuleList, condition: tuple[Any, ...]) -> dict[int, tuple[Any, ...]]:
    """Side inputs of a chain: the condition (Aᵀy, physics, t) for its injectors, nothing for the others."""
    return {i: condition for i, body in enumerate(bodies) if isinstance(body, Injector)}


class Block(nn.Module):
    """What changes shape in a block is plain autograd; with `recompute`, backward runs it again instead of storing inside."""

    recompute = False

    def _run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False))
        return function(*inputs)


class DownBlock(Block):
    """Two chains on the same two streams; the merged output of each is a skip. Then, if wanted, a downsampler."""

    def __init__(self, level: Level, in_channels: int, downsample: bool, chain_options: dict[str, Any]) -> None:
        super().__init__()
        keeps_shape = in_channels == level.channels
        self.first_resnet = None if keeps_shape else level.resnet(in_channels)
        chains = []
        for j in range(2):
            resnet = [level.resnet(level.channels)] if keeps_shape or j > 0 else []
            chains.append(ReversibleSequence([*resnet, *level.injected_attention()], **chain_options))
        self.chains = nn.ModuleList(chains)
        self.input_scale = nn.Parameter(torch.ones(1))
        self.merge_scales = nn.Parameter(torch.zeros(2))
        self.downsampler = nn.Conv2d(level.channels, level.channels, 3, stride=2, padding=1) if downsample else None

    def forward(self, x: Tensor, condition: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        if self.first_resnet is not None:
            x = self._run(self.first_resnet, x)
        body_dtype = torch.promote_types(x.dtype, torch.float32)
        chains = cast(Sequence[ReversibleSequence], self.chains)
        x1 = x.to(torch.promote_types(x.dtype, chains[0].stream_dtype))
        x2 = (self.input_scale * x).to(x1.dtype)  # of x, not x1: autograd keeps the factor, and x may be half as wide
        skips = []
        for chain, merge_scale in zip(chains, self.merge_scales, strict=True):
            x1, x2 = chain(x1, x2, extras=injections(chain.bodies, condition), body_dtype=body_dtype)
            skips.append((x1 + merge_scale * x2).to(body_dtype))
        if self.downsampler is not None:
            skips.append(self._run(self.downsampler, skips[-1]))
        return skips[-1], skips


class UpBlock(Block):
    """A resnet that changes the shape, then one chain whose resnets read a skip each, then, if wanted, an upsampler."""

    def __init__(
        self, level: Level, in_channels: int, skip_channels: tuple[int, int, int], upsample: bool, chain_options: dict
    ) -> None:
        super().__init__()
        first, *others = skip_channels
        self.first_resnet = level.resnet(in_channels + first)
        bodies = level.injected_attention()
        for channels in others:
            bodies += [level.resnet(level.channels + channels), *level.injected_attention()]
        self.chain = WiredSequence(bodies, **chain_options)
        self.upsampler = nn.Conv2d(level.channels, level.channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], condition: tuple[Any, ...]) -> Tensor:
        """`skips`: the three that this block reads, in the order in which it reads them."""
        first, *others = skips
        x = self._run(self.first_resnet, x, first)
        bodies = self.chain.chain.bodies
        resnets = [i for i, body in enumerate(bodies) if isinstance(body, ResnetBlock)]
        extras = injections(bodies, condition) | {i: (skip,) for i, skip in zip(resnets, others, strict=True)}
        x = self.chain(x, extras=extras)
        if self.upsampler is not None:
            x = self._run(self._upsample, x)
        return x

    def _upsample(self, x: Tensor) -> Tensor:
        assert self.upsampler is not None
        return self.upsampler(F.interpolate(x.to(layer_dtype(x)), scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """(B, 4, H/2, W/2) → the same: the noise estimate of a pixel-unshuffled image, given Aᵀy and the operator.

    Args:
        widths: channels at the two resolutions.
        steps: T, how many sets of injector weights there are.
        heads: of every attention.
        groups: of every GroupNorm.
        attention: whether each resolution has attention.
        chain_options: for every ReversibleSequence.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        steps: int,
        heads: int,
        groups: int,
        attention: tuple[bool, bool],
        chain_options: dict[str, Any],
    ) -> None:
        super().__init__()
        wide, narrow = widths[1], widths[0]
        high = Level(narrow, 2, steps, heads, groups, attention[0])
        low = Level(wide, 4, steps, heads, groups, attention[1])
        self.conv_in = nn.Conv2d(4, narrow, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [DownBlock(high, narrow, True, chain_options), DownBlock(low, narrow, False, chain_options)]
        )
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(low, 2 * wide, (wide, wide, narrow), True, chain_options),
                UpBlock(high, wide, (narrow, narrow, narrow), False, chain_options),
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, narrow, RESNET_EPS)
        self.conv_out = nn.Conv2d(narrow, 4, 3, padding=1)

    def forward(self, x: Tensor, aty: Tensor, physics: Any, t: int) -> Tensor:
        """x (B, 4, H/2, W/2), aty (B, 1, H, W), t in 1 … T; H and W multiples of 4."""
        condition = (aty, physics, t)
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            x, new_skips = down(x, condition)
            skips += new_skips
        x = torch.cat([x, x], dim=1)  # 2·C channels where the removed blocks of SD 1.5 gave as many
        for up in self.up_blocks:
            x = up(x, [skips.pop() for _ in range(3)], condition)
        return self.conv_out(norm(self.conv_norm_out, x, silu=True))
