"""Agreement with the published network, at full width: output, loss and all 585 gradients."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from idm_fast import IDM, BlockCompressedSensing, ReversibleSequence, ops
from idm_fast.models.convert import published_names

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("published_rule", HERE / "published_rule.py")
assert spec is not None and spec.loader is not None
published_rule = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published_rule)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(HERE / "parity" / "official_parity.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[str, list[int]]]:
    with gzip.open(HERE / "parity" / "published_keys.json.gz", "rt") as file:
        return {key: (first, shape) for key, (first, shape) in json.load(file).items()}


@pytest.fixture(scope="module")
def published(data: dict[str, np.ndarray]) -> IDM:
    """The full-width network with the weights of the rule, float64."""
    with torch.device("meta"):
        model = IDM(steps=int(data["T"]))
    model = model.to_empty(device="cpu").double()
    with torch.no_grad():
        for name, (first, *_) in published_names(model).items():
            parameter = model.get_parameter(name)
            parameter.copy_(published_rule.weight(first, parameter.shape, int(data["seed"])))
    return model


def step(
    model: IDM, data: dict[str, np.ndarray], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[float, float]]:
    """Relative error by quantity, against the stored ones: a pair (error, error) for out and loss, (norm, dot) by parameter."""
    model.zero_grad()
    physics = BlockCompressedSensing(
        (32, 32), float(data["ratio"]), matrix=torch.from_numpy(data["Phi"]), permutation=torch.from_numpy(data["perm"])
    ).to(device, dtype)
    x = torch.from_numpy(data["x"]).to(device, dtype)
    y = physics.A(x)
    torch.testing.assert_close(y.double().cpu(), torch.from_numpy(data["y"]), rtol=0, atol=torch.finfo(dtype).eps * 100)
    out = model(y, physics)
    loss = (out - x).abs().mean()
    loss.backward()
    expected = torch.from_numpy(data["out"])
    errors = {
        "out": (((out.detach().double().cpu() - expected).norm() / expected.norm()).item(),) * 2,
        "loss": (abs(loss.item() / data["loss"].item() - 1),) * 2,
    }
    index = {name: i for i, name in enumerate(data["names"])}
    for name, (first, *_) in published_names(model).items():
        gradient = model.get_parameter(name).grad.double().flatten().cpu()
        norm, dot = data["grad_norm"][index[first]], data["grad_dot"][index[first]]
        found = (gradient @ published_rule.probe(first, gradient.numel())).item()
        errors[first] = (abs(gradient.norm().item() / norm - 1), abs(found - dot) / norm)
    return errors


def worst(errors: dict[str, tuple[float, float]]) -> tuple[float, str]:
    """Largest error among the gradients, and whose it is."""
    return max((max(pair), name) for name, pair in errors.items() if name not in ("out", "loss"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "keep"),
    [("store", None), ("two_level", None), ("two_level", ()), ("flat", None), ("flat", ("attention",))],
)
def test_float64_output_loss_and_every_gradient_agree_to_1e_9(
    published: IDM, data: dict[str, np.ndarray], schedule: str, keep: tuple[str, ...] | None
) -> None:
    published.double().set_schedule(schedule, keep)
    errors = step(published, data, torch.float64)
    assert len(errors) == 585 + 2
    assert errors["out"][0] <= 1e-9
    assert errors["loss"][0] <= 1e-9
    assert worst(errors) <= (1e-9, "")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["store", "two_level", "flat"])
def test_float32_output_agrees_to_1e_4_and_every_gradient_to_1e_3_of_its_norm(
    published: IDM, data: dict[str, np.ndarray], schedule: str
) -> None:
    published.float().set_schedule(schedule)
    errors = step(published, data, torch.float32)
    published.double()
    assert errors["out"][0] <= 1e-4
    assert worst(errors) <= (1e-3, "")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["store", "two_level", "flat"])
def test_kernels_agree_in_float32_at_full_width(
    published: IDM, data: dict[str, np.ndarray], schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 convolutions are to be that
    published.float().cuda().set_schedule(schedule)
    with ops.use("triton"):
        errors = step(published, data, torch.float32, "cuda")
    published.cpu().double()
    assert errors["out"][0] <= 1e-4
    assert worst(errors) <= (1e-3, "")


@pytest.mark.slow
def test_float32_streams_agree_to_1e_3_of_the_norm_of_all_gradients(published: IDM, data: dict[str, np.ndarray]) -> None:
    """Inverting in float32 adds up to 5e-3 to two scalars whose own gradients cancel to 1e-4; together it is rounding."""
    published.float().set_schedule("two_level")
    chains = [module for module in published.modules() if isinstance(module, ReversibleSequence)]
    for chain in chains:
        chain.stream_dtype = torch.float32
    errors = step(published, data, torch.float32)
    for chain in chains:
        chain.stream_dtype = None
    published.double()
    norms = dict(zip(data["names"], data["grad_norm"], strict=True))
    total = sum((max(errors[name]) * norm) ** 2 for name, norm in norms.items()) ** 0.5
    assert errors["out"][0] <= 1e-4
    assert total <= 1e-3 * np.linalg.norm(data["grad_norm"])


@pytest.mark.slow
def test_published_checkpoint_with_all_its_keys_is_read_and_written(
    published: IDM, keys: dict[str, tuple[str, list[int]]], data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    published.float()
    path = tmp_path / "net_params_50.pkl"
    published.save_published(str(path))
    state = torch.load(path, weights_only=True)
    assert len(state) == 1079
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {key: shape for key, (_, shape) in keys.items()}
    for key, (first, _) in keys.items():
        assert state[key].data_ptr() == state[first].data_ptr(), key
    again = IDM.from_published(str(path))
    for name, parameter in published.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    published.double()
