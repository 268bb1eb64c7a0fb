"""How far recovered streams are from the true ones, layer by layer: what `check_inverse=True` measures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Relative error of a recovered input that is warned of. Within it the gradients are right to 2e-4 (benchmark `numerics`). At
v = 0.5 on float32 streams, 11 float32 layers pass (8e-5) and 16 do not (3e-3). With bfloat16 bodies it is strict: it warns of
8 layers (3e-3), whose gradients are wrong by 1e-4 where rounding a body's input to bfloat16 costs 4e-3."""


class Drift:
    """Measures one forward pass and its backward.

    Args:
        layers: how many.
        publish: called in backward with the list of errors by layer, NaN for those not recovered yet.
    """

    def __init__(self, layers: int, publish: Callable[[list[float]], None]) -> None:
        self._publish = publish
        self._errors = [math.nan] * layers
        self._kept: list[Tensor] = []
        self._warned = False

    def keep(self, x2: Tensor) -> None:
        """The stream that the next layer's inversion has to recover; layers come in order."""
        self._kept.append(x2.detach().clone())

    @torch.no_grad()
    def compare(self, index: int, x2: Tensor) -> None:
        """Largest error of layer `index`'s recovered x2, relative to the largest value of the true one."""
        true = self._kept[index]
        if true.numel() == 0:
            return
        error, scale = torch.stack([(x2 - true).abs().max(), true.abs().max()]).tolist()
        relative = error / scale if scale > 0 else error
        self._errors[index] = relative
        self._publish(self._errors)
        if not relative <= TOLERANCE and not self._warned:
            self._warned = True
            warnings.warn(
                f"check_inverse: the recovered input of layer {index} of 0 … {len(self._errors) - 1} is off by {relative:.1e} "
                f"of its largest value (tolerance {TOLERANCE:g}), and the layers below it build on that; use "
                "stream_dtype=torch.float64, torch.int32 (exact to the bit), or fewer layers",
                RuntimeWarning,
                stacklevel=2,
            )
