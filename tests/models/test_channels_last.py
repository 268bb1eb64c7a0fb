"""The U-Net in NHWC (`unet.to(memory_format=torch.channels_last)`): the same results, and features are not copied."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from idm_fast import IDM, BlockCompressedSensing

SIZE = 32


class Formats(TorchDispatchMode):
    """Counts copies between memory formats, and features (4 dimensions, several channels) by format as our ops return them."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.by_format = {"NCHW": 0, "NHWC": 0, "neither": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "idm_fast":
            inputs = {self._format(t) for t in args if self._is_features(t)}
            self.copies += len(inputs) > 1  # an op brings its operands into one format by itself
            for t in out if isinstance(out, tuple) else (out,):
                if self._is_features(t):
                    self.by_format[self._format(t)] += 1
        elif func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and args[0].ndim > 2:
            dense = torch.empty_like(args[0]).stride() == args[0].stride()
            self.copies += dense and out.stride() != args[0].stride()
        return out

    @staticmethod
    def _is_features(t: Any) -> bool:
        return isinstance(t, Tensor) and t.ndim == 4 and t.shape[0] == 2 and t.shape[1] >= 4

    @staticmethod
    def _format(t: Tensor) -> str:
        last = t.is_contiguous(memory_format=torch.channels_last)
        return "NCHW" if t.is_contiguous() else "NHWC" if last else "neither"


def step(
    memory_format: torch.memory_format, dtype: torch.dtype, schedule: str = "flat", watch: Formats | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a training step, under `watch`; bfloat16 is autocast's."""
    torch.manual_seed(0)
    weights = torch.promote_types(dtype, torch.float32)
    model = IDM(steps=1, widths=(32, 64), heads=2, norm_groups=4, schedule=schedule).to(weights)
    model.unet.to(memory_format=memory_format)
    physics = BlockCompressedSensing((SIZE, SIZE), 0.1).to(weights)
    x = torch.rand(2, 1, SIZE, SIZE, dtype=weights)
    with watch or nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(physics.A(x), physics)
        (out - x).square().sum().backward()
    return out, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("schedule", ["store", "flat"])
def test_channels_last_gives_the_same_output_and_gradients(schedule: str) -> None:
    out, gradients = step(torch.contiguous_format, torch.float64, schedule)
    out_last, gradients_last = step(torch.channels_last, torch.float64, schedule)
    torch.testing.assert_close(out_last, out)
    for found, expected in zip(gradients_last, gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_stays_so_from_the_first_convolution_to_the_last_without_a_copy(dtype: torch.dtype) -> None:
    step(torch.channels_last, dtype, watch=(found := Formats()))
    assert found.copies == 0
    assert found.by_format["NHWC"] > 0 == found.by_format["NCHW"] + found.by_format["neither"]


def test_contiguous_features_stay_so_and_are_copied_for_the_transformers_alone() -> None:
    step(torch.contiguous_format, torch.float32, watch=(found := Formats()))
    attentions = 10  # 2 in each down chain and 3 in each up chain
    assert found.by_format["NCHW"] > 0 == found.by_format["NHWC"] + found.by_format["neither"]
    assert 2 * attentions <= found.copies <= 4 * attentions  # in and out, in forward and in the replay
