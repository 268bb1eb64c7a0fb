"""The kernels' tests in Triton's interpreter, on CPU tensors: in processes that start with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


FILES = {
    "elementwise": ["test_couple.py", "test_fixed_point_kernels.py", "test_geglu.py", "test_inject.py"],
    "sums": ["test_group_norm_silu.py", "test_layer_norm.py", "test_project.py"],
    "the whole model": ["test_whole_model.py"],
    "the whole model, compiled": ["test_compiled_model.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_kernels_pass_in_the_interpreter(kind: str) -> None:
    files = [str(HERE / name) for name in FILES[kind]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # A worker of pytest-xdist says so in the environment, and a pytest below it would take itself for one.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_no_file_is_left_out() -> None:
    not_here = {"test_interpreter.py", "test_kernel_choice.py", "test_resources.py"}
    assert {path.name for path in HERE.glob("test_*.py")} - not_here == {name for names in FILES.values() for name in names}
