"""Every CUDA kernel is built for sm_80, 90 and 100, spills nothing, and takes what csrc/cuda/resources.csv says."""

from __future__ import annotations

import os
import shutil

import cuda_resources
import pytest

from idm_fast.ops import native


def test_every_kernel_is_built_without_spills_as_recorded() -> None:
    if reason := cuda_resources.missing():
        chosen = (native.build_record() or {}).get("mode") in ("cpu", "python") or os.environ.get("TORCH_CUDA_ARCH_LIST")
        assert chosen or not shutil.which("nvcc"), f"there is nvcc, and yet {reason}"
        pytest.skip(reason)
    rows = cuda_resources.measure()
    assert not [row for row in rows if row.spilled]
    made_by, recorded = cuda_resources.read()
    if made_by == cuda_resources.compiler():
        assert rows == recorded, "python tests/native/cuda_resources.py --write records a change that is meant"
    else:  # another compiler allocates otherwise; what is compiled stays the same
        assert [(row.source, row.kernel, row.arch) for row in rows] == [(row.source, row.kernel, row.arch) for row in recorded]


def test_no_recorded_kernel_spills_or_is_recorded_twice() -> None:
    _, recorded = cuda_resources.read()
    names = [(row.source, row.kernel, row.arch) for row in recorded]
    assert len(names) == len(set(names)) and {arch for *_, arch in names} == set(cuda_resources.ARCHITECTURES)
    assert not [row for row in recorded if row.spilled]
