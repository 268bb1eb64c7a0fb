"""Block compressed sensing: the published operator, drawn the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from idm_fast import BlockCompressedSensing
from idm_fast.physics import measurements_per_block, sensing_matrix, sensing_sequence


def test_operator_is_an_orthonormal_projection() -> None:
    physics = BlockCompressedSensing((32, 64), 0.25).double()
    x = torch.rand(3, 1, 32, 64, dtype=torch.float64)
    y = physics.A(x)
    assert y.shape == (3, 2, 256)
    torch.testing.assert_close(physics.A(physics.A_adjoint(y)), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(physics.gram(x), physics.A_adjoint(y))
    torch.testing.assert_close(physics.A_dagger(y), physics.A_adjoint(y))


def test_adjoint_is_the_transpose() -> None:
    physics = BlockCompressedSensing((16, 16), 0.3, block_size=8).double()
    x = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    y = torch.rand(2, 4, physics.num_measurements, dtype=torch.float64)
    torch.testing.assert_close((physics.A(x) * y).sum(), (x * physics.A_adjoint(y)).sum())


def test_measuring_everything_keeps_everything() -> None:
    physics = BlockCompressedSensing((16, 16), 1.0, block_size=8)
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(physics.A_adjoint(physics.A(x)), x, rtol=1e-4, atol=1e-5)


def test_published_definition_row_by_row() -> None:
    physics = BlockCompressedSensing((16, 32), 0.1, block_size=8, seed=3)
    x = torch.rand(1, 1, 16, 32)
    expected = x.reshape(-1)[physics.permutation].reshape(-1, 64) @ physics.matrix
    torch.testing.assert_close(physics.A(x)[0], expected)


def test_matrix_is_the_published_one_whatever_the_ratio() -> None:
    gaussian = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    U, _, Vh = torch.linalg.svd(gaussian)
    for ratio, q in ((0.1, 7), (0.5, 32), (1.0, 64)):
        torch.testing.assert_close(sensing_matrix(8, ratio, 5), (U @ Vh)[:, :q], rtol=1e-4, atol=1e-4)
        assert measurements_per_block(ratio, 8) == q


def test_protocol_draws_one_matrix_and_a_new_permutation_for_each_image() -> None:
    first, second, third = sensing_sequence([(16, 16), (16, 16), (8, 16)], 0.2, 8, seed=1)
    assert torch.equal(first.matrix, second.matrix)
    assert not torch.equal(first.permutation, second.permutation)
    assert third.image_size == (8, 16) and third.permutation.numel() == 128
    assert torch.equal(first.permutation, BlockCompressedSensing((16, 16), 0.2, 8, seed=1).permutation)


def test_other_permutation_shares_the_matrix_and_leaves_the_first_alone() -> None:
    physics = BlockCompressedSensing((16, 16), 0.2, 8)
    before = physics.permutation.clone()
    other = physics.with_permutation(torch.arange(256))
    assert other.matrix is physics.matrix
    assert torch.equal(physics.permutation, before)
    assert torch.equal(other.permutation, torch.arange(256))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio: .* is outside \(0, 1\]"):
        BlockCompressedSensing((32, 32), ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (30, 31)}, "not a multiple of block_size² = 64"),
        ({"image_size": (0, 32)}, "image_size"),
        ({"block_size": 0}, "block_size: 0"),
        ({"permutation": torch.zeros(256, dtype=torch.int64)}, "permutation is none"),
        ({"permutation": torch.arange(1, 257)}, "permutation is none"),
        ({"permutation": torch.arange(-1, 255)}, "permutation is none"),
        ({"permutation": torch.arange(255)}, "expected \\(256,\\) int64"),
        ({"matrix": torch.ones(64, 13)}, "not orthonormal"),
        ({"matrix": torch.full((64, 13), float("nan"))}, "not orthonormal"),
        ({"matrix": torch.eye(64)}, "expected floating \\(64, 13\\)"),
    ],
)
def test_operator_that_cannot_be_is_refused(options: dict, message: str) -> None:
    arguments = {"image_size": (16, 16), "ratio": 0.2, "block_size": 8} | options
    with pytest.raises(ValueError, match=message):
        BlockCompressedSensing(**arguments)


DEVELOPMENT_DATA = Path(__file__).parents[3] / "shared" / "data" / "test" / "Set11"


@pytest.mark.skipif(not DEVELOPMENT_DATA.is_dir(), reason="needs the development folder with Set11, which is not shipped")
def test_adjoint_of_real_images_loses_what_the_ratio_says() -> None:
    from idm_fast.images import list_images, read_luma

    for path in list_images(DEVELOPMENT_DATA)[:3]:
        x = read_luma(path)[None, None]
        physics = BlockCompressedSensing(tuple(x.shape[-2:]), 0.25, seed=2025)
        kept = physics.A_adjoint(physics.A(x)).square().sum() / x.square().sum()
        assert kept.item() == pytest.approx(0.25, abs=0.01)
