"""PSNR and SSIM against their definitions, written out."""

import math

import pytest
import torch

from idm_fast.evaluation.metrics import psnr, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(33, 41, generator=generator)
    return (reference + 0.1 * torch.randn(33, 41, generator=generator)).double(), reference.double()


def test_psnr_is_that_of_range_255_on_clamped_unrounded_values(pair):
    x, reference = pair
    assert x.min() < 0 and x.max() > 1
    mse = ((255 * x.clamp(0, 1) - 255 * reference) ** 2).mean().item()
    assert psnr(x, reference) == pytest.approx(20 * math.log10(255 / math.sqrt(mse)), abs=1e-9)


def test_psnr_of_equal_images_is_infinite():
    assert psnr(torch.ones(8, 8), torch.ones(8, 8)) == math.inf


def test_psnr_of_colour_counts_every_channel_alike():
    reference = torch.zeros(3, 8, 8)
    x = reference.clone()
    x[0] = 0.3
    assert psnr(x, reference) == pytest.approx(-10 * math.log10(0.09 / 3), abs=1e-5)


def test_ssim_is_the_mean_over_7x7_windows_with_sample_covariance(pair):
    x, reference = pair
    a = x.clamp(0, 1).unfold(0, 7, 1).unfold(1, 7, 1).flatten(2)
    b = reference.unfold(0, 7, 1).unfold(1, 7, 1).flatten(2)
    ma, mb = a.mean(-1), b.mean(-1)
    covariance = ((a - ma[..., None]) * (b - mb[..., None])).sum(-1) / 48
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * ma * mb + c1) * (2 * covariance + c2) / ((ma**2 + mb**2 + c1) * (a.var(-1) + b.var(-1) + c2))
    assert ssim(x, reference) == pytest.approx(values.mean().item(), abs=1e-9)


def test_ssim_of_colour_is_the_mean_over_channels(pair):
    x, reference = pair
    images, references = torch.stack([x, reference, x / 2]), torch.stack([reference] * 3)
    assert ssim(images, references) == pytest.approx(
        sum(ssim(i, r) for i, r in zip(images, references, strict=True)) / 3, abs=1e-9
    )


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        psnr(torch.zeros(1, 8, 8), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="shape"):
        ssim(torch.zeros(8, 8), torch.zeros(8, 9))
