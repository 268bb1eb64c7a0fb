"""The C++ kernels are held to the statements of tests/kernels, whose arguments and bounds are imported from there."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# As for tests/kernels: what cuBLAS asks for where PyTorch's algorithms must be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.append(str(Path(__file__).parent.parent / "kernels"))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set after the other are in use; what this machine does not run is skipped."""
    extension = importlib.import_module("idm_fast._C")
    before = extension.instruction_set()
    try:
        extension.use_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    extension.use_instruction_set(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin give NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
