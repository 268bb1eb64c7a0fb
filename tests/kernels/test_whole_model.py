"""The whole network on the kernels, narrow and small: output and every gradient against the reference in float64.

At full width, on the published network's own figures: tests/models/test_parity.py, on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from idm_fast import IDM, BlockCompressedSensing, ops

pytestmark = pytest.mark.usefixtures("exact_convolutions")


@pytest.fixture
def exact_convolutions(poisoned_outputs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 are that, not TF32; and an operator that PyTorch has in no deterministic form may run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)


def network(steps: int) -> IDM:
    """Attention at both levels, every parameter off its start so that no scale of 0 or 1 hides anything."""
    torch.manual_seed(0)
    model = IDM(steps=steps, widths=(16, 32), heads=2, norm_groups=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def step(
    steps: int,
    implementation: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    schedule: str = "store",
    autocast: torch.dtype | None = None,
    compiler: str | None = None,
) -> dict[str, Tensor]:
    """Output, loss and gradients by name of a training step on an 8×16 image, in float64; compiled as a whole by `compiler`."""
    model = network(steps).to(device, dtype)
    model.schedule = schedule
    forward = torch.compile(model, backend=compiler, fullgraph=True) if compiler else model
    physics = BlockCompressedSensing((8, 16), 0.25, block_size=8).to(device, dtype)
    x = torch.rand(1, 1, 8, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with ops.use(implementation):
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            out = forward(physics.A(x), physics)
        loss = (out - x).abs().mean()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: t.detach().double() for name, t in ({"output": out, "loss": loss} | gradients).items()}


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("schedule", "steps"), [("store", 2), ("flat", 1)])
def test_output_and_every_gradient_are_right_in_float32(device: str, schedule: str, steps: int) -> None:
    exact = step(steps, "reference", device, torch.float64)
    found = step(steps, "triton", device, schedule=schedule)
    assert error(found.pop("output"), exact["output"]) <= 1e-4
    assert max((error(t, exact[name]), name) for name, t in found.items()) <= (1e-3, "")


def test_output_and_gradients_are_as_right_as_eager_under_bfloat16_autocast(device: str) -> None:
    exact = step(1, "reference", device, torch.float64)
    eager, found = (step(1, name, device, autocast=torch.bfloat16) for name in ("reference", "triton"))
    assert error(found["output"], exact["output"]) <= 2 * error(eager["output"], exact["output"])
    together = [torch.cat([t.flatten() for name, t in parts.items() if name != "output"]) for parts in (found, eager, exact)]
    assert error(together[0], together[2]) <= 2 * error(together[1], together[2])
