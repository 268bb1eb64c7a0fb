"""Convolutions and linear layers in autocast's dtype, with weights that are cast once a step (`reversible/casts.py`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.reversible.casts import cast


def layer_dtype(x: Tensor) -> torch.dtype:
    """What convolutions and products compute in: autocast's dtype where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def weights_in(layer: nn.Conv2d | nn.Linear, x: Tensor) -> tuple[Tensor, Any]:
    """Weight and bias (a tensor or None) of `layer` in the dtype that it computes in; as they are outside of autocast."""
    weight, bias = layer.weight, layer.bias
    if not torch.is_autocast_enabled(x.device.type):
        return weight, bias
    dtype = layer_dtype(x)
    return cast(weight, dtype), None if bias is None else cast(bias, dtype)


class Conv2d(nn.Conv2d):
    """torch's, with weights from `weights_in`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *weights_in(self, x))


class Linear(nn.Linear):
    """torch's, with weights from `weights_in`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *weights_in(self, x))
