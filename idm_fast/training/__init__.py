"""Training: `train(TrainingConfig(train_data_dir=…, output_dir=…))`.

The trainer, with torch and accelerate, is imported on first use, so that the command line's help stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from idm_fast.training.config import TrainingConfig, add_training_arguments

__all__ = ["TrainingConfig", "add_training_arguments", "train"]

if TYPE_CHECKING:
    from idm_fast.training.trainer import train


def __getattr__(name: str) -> Any:
    if name == "train":
        from idm_fast.training.trainer import train

        return train
    raise AttributeError(f"module 'idm_fast.training' has no attribute {name!r}")
