"""One sampling step of IDM (DESIGN §1), and runs of them as the outer reversible chain has them."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.memory.schedule import Schedule, StepSchedule
from idm_fast.reversible.constant import Constant


class SamplingStep(nn.Module):
    """x_t → f_t for one t in 1 … T, under one schedule. The U-Net is shared by all steps and is given, not owned."""

    def __init__(self, t: int, schedule: StepSchedule) -> None:
        super().__init__()
        self.t, self.schedule = t, schedule

    def forward(
        self, x: Tensor, unet: nn.Module, physics: Any, y: Tensor, aty: Tensor, abar_t: Tensor, abar_prev: Tensor
    ) -> Tensor:
        """x, aty (B, 1, H, W); y as `physics` measures; ᾱ_t and ᾱ_{t−1} have one element."""
        e = F.pixel_shuffle(unet(F.pixel_unshuffle(x, 2), aty, physics, self.t, self.schedule), 2).to(x.dtype)
        if hasattr(physics, "project_step"):
            return cast(Tensor, physics.project_step(x, e, y, abar_t, abar_prev))
        dagger = getattr(physics, "A_dagger", physics.A_adjoint)
        x0 = (x - (1 - abar_t).sqrt() * e) / abar_t.sqrt()
        x0 = x0 - dagger(physics.A(x0) - y)
        return abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * e


class StepRun(NamedTuple):
    """Consecutive steps that backward has in the same way: whether they run again, and a ModuleList of `SamplingStep`s."""

    recompute: bool
    steps: Constant


def step_runs(plan: Schedule) -> list[StepRun]:
    """The steps t = T … 1 of a schedule."""
    numbered = zip(range(len(plan), 0, -1), plan, strict=True)
    return [
        StepRun(recompute, Constant(nn.ModuleList(SamplingStep(t, schedule) for t, schedule in run)))
        for recompute, run in groupby(numbered, key=lambda step: step[1].recompute)
    ]
