"""The diffusers pipeline gives what the model gives, clamped, in the type that was asked for."""

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast import IDM, BlockCompressedSensing, IDMPipeline


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return IDMPipeline(IDM(steps=1, widths=(16, 32), heads=2, norm_groups=8, attention=(False, True)))


@pytest.fixture(scope="module")
def physics():
    return BlockCompressedSensing((32, 64), ratio=0.25, block_size=16)


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 1, 32, 64, generator=torch.Generator().manual_seed(0))


def test_measurements_give_the_models_output_clamped(pipe, physics, image):
    y = physics.A(image)
    with torch.no_grad():
        expected = pipe.model.eval()(y, physics)[:, 0].clamp(0, 1)
    tensor = pipe(measurements=y, physics=physics, output_type="pt").images
    assert torch.equal(tensor, expected) and not tensor.requires_grad
    array = pipe(measurements=y, physics=physics, output_type="np").images
    np.testing.assert_array_equal(array, expected.numpy())
    (pictures,) = pipe(measurements=y, physics=physics, return_dict=False)
    assert [picture.size for picture in pictures] == [(64, 32)] * 2
    np.testing.assert_array_equal(np.asarray(pictures[1]), (expected[1] * 255).round().numpy())


def test_an_image_is_padded_sensed_and_cut_back(pipe, physics, image):
    small = image[:1, :, :30, :50]
    padded = torch.nn.functional.pad(small, (0, 14, 0, 2))
    direct = pipe(measurements=physics.A(padded), physics=physics, output_type="pt").images[:, :30, :50]
    for given in (small, small[0], small[0, 0], small[0, 0].numpy()):
        assert torch.equal(pipe(image=given, physics=physics, output_type="pt").images, direct)
    picture = Image.fromarray((small[0, 0] * 255).round().byte().numpy())
    assert pipe(image=picture, physics=physics).images[0].size == (50, 30)


def test_the_mode_of_the_model_is_put_back(pipe, physics, image):
    pipe.model.train()
    pipe(image=image, physics=physics)
    assert pipe.model.training


def test_save_and_load(tmp_path, pipe, physics, image):
    pipe.save_pretrained(tmp_path)
    loaded = IDMPipeline.from_pretrained(tmp_path)
    expected = pipe(image=image, physics=physics, output_type="pt").images
    assert torch.equal(loaded(image=image, physics=physics, output_type="pt").images, expected)


def test_bad_arguments_are_refused(pipe, physics, image):
    y = physics.A(image)
    with pytest.raises(ValueError, match="exactly one"):
        pipe(physics=physics)
    with pytest.raises(ValueError, match="exactly one"):
        pipe(measurements=y, image=image, physics=physics)
    with pytest.raises(ValueError, match="output_type is 'jpg'"):
        pipe(measurements=y, physics=physics, output_type="jpg")
    with pytest.raises(ValueError, match="NaN"):
        pipe(measurements=y * float("nan"), physics=physics)
    with pytest.raises(ValueError, match="larger than"):
        pipe(image=torch.zeros(33, 64), physics=physics)
    with pytest.raises(ValueError, match="expected"):
        pipe(image=torch.zeros(2, 3, 32, 64), physics=physics)
    with pytest.raises(ValueError):
        pipe(measurements=y[:, :-1], physics=physics)
