"""Weights on disk → a model ready for inference, with every reason why they cannot be used said before anything runs.

Two kinds are read: a folder written by `IDM.save_pretrained` (config.json and safetensors) and a file of the published
code (`net_params_50.pkl`), which goes through `torch.load(weights_only=True)`. Nothing in a pickle is ever executed.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError, reason

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "tiny"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PUBLISHED_SUFFIXES = (".pkl", ".pt", ".pth", ".bin")


def load_weights(path: str | Path | None = None, step_number: int | None = None) -> IDM:
    """The model of `path` (left out: the one that comes with the package), on the CPU, in eval mode.

    Raises InputError if the path does not exist, files are missing, empty, truncated or of another model, the weights
    hold NaN or parameters out of range, or they were trained for a number of steps T other than `step_number`.
    """
    if path is None:
        path = DEFAULT_WEIGHTS
        if not (path / CONFIG_NAME).exists():
            raise InputError(
                "this installation comes without default weights; pass --weights, or make some with `idm-fast train`"
            )
    path = Path(path)
    if not path.exists():
        raise InputError(f"the weights {path} do not exist; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    model = _from_folder(path, step_number) if path.is_dir() else _from_published(path, step_number)
    broken = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise InputError(f"the weights {path} hold NaN or infinite values in {len(broken)} tensors, first {broken[0]}")
    try:
        model.check_parameters()
    except ValueError as error:
        raise InputError(f"the weights {path}: {reason(error)}") from error
    return model.eval()


def require_trained_for(model: IDM, ratio: float, block_size: int, any_ratio: bool = False) -> None:
    """Raises InputError if the weights say what they were trained for and it is something else, unless `any_ratio`."""
    ratios, trained_block_size = model.config["trained_ratios"], model.config["block_size"]
    if any_ratio:
        return
    if ratios and not any(abs(trained - ratio) < 1e-6 for trained in ratios):
        known = ", ".join(f"{trained:g}" for trained in ratios)
        raise InputError(
            f"ratio {ratio:g} was asked for, but these weights were trained for {known}; "
            "use one of those, other --weights, or --any_ratio to try all the same"
        )
    if trained_block_size and trained_block_size != block_size:
        raise InputError(
            f"block_size {block_size} was asked for, but these weights were trained for {trained_block_size}; "
            "use that, other --weights, or --any_ratio to try all the same"
        )


def _from_folder(path: Path, step_number: int | None) -> IDM:
    config = _read_config(path)
    _require_steps(path, config.get("steps"), step_number)
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PUBLISHED_SUFFIXES)
        hint = f"; {pickles[0]} there is a pickle, which is not executed: convert it to safetensors" if pickles else ""
        raise InputError(f"the weights folder {path} has no {WEIGHTS_NAME}{hint}")
    if weights.stat().st_size == 0:
        raise InputError(f"the weights file {weights} is empty (0 bytes); copy it again or train again")
    try:
        with safe_open(weights, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception as error:  # safetensors has an exception of its own for each kind of damage
        raise InputError(f"the weights file {weights} is damaged: {reason(error)}") from error
    try:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in IDM.from_config(config).state_dict().items()}
        _require_same_tensors(weights, expected, found)
        return IDM.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the weights folder {path} cannot be loaded as an IDM: {reason(error)}") from error


def _require_same_tensors(weights: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """diffusers would fill a missing tensor with random numbers and only warn."""
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"{weights} does not fit its {CONFIG_NAME}: {len(differing)} tensors differ, first {name}, "
            f"which is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}"
        )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise InputError(f"the weights folder {path} has no {CONFIG_NAME}; expected what `idm-fast train` writes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged: {reason(error)}") from error
    if not isinstance(config, dict) or config.get("_class_name") != "IDM":
        name = config.get("_class_name") if isinstance(config, dict) else None
        raise InputError(f"{file} describes {name or 'no model'}; expected an IDM, as `idm-fast train` writes it")
    return config


def _from_published(path: Path, step_number: int | None) -> IDM:
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is a file; pass the folder that holds it and its {CONFIG_NAME}")
    if path.suffix not in PUBLISHED_SUFFIXES:
        raise InputError(f"the weights {path} are neither a folder nor a published checkpoint (.pkl)")
    if path.stat().st_size == 0:
        raise InputError(f"the weights file {path} is empty (0 bytes); download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on the pickle protocol before it refuses the file
            model = IDM.from_published(str(path))
    except Exception as error:  # refused pickles, damaged files and foreign keys each raise something else
        why = reason(error) if isinstance(error, ValueError) else "it is damaged, or no file of PyTorch"
        if "Weights only load failed" in why:
            why = "it holds more than tensors, which is refused and never executed"
        raise InputError(f"{path} cannot be used as a published IDM checkpoint: {why}") from error
    _require_steps(path, model.config["steps"], step_number)
    return model


def _require_steps(path: Path, steps: Any, step_number: int | None) -> None:
    if step_number is not None and steps != step_number:
        raise InputError(
            f"the weights {path} were trained for {steps} steps, and --step_number is {step_number}; "
            "leave it out or take other weights"
        )
