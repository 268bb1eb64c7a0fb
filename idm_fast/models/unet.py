"""Stable Diffusion 1.5's U-Net as IDM uses it: two resolutions, no time embedding, no text, layers wired reversibly.

Parameter names below a block are diffusers' (`norm1`, `transformer_blocks.0.attn1.to_q`, …), so that weights move by prefix
alone (`convert.py`). What DESIGN §1 calls a chain is a `ReversibleSequence`; the rest (conv_in, first resnets, down- and
upsampler, conv_out) changes shape; backward stores or recomputes it. Skips are inputs and outputs, never buffers.

The end of a chain travels unmerged (`ChainEnd`): its two streams are stored for the inversion anyway, so whoever reads
y1 + m·y2 makes it on the spot, and makes it again in backward, instead of having it stored as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.memory.schedule import ChainSchedule, StepSchedule
from idm_fast.models.attention import attend
from idm_fast.models.injector import Injector
from idm_fast.models.layers import Conv2d, Linear, layer_dtype, weights_in
from idm_fast.ops import chunked_feed_forward, geglu, group_norm_silu, layer_norm
from idm_fast.reversible import ChainEnd, ReversibleSequence, WiredSequence, kept, recompute

RESNET_EPS = 1e-5
ATTENTION_EPS = 1e-6


def norm(layer: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    return group_norm_silu(x, layer.weight, layer.bias, layer.num_groups, layer.eps, silu, layer_dtype(x))


class ResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D without time embedding: (B, C_in, h, w) → (B, C_out, h, w).

    With `skip`, its input is [x, skip] along the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, RESNET_EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, RESNET_EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

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
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(channels, channels, bias=False)
        self.to_v = Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor, keep: bool = False) -> Tensor:
        """With `keep`, a reversible layer around stores what attention returns instead of attending again."""
        B, N, C = x.shape
        q, k, v = (p(x).view(B, N, self.heads, C // self.heads).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        out = kept(attend, q, k, v) if keep else attend(q, k, v)
        return self.to_out[0](out.transpose(1, 2).reshape(B, N, C))


class GatedProjection(nn.Module):
    """diffusers' GEGLU: a projection to twice the width, then value · gelu(gate)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """diffusers' FeedForward with GEGLU, hidden width 4·C; `net.1` is its dropout, which SD 1.5 leaves at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GatedProjection(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """With `rows`, no more rows of the hidden layer exist at once, and it is computed again in backward."""
        if rows is None or rows >= x.shape[0] * x.shape[1]:
            return self.net[2](self.net[0](x))
        projection, last = cast(GatedProjection, self.net[0]).proj, cast(Linear, self.net[2])
        return chunked_feed_forward(x, *weights_in(projection, x), *weights_in(last, x), rows)


class TransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock without cross-attention (attn2, norm2)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, keep_attention: bool = False, feed_forward_rows: int | None = None) -> Tensor:
        x = x + self.attn1(self._normed(self.norm1, x), keep_attention)
        return x + self.ff(self._normed(self.norm3, x), feed_forward_rows)

    @staticmethod
    def _normed(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x, layer.weight, layer.bias, layer.eps, layer_dtype(x))


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel with one block: (B, C, h, w) → the same, with a residual around all of it."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: {heads} does not divide the {channels} channels of an attention")
        self.norm = nn.GroupNorm(groups, channels, ATTENTION_EPS)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads)])
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, keep_attention: bool = False, feed_forward_rows: int | None = None) -> Tensor:
        """What is kept and what comes in chunks: see `ChainSchedule`."""
        B, C, height, width = x.shape
        h = self.proj_in(norm(self.norm, x, silu=False))
        h = h.permute(0, 2, 3, 1).reshape(B, height * width, C)
        for block in self.transformer_blocks:
            h = block(h, keep_attention, feed_forward_rows)
        h = h.reshape(B, height, width, C).permute(0, 3, 1, 2)
        return x + self.proj_out(h)  # in the format of x, the first operand


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


def side_inputs(
    bodies: nn.ModuleList, condition: tuple[Any, ...], schedule: ChainSchedule, skips: tuple[Tensor, ...] = ()
) -> dict[int, tuple[Any, ...]]:
    """What the bodies of a chain read besides a stream.

    Injectors read the condition (Aᵀy, physics, t), attentions what the schedule says of them, and resnets a skip each, as long
    as there are any.
    """
    remaining = iter(skips)
    inputs: dict[int, tuple[Any, ...]] = {}
    for i, body in enumerate(bodies):
        if isinstance(body, Injector):
            inputs[i] = condition
        elif isinstance(body, SpatialTransformer):
            inputs[i] = (schedule.keep_attention, schedule.feed_forward_rows)
        elif (skip := next(remaining, None)) is not None:
            inputs[i] = (skip,)
    return inputs


def run(again: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs); with `again`, backward runs it once more instead of storing what is inside."""
    return recompute(function, *inputs, preserve_rng_state=False) if again else function(*inputs)


class DownBlock(nn.Module):
    """A chain from (x, s·x); merged in the middle and at its end it gives a skip each. Then, if wanted, a downsampler."""

    def __init__(self, level: Level, in_channels: int, downsample: bool, chain_options: dict[str, Any]) -> None:
        super().__init__()
        keeps_shape = in_channels == level.channels
        self.first_resnet = None if keeps_shape else level.resnet(in_channels)
        first = [*([level.resnet(level.channels)] if keeps_shape else []), *level.injected_attention()]
        second = [level.resnet(level.channels), *level.injected_attention()]
        self.first_part = len(first)
        """Layers before the first skip."""
        self.chain = ReversibleSequence([*first, *second], **chain_options)
        self.input_scale = nn.Parameter(torch.ones(1))
        self.merge_scales = nn.Parameter(torch.zeros(2))
        self.downsampler = Conv2d(level.channels, level.channels, 3, stride=2, padding=1) if downsample else None

    def forward(
        self, x: Tensor, condition: tuple[Any, ...], again: bool, schedule: ChainSchedule
    ) -> tuple[Tensor, ChainEnd]:
        """The two skips. `again`: what changes shape is recomputed."""
        if self.first_resnet is not None:
            x = run(again, self.first_resnet, x)
        first_scale, last_scale = self.merge_scales
        y1, y2, (skip,) = self.chain(
            x,
            input_scale=self.input_scale,
            extras=side_inputs(self.chain.bodies, condition, schedule),
            merges={self.first_part - 1: first_scale},
            recovery=schedule.recovery,
        )
        return skip.to(torch.promote_types(x.dtype, torch.float32)), ChainEnd(y1, y2, last_scale)

    def smaller(self, end: ChainEnd, dtype: torch.dtype) -> Tensor:
        """The end at half the resolution."""
        assert self.downsampler is not None
        return self.downsampler(end.merged(dtype))


class UpBlock(nn.Module):
    """A resnet that changes the shape, then one chain whose resnets read a skip each."""

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
        self.upsampler = Conv2d(level.channels, level.channels, 3, padding=1) if upsample else None

    def forward(
        self,
        enter: Callable[..., Tensor],
        end: ChainEnd,
        skips: tuple[ChainEnd, Tensor, Tensor],
        condition: tuple[Any, ...],
        again: bool,
        schedule: ChainSchedule,
    ) -> ChainEnd:
        """`enter`: (end, dtype) → what goes in; `skips`: in the order in which they are read. `again`: as in `DownBlock`."""
        first, *others = skips
        dtype = torch.promote_types(others[0].dtype, torch.float32)

        def start(end: ChainEnd, first: ChainEnd) -> Tensor:
            return self.first_resnet(enter(end, dtype), first.merged(dtype))

        extras = side_inputs(self.chain.chain.bodies, condition, schedule, tuple(others))
        return self.chain.unmerged(run(again, start, end, first), extras=extras, recovery=schedule.recovery)

    def larger(self, end: ChainEnd, dtype: torch.dtype) -> Tensor:
        """The end at twice the resolution."""
        assert self.upsampler is not None
        x = end.merged(dtype)
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
        self.conv_in = Conv2d(4, narrow, 3, padding=1)
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
        self.conv_out = Conv2d(narrow, 4, 3, padding=1)

    def forward(self, x: Tensor, aty: Tensor, physics: Any, t: int, schedule: StepSchedule) -> Tensor:
        """x (B, 4, H/2, W/2), aty (B, 1, H, W), t in 1 … T; H and W multiples of 4."""
        condition, again, dtype = (aty, physics, t), schedule.recompute_between, torch.promote_types(x.dtype, torch.float32)
        (down_high, down_low), (up_low, up_high), chains = self.down_blocks, self.up_blocks, schedule.chains
        high = self.conv_in(x)
        high_middle, high_end = down_high(high, condition, again, chains[0])
        low = run(again, cast(DownBlock, down_high).smaller, high_end, dtype)
        low_middle, low_end = down_low(low, condition, again, chains[1])
        # 2·C channels where the removed blocks of SD 1.5 gave as many
        end = up_low(_twice, low_end, (low_end, low_middle, low), condition, again, chains[2])
        end = up_high(up_low.larger, end, (high_end, high_middle, high), condition, again, chains[3])
        return run(again, self._leave, end, dtype)

    def _leave(self, end: ChainEnd, dtype: torch.dtype) -> Tensor:
        return self.conv_out(norm(self.conv_norm_out, end.merged(dtype), silu=True))


def _twice(end: ChainEnd, dtype: torch.dtype) -> Tensor:
    x = end.merged(dtype)
    return torch.cat([x, x], dim=1)
