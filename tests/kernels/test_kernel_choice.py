"""When the Triton kernels are loaded and chosen. Each test runs in a process of its own: the choice is one for a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_imports_neither_triton_nor_the_kernels() -> None:
    done = run_python("import sys, idm_fast; print({'triton', 'idm_fast.kernels.couple'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
def test_without_gpu_and_interpreter_triton_is_refused_with_the_remedy() -> None:
    done = run_python("import idm_fast; idm_fast.use('triton')", TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "'triton' cannot be used: PyTorch sees no GPU" in done.stderr and "TRITON_INTERPRET=1" in done.stderr


def test_without_triton_the_reason_is_that() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from idm_fast.ops import registry; print(registry.missing_reason('triton'))"
    )
    assert "Triton is not installed" in run_python(code).stdout


def test_environment_variable_chooses_triton_and_an_op_without_kernel_says_so() -> None:
    code = (
        "import torch; from idm_fast import ops; from idm_fast.ops import registry\n"
        "print(ops.geglu(torch.ones(1, 4)).tolist(), registry.OPS['geglu'].choose('cpu'))\n"
        "del registry.OPS['geglu'].implementations['triton']; ops.geglu(torch.ones(1, 4))"
    )
    done = run_python(code, TRITON_INTERPRET="1", IDM_FAST_IMPL="triton")
    assert done.stdout.startswith("[[0.841") and done.stdout.rstrip().endswith("triton")
    assert "idm_fast::geglu has no 'triton' implementation here: triton has no kernel for it" in done.stderr


def test_the_interpreter_is_never_chosen_unasked() -> None:
    code = (
        "from idm_fast import ops\n"
        "row = next(row for row in ops.report(('cpu',)) if row.op == 'couple')\n"
        "print(row.implementation, 'triton' in row.available, row.reason, sep='; ')"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    chosen, available, _ = done.stdout.strip().split("; ")
    assert chosen in ("cpu", "reference") and available == "True", done.stderr


def test_every_op_has_kernels() -> None:
    code = (
        "from idm_fast.ops import registry; registry.load_triton()\n"
        "print(sorted(name for name, op in registry.OPS.items() if 'triton' not in op.implementations))"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "[]", done.stderr
