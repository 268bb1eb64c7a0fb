"""DDNM, the zero-shot baseline: a diffusion model that nobody trained for the operator, made consistent with y at every step.

Wang, Yu, Zhang, "Zero-shot image restoration using denoising diffusion null-space model", ICLR 2023: its noise-free sampler as
its authors' code has it, with the timesteps and ᾱ of diffusers' DDIMScheduler. The reference sampler of IDM's paper takes
`steps` = 100 and `eta` = 0.85. A step from t to t' is

    x0 = (x − √(1−ᾱ)·ε)/√ᾱ        x0 ← x0 − A⁺(A x0 − y)        x ← √ᾱ'·x0 + √(1−ᾱ')·(η·z + √(1−η²)·ε),  z ~ N(0, 1)

The scheduler's own `step(eta=…)` has another noise rule and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

ADM_UNET: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
}
"""Arguments of diffusers' UNet2DModel for the layers of the unconditional 256² ImageNet network that DDNM uses, of 552.8 M
parameters: two resnets a level, attention at 32², 16² and 8² with 64 channels a head, a mean and a variance as output."""


def adm_unet(**overrides: Any) -> UNet2DModel:
    """The U-Net of `ADM_UNET` with fresh weights; `overrides` replace its arguments."""
    return UNet2DModel(**(ADM_UNET | overrides))


def schedule(steps: int = 100) -> Iterator[tuple[int, float, float]]:
    """(t, ᾱ_t, ᾱ_t') of each step, from noise to image; t' is the next t, and ᾱ = 1 at the end.

    Raises:
        ValueError: `steps` is not in 1 … 1000.
    """
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps: {steps} is not in 1 … 1000, the timesteps that the network was trained with")
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    abar = [float(scheduler.alphas_cumprod[t]) for t in timesteps]
    return zip(timesteps, abar, [*abar[1:], float(scheduler.final_alpha_cumprod)], strict=True)


@torch.no_grad()
def ddnm(
    unet: nn.Module,
    y: Tensor,
    physics: Any,
    steps: int = 100,
    eta: float = 0.85,
    generator: torch.Generator | None = None,
    through_cpu: bool = False,
) -> Tensor:
    """An image that explains y: (B, 1, H, W) with values around [0, 1], not clamped, so that A x̂ = y.

    Args:
        unet: predicts the noise in images of [−1, 1]: `unet(x, t).sample`, as diffusers' UNet2DModel, of one or more channels.
            Of more output channels than it takes in, the first are the noise (ADM's others are a variance). A network for
            colour images restores y in each channel, and the result is the channels' mean.
        y: A x of images x in [0, 1].
        physics: has `A` and `A_dagger` for images (B, 1, H, W); A must be linear with A A⁺ = I on its range.
        steps: calls of the network. eta: share of fresh noise, in [0, 1].
        generator: of the noise, on y's device.
        through_cpu: move the image and its estimate to the CPU after each step, as the authors' code does to keep them. It
            costs time and changes nothing else.

    Raises:
        ValueError: `steps` or `eta` out of range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is outside [0, 1]")
    pinv = physics.A_dagger(y)
    channels = int(getattr(getattr(unet, "config", None), "in_channels", 1))
    B, _, H, W = pinv.shape
    # A(2x − 1), which the affine map to [−1, 1] makes of y = A x, for each channel
    y = (2 * y - physics.A(torch.ones_like(pinv))).repeat_interleave(channels, dim=0)

    def consistent(x0: Tensor) -> Tensor:
        planes = x0.reshape(B * channels, 1, H, W)
        return (planes - physics.A_dagger(physics.A(planes) - y)).reshape(x0.shape)

    def noise() -> Tensor:
        return torch.randn((B, channels, H, W), generator=generator, device=pinv.device, dtype=pinv.dtype)

    x = noise()
    kept: list[Tensor] = []
    for t, abar, abar_next in schedule(steps):
        x = x.to(pinv.device)
        e = unet(x, t).sample[:, :channels].to(x.dtype)
        x0 = consistent((x - (1 - abar) ** 0.5 * e) / abar**0.5)
        x = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * (eta * noise() + (1 - eta**2) ** 0.5 * e)
        if through_cpu:
            x = x.cpu()
            kept.append(x0.cpu())
    return (x.to(pinv.device).mean(dim=1, keepdim=True) + 1) / 2
