"""Micro-benchmarks of the ops under pytest-benchmark: `pytest benchmarks/test_ops.py` (pip install 'idm-fast[bench]').

The case `kernels` answers how good they are; this is for someone who works on one: `-k couple --benchmark-compare`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases.kernels import Level, arguments, by_implementation, weight_of
from benchmarks.contenders import implementations
from idm_fast.ops.registry import OPS

pytest.importorskip("pytest_benchmark", reason="pip install 'idm-fast[bench]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVEL = Level(8, 320, 128, 2) if DEVICE == "cuda" else Level(1, 64, 64, 2)

KERNELS = implementations(DEVICE)
CONTENDERS = [(name, i) for name, op in OPS.items() for i in KERNELS if i in op.implementations and op.serves(i, DEVICE)]


@pytest.fixture(scope="module")
def given() -> dict[str, tuple[Any, ...]]:
    return arguments(LEVEL, DEVICE)


@pytest.mark.parametrize(("name", "implementation"), CONTENDERS)
def test_op(benchmark: Any, given: dict[str, tuple[Any, ...]], name: str, implementation: str) -> None:
    function = by_implementation(implementation, name)

    def call() -> None:
        function(*given[name])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    if OPS[name].overload._schema.is_mutable:
        weight_of(name, given[name]).fill_(1)  # then inverting again and again gives the same numbers
    benchmark(call)
