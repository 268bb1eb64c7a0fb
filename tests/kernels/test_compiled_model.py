"""The whole network on the kernels, compiled into one graph: output and every gradient against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_whole_model import error, exact_convolutions, step

from idm_fast.ops import registry

__all__ = ["exact_convolutions"]

pytestmark = pytest.mark.usefixtures("exact_convolutions")

WITH_GRADIENT = {"group_norm_silu", "layer_norm", "geglu", "inject_read", "inject_write", "project_step"}
IN_A_GRAPH = {"couple", "uncouple", "gram"} | WITH_GRADIENT | {f"{name}_backward" for name in WITH_GRADIENT}
"""Ops that a compiled network with schedule "flat" calls; nothing there works in place."""


def test_the_compiled_network_runs_on_the_kernels_without_a_graph_break(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.load("triton") is None
    called: set[str] = set()
    for name, op in registry.OPS.items():
        if "triton" in op.implementations:
            function, devices = op.implementations["triton"]

            def spy(*args: Any, name: str = name, function: Callable[..., Any] = function) -> Any:
                called.add(name)
                return function(*args)

            monkeypatch.setitem(op.implementations, "triton", (spy, devices))
    exact = step(1, "reference", device, torch.float64)
    assert not called
    found = step(1, "triton", device, schedule="flat", compiler="inductor" if device == "cuda" else "aot_eager")
    assert called >= IN_A_GRAPH
    assert error(found.pop("output"), exact["output"]) <= 1e-4
    assert max((error(t, exact[name]), name) for name, t in found.items()) <= (1e-3, "")
