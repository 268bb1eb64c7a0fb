"""The choice of implementation: explicit or refused, never hidden."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from idm_fast import ops
from idm_fast.ops import registry


def test_choosing_what_is_not_there_says_why() -> None:
    with pytest.raises(RuntimeError, match="'cpu' cannot be used: .*no C\\+\\+ extension"):
        ops.use("cpu")
    assert registry.current_choice() is None


def test_unknown_implementation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RuntimeError, match="unknown implementation; known are cuda, triton, cpu, reference"):
        ops.use("quick")


def test_use_is_a_context_manager_that_puts_the_choice_back() -> None:
    with ops.use("reference"):
        assert registry.current_choice() == "reference"
        with ops.use(None):
            assert registry.current_choice() is None
        assert registry.current_choice() == "reference"
    assert registry.current_choice() is None


def test_an_added_implementation_is_taken_automatically_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.OPS["geglu"]
    monkeypatch.setitem(op.implementations, "cpu", (lambda h: torch.full_like(h[..., ::2], 7.0), ("cpu",)))
    h = torch.zeros(2, 4)
    assert (ops.geglu(h) == 7).all()
    with ops.use("reference"):
        assert (ops.geglu(h) == 0).all()
    row = next(row for row in ops.report(("cpu",)) if row.op == "geglu")
    assert (row.implementation, row.available) == ("cpu", ("cpu", "reference"))
    with ops.use("cpu"), pytest.raises(RuntimeError, match="idm_fast::couple has no 'cpu' implementation here"):
        ops.couple(h, h, torch.ones(1))


def test_environment_variable_that_cannot_be_met_is_named() -> None:
    environment = os.environ | {"IDM_FAST_IMPL": "cuda"}
    run = subprocess.run(
        [sys.executable, "-c", "import idm_fast.ops"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert "environment variable IDM_FAST_IMPL=cuda" in run.stderr
