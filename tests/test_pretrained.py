"""Weights that cannot be used are refused with the reason, before anything runs; pickles are never executed."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError
from idm_fast.pretrained import load_weights, require_trained_for

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


@pytest.fixture
def model():
    torch.manual_seed(0)
    options = {"widths": (16, 32), "heads": 2, "norm_groups": 8, "attention": (False, True)}
    return IDM(steps=2, **options, trained_ratios=[0.1, 0.25], block_size=32, sensing_seed=2025)


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refused(path, message, **arguments):
    with pytest.raises(InputError, match=message) as caught:
        load_weights(path, **arguments)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_good_folder_gives_the_same_weights_in_eval_mode(folder, model):
    loaded = load_weights(folder, step_number=2)
    assert not loaded.training and loaded.config["trained_ratios"] == [0.1, 0.25]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_missing_empty_and_truncated_files(tmp_path, folder):
    refused(tmp_path / "nothing", "do not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    whole = (folder / WEIGHTS).read_bytes()
    for length in (4, 1000, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        refused(folder, "is damaged")
    (folder / WEIGHTS).write_bytes(b"")
    refused(folder, "0 bytes")
    (folder / WEIGHTS).unlink()
    refused(folder, "has no diffusion_pytorch_model.safetensors")
    (folder / CONFIG).write_text("{")
    refused(folder, "config.json is damaged")


def test_wrong_number_of_steps(folder):
    refused(folder, "trained for 2 steps, and --step_number is 3", step_number=3)


def test_config_of_another_model(folder):
    change_config(folder, _class_name="UNet2DModel")
    refused(folder, "describes UNet2DModel")


@pytest.mark.parametrize("changes", [{"steps": 3}, {"widths": [32, 64]}, {"attention": [False, False]}])
def test_config_that_does_not_fit_the_tensors(folder, changes):
    change_config(folder, **changes)
    refused(folder, "tensors differ")


def test_config_that_no_network_can_have(folder):
    change_config(folder, widths=[7, 9])
    refused(folder, "widths")


def test_a_missing_tensor_is_not_filled_with_random_numbers(folder):
    change_tensors(folder, lambda tensors: tensors.pop("alpha"))
    refused(folder, "1 tensors differ, first alpha, which is missing")


def test_nan_and_parameters_out_of_range(folder):
    change_tensors(folder, lambda tensors: tensors["alpha"].fill_(1.5))
    refused(folder, "alpha")
    change_tensors(folder, lambda tensors: tensors["alpha"].fill_(float("nan")))
    refused(folder, "NaN or infinite values in 1 tensors, first alpha")


def test_pickles_are_never_executed(tmp_path, folder):
    touched = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return touched.touch, ()

    torch.save({"alpha": Bomb()}, tmp_path / "a.pkl")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"alpha": Bomb()}))
    for name in ("a.pkl", "b.pkl"):
        refused(tmp_path / name, "never executed")
    (folder / WEIGHTS).rename(folder / "elsewhere")
    torch.save({"alpha": Bomb()}, folder / "diffusion_pytorch_model.bin")
    refused(folder, "is a pickle, which is not executed")
    assert not touched.exists()


@pytest.mark.parametrize(
    "content, message",
    [(b"", "0 bytes"), (b"abc" * 100, "cannot be used"), (b"PK\x03\x04" + bytes(50), "cannot be used")],
)
def test_damaged_published_files(tmp_path, content, message):
    (tmp_path / "net_params_50.pkl").write_bytes(content)
    refused(tmp_path / "net_params_50.pkl", message)


def test_files_that_are_no_weights(tmp_path, folder):
    refused(folder / WEIGHTS, "pass the folder")
    (tmp_path / "photo.png").write_bytes(b"png")
    refused(tmp_path / "photo.png", "neither a folder nor a published checkpoint")


def test_published_file_is_read_and_its_steps_are_checked(tmp_path):
    torch.manual_seed(0)
    model = IDM(steps=2, widths=(32, 64))
    model.save_published(tmp_path / "net_params_1.pkl")
    loaded = load_weights(tmp_path / "net_params_1.pkl", step_number=2)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    refused(tmp_path / "net_params_1.pkl", "trained for 2 steps", step_number=5)


def test_ratio_and_block_size_must_be_those_of_the_training(model):
    require_trained_for(model, 0.25, 32)
    with pytest.raises(InputError, match="ratio 0.3 .* trained for 0.1, 0.25"):
        require_trained_for(model, 0.3, 32)
    with pytest.raises(InputError, match="block_size 16 .* trained for 32"):
        require_trained_for(model, 0.1, 16)
    require_trained_for(model, 0.3, 16, any_ratio=True)
    require_trained_for(IDM(steps=1, widths=(16, 32), heads=2, norm_groups=8), 0.3, 16)
