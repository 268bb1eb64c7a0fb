"""Photographs, weights and settings small enough to train on in seconds."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageFilter

from idm_fast.models.idm import IDM
from idm_fast.training import TrainingConfig

SIZES = [(40, 56), (33, 64), (48, 32), (64, 64)]


@pytest.fixture(autouse=True)
def a_fresh_accelerate_on_the_cpu(monkeypatch):
    """accelerate keeps one state a process; tests differ in precision, and their numbers are compared bit by bit."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of four smooth random images of different sizes, all sides at least 32."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(random.integers(0, 256, (height, width), np.uint8))
        image.filter(ImageFilter.GaussianBlur(2)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The folder of a one-step IDM with 73,000 parameters."""
    torch.manual_seed(0)
    model = IDM.tiny(steps=1, widths=(16, 16), heads=2, norm_groups=4, attention=(False, False))
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(photographs, weights, tmp_path):
    """`settings(name=value, …)` → a TrainingConfig for a short run into tmp_path/run."""

    def make(**changes):
        values = {
            "train_data_dir": photographs,
            "output_dir": tmp_path / "run",
            "pretrained_model_name_or_path": str(weights),
            "step_number": 1,
            "resolution": 32,
            "block_size": 16,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "schedule": "store",
        }
        return TrainingConfig(**(values | changes))

    return make


@pytest.fixture
def lines():
    """`lines(folder)` → the metrics of a run without the times, which no two runs share."""

    def read(folder):
        parsed = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name != "seconds"} for line in parsed]

    return read
