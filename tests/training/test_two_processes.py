"""Two processes with batch b compute what one does with batch 2b."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import idm_fast
from idm_fast.training import train

PROGRAM = """
import json, sys
from idm_fast.training import TrainingConfig, train
train(TrainingConfig(**json.loads(sys.argv[1])))
"""


def train_in_two_processes(config, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", str(tmp_path / "program.py"), json.dumps(config.to_json())]
    environment = os.environ | {"PYTHONPATH": str(Path(idm_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    if not torch.accelerator.is_available():
        del environment["ACCELERATE_USE_CPU"]  # torchrun alone must do on a machine without a GPU
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(settings, lines, photographs, tmp_path):
    options = dict(
        max_train_steps=6, cs_ratio=(0.25, 0.5), schedule="two_level", checkpointing_steps=3, max_grad_norm=0.1,
        validation_data_dir=photographs, validation_steps=3,
    )  # fmt: skip
    one = train(settings(**options, train_batch_size=4, output_dir=tmp_path / "one"))
    two = settings(**options, train_batch_size=1, gradient_accumulation_steps=2, output_dir=tmp_path / "two")
    said = train_in_two_processes(two, tmp_path)
    assert "4 crops of 32² an update, on 2 × cpu" in said and said.count("training ") == 1
    first, second = lines(one), lines(two.output_dir)
    assert [line.get("lr") for line in second] == [line.get("lr") for line in first]
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in first if name in line]
        # Only the order of float32 sums differs; other crops would differ in the second digit.
        assert [line[name] for line in second if name in line] == pytest.approx(expected, rel=1e-5)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.output_dir.iterdir())
