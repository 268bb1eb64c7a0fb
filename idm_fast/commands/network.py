"""What `reconstruct` and `evaluate` share: from the flags to a network on a device."""

from __future__ import annotations

import argparse
from typing import cast

import torch

from idm_fast.models.idm import IDM
from idm_fast.ops.choice import OpByOp
from idm_fast.ops.registry import OPS, current_choice, use
from idm_fast.outputs import InputError
from idm_fast.pretrained import load_weights

BLOCK_SIZE, SEED = 32, 2025  # of the published runs


def open_network(arguments: argparse.Namespace) -> tuple[IDM, torch.device]:
    """Chooses device and implementation and loads the weights. Raises InputError where the machine or they cannot."""
    device = torch.device(choose_device(arguments.device))
    if arguments.impl != "auto":  # "auto" leaves a choice by IDM_FAST_IMPL in force
        try:
            use(arguments.impl)
        except RuntimeError as error:
            raise InputError(f"--impl {arguments.impl}: {error}") from error
        _require_kernels_for(device, arguments.impl)
    model = load_weights(arguments.weights, arguments.step_number)
    cast(torch.nn.Module, model).to(device)  # diffusers types its own `to` wrongly
    return model, device


def _require_kernels_for(device: torch.device, flag: str) -> None:
    """InputError unless what was chosen serves `device`: for some op, or where it names ops, for each of them."""
    choice = current_choice()
    named = [(op, name) for op in OPS.values() if (name := op.named_in(choice)) in op.implementations]
    served = [op.serves(name, device.type) for op, name in named if name]
    if not (all(served) if isinstance(choice, OpByOp) else any(served)):
        raise InputError(f"--impl {flag}: it has no kernels for device {device.type}; choose another of either")


def choose_device(name: str) -> str:
    """"auto", "cpu" or "cuda" → "cpu" or "cuda". Raises InputError if CUDA is asked for and not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: PyTorch sees no CUDA device (`idm-fast doctor` says more); use --device cpu")
    return ("cuda" if available else "cpu") if name == "auto" else name


def sensing_defaults(arguments: argparse.Namespace, model: IDM) -> tuple[int, int]:
    """Block size and seed: what was asked for, else what the weights were trained for, else the published ones."""
    config = model.config
    block_size = arguments.block_size or config["block_size"] or BLOCK_SIZE
    seed = next(value for value in (arguments.seed, config["sensing_seed"], SEED) if value is not None)
    return block_size, seed
