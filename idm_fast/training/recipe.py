"""What the training recipe computes: the loss, the learning rate of an update, the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from idm_fast.models.idm import IDM
from idm_fast.physics import BlockCompressedSensing
from idm_fast.training.config import TrainingConfig


class ReconstructionLoss(nn.Module):
    """Mean |model(y, physics) − x|. What accelerate wraps, so that the network itself stays as it is for validation."""

    def __init__(self, model: IDM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, physics: BlockCompressedSensing) -> Tensor:
        return (self.model(y, physics) - x).abs().mean()


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of update `step` (0-based): warm-up, then halved at 20, 40, 60, 80 % or a half cosine to 0.

    A function of the step alone, so that it needs no state in a checkpoint.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "step":
        return config.learning_rate * 0.5 ** min(4, 5 * step // config.max_train_steps)
    progress = (step - config.lr_warmup_steps) / (config.max_train_steps - config.lr_warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def averaged(model: IDM, decay: float) -> AveragedModel:
    """An average of the weights with `decay`, shorter while few updates n were made: min(decay, (1 + n)/(10 + n))."""

    @torch.no_grad()
    def move(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=move)
