"""`idm-fast train`: hands the flags to the trainer."""

from __future__ import annotations

import argparse

from idm_fast.training.config import TrainingConfig
from idm_fast.training.trainer import train


def run(arguments: argparse.Namespace) -> None:
    """Trains as the flags say. Raises InputError before any work if they cannot be met."""
    train(TrainingConfig.from_arguments(arguments))
