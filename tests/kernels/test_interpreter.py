"""The kernels' tests in Triton's interpreter, on CPU tensors: each file in a process that starts with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


FILES = ["test_couple.py", "test_geglu.py", "test_group_norm_silu.py", "test_inject.py", "test_project.py"]


@pytest.mark.parametrize("file", FILES)
def test_kernels_pass_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", str(HERE / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # A worker of pytest-xdist says so in the environment, and a pytest below it would take itself for one.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
