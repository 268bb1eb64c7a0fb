"""Measurement files hold all that reconstruction needs, and nothing that does not fit gets through."""

import pickle

import numpy as np
import pytest
import torch

from idm_fast.images import InputError
from idm_fast.measurements import Measurements, sense, to_image


@pytest.fixture
def image():
    return torch.rand(1, 50, 70, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path, image):
    measurements, _ = sense(image, 0.1, 16, seed=7)
    return measurements.save(tmp_path / "a.npz")


def rewrite(path, **changes):
    """The file again with some arrays changed; None removes one."""
    with np.load(path) as file:
        arrays = {**{name: file[name] for name in file.files}, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_measurements_give_the_same_adjoint(tmp_path, channels):
    image = torch.rand(channels, 50, 70, generator=torch.Generator().manual_seed(0))
    measurements, physics = sense(image, 0.25, 16, seed=7)
    loaded = Measurements.load(measurements.save(tmp_path / "a.npz"))
    assert torch.equal(loaded.y, measurements.y)
    assert (loaded.image_size, loaded.padded_size) == ((50, 70), (64, 80))
    assert loaded.channels == ("rgb" if channels == 3 else "y")
    assert (loaded.ratio, loaded.block_size, loaded.seed) == (0.25, 16, 7)
    assert torch.equal(loaded.physics().A_adjoint(loaded.y), physics.A_adjoint(measurements.y))


def test_every_channel_is_sensed_by_the_same_operator():
    image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    measurements, _ = sense(image, 0.5, 16)
    assert torch.equal(measurements.y[0], measurements.y[1]) and torch.equal(measurements.y[0], measurements.y[2])


def test_at_ratio_one_the_adjoint_is_the_image(image):
    measurements, physics = sense(image, 1.0, 16)
    torch.testing.assert_close(to_image(physics.A_adjoint(measurements.y), (50, 70)), image, atol=1e-5, rtol=0)


def test_matrix_and_permutation_in_place_of_a_seed(tmp_path, image):
    measurements, physics = sense(image, 0.1, 16, seed=7)
    own = Measurements(
        measurements.y, (50, 70), (64, 80), "y", 0.1, 16, matrix=physics.matrix, permutation=physics.permutation
    )
    loaded = Measurements.load(own.save(tmp_path / "a.npz"))
    assert loaded.seed is None
    assert torch.equal(loaded.physics().A_adjoint(loaded.y), physics.A_adjoint(measurements.y))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(saved, bad):
    with np.load(saved) as file:
        y = file["y"].copy()
    y[0, 3, 5] = bad
    rewrite(saved, y=y)
    with pytest.raises(InputError, match="1 NaN or infinite"):
        Measurements.load(saved)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"y": np.zeros((1, 20, 25), np.float32)}, "y has shape"),
        ({"y": np.zeros((20, 26), np.float32)}, "y has shape"),
        ({"y": np.zeros((1, 20, 26), np.int64)}, "y has type int64"),
        ({"y": None}, "y missing"),
        ({"ratio": 0.2}, "y has shape"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": np.nan}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"block_size": 0}, "block_size"),
        ({"padded_size": (64, 64)}, "do not fit"),
        ({"padded_size": (80, 80)}, "do not fit"),
        ({"image_size": (0, 70)}, "do not fit"),
        ({"image_size": 50}, "image_size has type"),
        ({"channels": "rgb"}, "y has shape"),
        ({"channels": "cmyk"}, "channels is 'cmyk'"),
        ({"seed": None}, "how y was sensed"),
        ({"seed": 0.5}, "seed has type"),
        ({"seed": None, "matrix": np.ones((256, 26), np.float32), "permutation": np.arange(5120)}, "orthonormal"),
        ({"seed": None, "matrix": np.eye(256, 26, dtype=np.float32), "permutation": np.zeros(5120, int)}, "is none"),
        ({"format_version": 99}, "format_version is 99"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(InputError, match=message) as caught:
        Measurements.load(saved).physics()
    assert "\n" not in str(caught.value)


def test_pickles_are_refused_and_not_executed(tmp_path, saved):
    touched = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return touched.touch, ()

    bomb = np.empty((), object)
    bomb[()] = Bomb()
    rewrite(saved, ratio=bomb)
    with pytest.raises(InputError, match="cannot be read"):
        Measurements.load(saved)
    saved.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="damaged or no .npz"):
        Measurements.load(saved)
    assert not touched.exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_file_is_refused(saved, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(InputError, match="a.npz"):
        Measurements.load(saved)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Measurements.load(tmp_path / "nothing.npz")


def test_image_under_one_block_is_refused():
    with pytest.raises(InputError, match="31×80"):
        sense(torch.zeros(1, 31, 80), 0.1, 32)


def test_failed_save_leaves_nothing(tmp_path, image):
    measurements, _ = sense(image, 0.1, 16)
    with pytest.raises(InputError, match="cannot write"):
        measurements.save(tmp_path / "no_such_folder" / "a.npz")
    assert list(tmp_path.iterdir()) == []
