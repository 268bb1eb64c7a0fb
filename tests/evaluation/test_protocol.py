"""The protocol against the steps of the published test, written out with plain tensors."""

import math
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast.evaluation.metrics import psnr, ssim
from idm_fast.evaluation.protocol import averages, evaluate, reconstructions
from idm_fast.images import InputError


class ScaledAdjoint(torch.nn.Module):
    """Stands in for the network: `scale` times Aᵀy."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))

    def forward(self, y, physics):
        assert not torch.is_grad_enabled() and not self.training
        return self.scale * physics.A_adjoint(y)


@pytest.fixture
def paths(tmp_path):
    random = np.random.default_rng(0)
    for name, size in [("a.png", (40, 50)), ("b.png", (32, 32)), ("c.png", (70, 33))]:
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    return sorted(tmp_path.iterdir())


def published(path, permutation_of, matrix, B):
    luma = np.asarray(Image.open(path).convert("L"))
    height, width = luma.shape
    padded = np.zeros((math.ceil(height / B) * B, math.ceil(width / B) * B), np.float32)
    padded[:height, :width] = luma / 255
    permutation = permutation_of(padded.size)
    y = torch.from_numpy(padded).flatten()[permutation].reshape(-1, B * B) @ matrix
    adjoint = torch.empty(padded.size)
    adjoint[permutation] = (y @ matrix.T).flatten()
    return adjoint.reshape(padded.shape)[:height, :width], torch.from_numpy(luma / 255).float()


def test_images_are_sensed_as_published(paths):
    B, ratio, seed = 16, 0.3, 11
    generator = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(B * B, B * B, generator=generator).double())
    matrix = (U @ V).float()[:, : math.ceil(ratio * B * B)]
    items = list(reconstructions(ScaledAdjoint(2), paths, ratio, B, seed))
    assert [item.result.name for item in items] == ["a.png", "b.png", "c.png"]
    for item, path in zip(items, paths, strict=True):
        adjoint, luma = published(path, lambda n: torch.randperm(n, generator=generator), matrix, B)
        torch.testing.assert_close(item.adjoint, adjoint, atol=1e-5, rtol=0)
        torch.testing.assert_close(item.output, 2 * adjoint, atol=2e-5, rtol=0)
        result = item.result
        assert (result.height, result.width) == tuple(luma.shape) and result.seconds > 0
        assert result.psnr_adjoint == pytest.approx(psnr(adjoint, luma), abs=1e-3)
        assert result.psnr == pytest.approx(psnr(2 * adjoint, luma), abs=1e-3)
        assert result.ssim == pytest.approx(ssim(2 * adjoint, luma), abs=1e-4)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(paths):
    model = ScaledAdjoint(1)
    first, again = evaluate(model, paths, 0.1, 16, seed=1), evaluate(model, paths, 0.1, 16, seed=1)
    other = evaluate(model, paths, 0.1, 16, seed=2)
    assert [r.psnr for r in first] == [r.psnr for r in again] != [r.psnr for r in other]


def test_the_model_is_put_back_into_training(paths):
    model = ScaledAdjoint(1).train()
    evaluate(model, paths[:1], 0.1, 16)
    assert model.training


def test_unusable_images_are_refused_before_the_first_is_reconstructed(paths):
    items = reconstructions(ScaledAdjoint(1), paths, 0.1, block_size=40)
    with pytest.raises(InputError, match="b.png: the image is 32×32"):
        next(items)
    with pytest.raises(InputError, match="no images"):
        evaluate(ScaledAdjoint(1), [], 0.1)


def test_nan_from_the_network_is_an_error_not_a_number_in_a_table(paths):
    with pytest.raises(InputError, match="NaN"):
        evaluate(ScaledAdjoint(math.nan), paths, 0.1, 16)


def test_averages_are_means_over_images(paths):
    results = evaluate(ScaledAdjoint(1), paths, 0.1, 16)
    assert averages(results)["psnr"] == pytest.approx(fmean(r.psnr for r in results))
    assert averages(results)["ssim_adjoint"] == pytest.approx(fmean(r.ssim_adjoint for r in results))
