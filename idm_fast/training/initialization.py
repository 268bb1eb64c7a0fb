"""The network that a run starts with: random, from weights of three formats, or from a checkpoint of the run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError, reason
from idm_fast.pretrained import load_weights
from idm_fast.training.checkpoint import Checkpoint
from idm_fast.training.config import TrainingConfig


def initial_model(config: TrainingConfig, checkpoint: Checkpoint | None) -> IDM:
    """The network in training mode, float32, on the CPU; its config says what it is now trained for.

    Raises InputError if the weights cannot be read or are for another number of steps.
    """
    torch.manual_seed(config.seed)
    if checkpoint is not None:
        model = load_weights(checkpoint.folder)
    elif config.pretrained_model_name_or_path is not None:
        model = _pretrained(config.pretrained_model_name_or_path, config.step_number)
    elif config.model == "tiny":
        model = IDM.tiny(steps=config.step_number)
    else:
        model = IDM(steps=config.step_number)
    steps = int(model.config["steps"])
    if steps != config.step_number:
        raise InputError(
            f"--step_number is {config.step_number}, but the weights are for {steps} steps; "
            f"pass --step_number {steps}"
        )
    model.set_schedule(config.schedule, config.keep)
    model.register_to_config(
        trained_ratios=sorted(set(config.cs_ratio)), block_size=config.block_size, sensing_seed=config.seed
    )
    return model.float().train()


def _pretrained(source: str, steps: int) -> IDM:
    path = Path(source)
    if path.is_file() or _is_idm(path):
        return load_weights(path)
    if not path.exists() and (source.startswith((".", "~", "/")) or source.count("/") > 1):
        raise InputError(f"--pretrained_model_name_or_path is {source}, which does not exist")
    try:
        return IDM.from_stable_diffusion(source, steps=steps)
    except Exception as error:  # diffusers, the hub and safetensors raise almost anything
        raise InputError(
            f"--pretrained_model_name_or_path {source} cannot be read as Stable Diffusion 1.5: {reason(error)}"
        ) from error


def _is_idm(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text()).get("_class_name") == "IDM"
    except (OSError, ValueError, AttributeError):
        return False
