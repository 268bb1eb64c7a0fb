"""DDNM against hand formulas, a denoiser that is never wrong, and the measurements that it must explain."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from idm_fast import BlockCompressedSensing
from idm_fast.evaluation.ddnm import adm_unet, ddnm, schedule

PHI = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
PHYSICS = BlockCompressedSensing((16, 16), 0.25, block_size=8, matrix=PHI)
TRUTH = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TINY = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
}


def abar(t: int) -> float:
    """ᾱ after t + 1 of 1000 steps with β from 1e-4 to 0.02."""
    return math.prod(1 - (1e-4 + (0.02 - 1e-4) * k / 999) for k in range(t + 1))


class Perfect(nn.Module):
    """Knows the image: its noise estimate leads back to `truth` at every step."""

    def __init__(self, truth: Tensor, channels: int = 1) -> None:
        super().__init__()
        self.truth = (2 * truth - 1).expand(-1, channels, -1, -1)
        self.config = SimpleNamespace(in_channels=channels)
        self.timesteps: list[int] = []

    def forward(self, x: Tensor, t: int) -> SimpleNamespace:
        self.timesteps.append(t)
        assert x.shape == self.truth.shape
        noise = (x - self.truth * abar(t) ** 0.5) / (1 - abar(t)) ** 0.5
        return SimpleNamespace(sample=torch.cat([noise, noise + 9], dim=1))


def estimate(unet: nn.Module, **options: object) -> Tensor:
    return ddnm(unet, PHYSICS.A(TRUTH), PHYSICS, generator=torch.Generator().manual_seed(0), **options)


def test_the_schedule_is_the_hand_formula() -> None:
    steps = list(schedule(100))
    assert [t for t, _, _ in steps] == list(range(990, -1, -10))
    for t, now, following in steps:
        assert now == pytest.approx(abar(t), rel=1e-4)  # diffusers multiplies 1000 factors in float32
        assert following == pytest.approx(abar(t - 10) if t else 1.0, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_denoiser_gives_the_truth(channels: int) -> None:
    unet = Perfect(TRUTH, channels)
    assert (estimate(unet) - TRUTH).abs().max() < 1e-4  # of the schedule in float32
    assert unet.timesteps == list(range(990, -1, -10))


def test_the_noise_rule_is_that_of_the_paper() -> None:
    """Two steps with a network that sees no noise, written out."""
    y = PHYSICS.A(TRUTH)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 1, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    unet = lambda x, t: SimpleNamespace(sample=0.1 * x)  # noqa: E731
    target = PHYSICS.A(2 * TRUTH - 1)
    for t, following in ((500, abar(0)), (0, 1.0)):
        e = 0.1 * x
        x0 = (x - (1 - abar(t)) ** 0.5 * e) / abar(t) ** 0.5
        x0 = x0 - PHYSICS.A_adjoint(PHYSICS.A(x0) - target)
        x = following**0.5 * x0 + (1 - following) ** 0.5 * (0.85 * z + (1 - 0.85**2) ** 0.5 * e)
    found = ddnm(unet, y, PHYSICS, steps=2, generator=torch.Generator().manual_seed(0))
    assert (found - (x + 1) / 2).abs().max() < 1e-4


def test_the_estimate_explains_the_measurements_whatever_the_network_says() -> None:
    torch.manual_seed(0)
    unet = adm_unet(**TINY)
    x = estimate(unet.double(), steps=3)
    assert x.shape == TRUTH.shape
    assert (PHYSICS.A(x) - PHYSICS.A(TRUTH)).abs().max() < 1e-12
    assert (x - TRUTH).abs().max() > 1e-3  # where nothing was measured, an untrained network is wrong


def test_moving_to_the_cpu_changes_nothing() -> None:
    unet = Perfect(TRUTH)
    assert torch.equal(estimate(unet, steps=5), estimate(unet, steps=5, through_cpu=True))


def test_adm_unet_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in adm_unet().parameters()) == 552_814_086


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps: 0"), ({"eta": 1.5}, "eta: 1.5")])
def test_arguments_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(Perfect(TRUTH), **options)
