"""The prediction against PyTorch's own CUDA allocator, on a GPU whose kernels do nothing (tests/hollow_gpu)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@pytest.mark.slow
@pytest.mark.skipif((torch.version.cuda or "").split(".")[0] != "13", reason="this PyTorch is not built for CUDA 13")
@pytest.mark.skipif(not TOOLKIT.exists(), reason=f"there is no CUDA toolkit in {TOOLKIT}; set CUDA_HOME")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_prediction.py measures there")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_allocator_of_cuda_agrees_with_the_prediction_within_3_percent(implementation: str) -> None:
    hollow = Path(__file__).parents[1] / "hollow_gpu"
    command = [sys.executable, str(hollow), "benchmarks.memory_against_prediction", "--device", "cuda"]
    environment = os.environ | {"IDM_FAST_IMPL": implementation}
    done = subprocess.run(command, cwd=hollow.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "hollow GPU: no launch" not in done.stderr, done.stderr
    errors = [float(line.split("|")[-2].strip(" %")) for line in done.stdout.splitlines() if line.startswith("| `")]
    assert len(errors) == 5 and all(abs(error) <= 3 for error in errors), done.stdout
