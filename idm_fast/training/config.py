"""Every setting of a training run: its name, default, help text and limits stand here and nowhere else.

The command line is made from the same fields (`add_training_arguments`), under the names of diffusers' example scripts.
The defaults are the published recipe of IDM: Adam 1e-4, halved at 20, 40, 60 and 80 % of the steps, L1, batch 8, 256².
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from idm_fast.memory.schedule import SCHEDULES, keep_for
from idm_fast.outputs import InputError, reason

SIDE_MULTIPLE = 4
"""The U-Net unshuffles by 2 and halves once."""

METAVARS = {int: "N", float: "X", Path: "DIR"}


def _flag(group: str, help: str, *, type: Callable[[str], Any] = str, default: Any = MISSING, **argument: Any) -> Any:
    metadata = {"group": group, "help": help, "type": type, **argument}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TrainingConfig:
    """What `idm_fast.training.train` is told. Strings are accepted for folders, one number or several for `cs_ratio`.

    `check()` raises InputError for anything that cannot work; `train` calls it before it does anything else.
    """

    train_data_dir: Path = _flag(
        "data", "folder of training images, searched with its subfolders; their luma is used", type=Path
    )
    output_dir: Path = _flag("data", "folder for the weights, checkpoint-N/ and metrics.jsonl", type=Path)
    resolution: int = _flag(
        "data", "side of the square training crops in pixels; smaller images are left out", type=int, default=256
    )
    dataloader_num_workers: int = _flag(
        "data", "processes that load images; 0 is enough while the images fit the 1 GiB cache", type=int, default=0
    )

    pretrained_model_name_or_path: str | None = _flag(
        "model",
        "weights to start from: a Stable Diffusion 1.5 folder or hub name, a published IDM file (.pkl), or an IDM "
        "folder (whose own architecture is then used); left out: random weights",
        default=None,
    )
    model: str = _flag(
        "model", "architecture when no weights are given: sd15 (115 M parameters) or tiny, for a CPU", default="sd15",
        choices=("sd15", "tiny"),
    )
    step_number: int = _flag("model", "number of sampling steps T", type=int, default=3)
    schedule: str = _flag(
        "model", "what backward keeps: store (plain autograd), flat (layers are inverted: a ninth of the memory) or two_level "
        "(steps are run again besides: half of that)",
        default="two_level", choices=SCHEDULES,
    )
    keep: tuple[str, ...] | None = _flag(
        "model", "what flat and two_level store besides: attention (its outputs; fewer FLOP), steps (two_level; the default)",
        default=None, nargs="*",
    )

    cs_ratio: tuple[float, ...] = _flag(
        "sensing", "measurements a pixel, in (0, 1]; of several, one is drawn for every batch", type=float,
        default=(0.1,), nargs="+",
    )
    block_size: int = _flag("sensing", "side of a sensing block; the matrix has block_size² rows", type=int, default=32)
    seed: int = _flag(
        "sensing", "decides the sensing matrix and every random choice of the run", type=int, default=2025
    )

    train_batch_size: int = _flag("optimization", "crops a process in one forward pass", type=int, default=8)
    gradient_accumulation_steps: int = _flag(
        "optimization", "forward passes before the weights are updated", type=int, default=1
    )
    max_train_steps: int = _flag("optimization", "number of weight updates", type=int, default=50_000)
    max_train_seconds: float | None = _flag(
        "optimization", "stop and save after this time, wherever the run is; a resumed run counts anew", type=float,
        default=None,
    )
    learning_rate: float = _flag("optimization", "learning rate at the start", type=float, default=1e-4)
    lr_scheduler: str = _flag(
        "optimization", "step: halved at 20, 40, 60 and 80 % of the steps (published); cosine: down to 0",
        default="step", choices=("step", "cosine"),
    )
    lr_warmup_steps: int = _flag("optimization", "updates of linear warm-up", type=int, default=0)
    adam_beta1: float = _flag("optimization", "Adam's decay of the gradient's mean", type=float, default=0.9)
    adam_beta2: float = _flag("optimization", "Adam's decay of its square", type=float, default=0.999)
    max_grad_norm: float | None = _flag(
        "optimization", "longer gradients are shortened to this 2-norm; left out: never", type=float, default=None
    )
    mixed_precision: str = _flag(
        "optimization", "autocast of the network; fp16 needs a GPU", default="no", choices=("no", "bf16", "fp16")
    )
    ema_decay: float = _flag(
        "optimization", "validate and save an exponential average of the weights with this decay, e.g. 0.999; 0: off",
        type=float, default=0.0,
    )

    checkpointing_steps: int = _flag("checkpoints", "updates between checkpoint-N/ folders", type=int, default=1000)
    checkpoints_total_limit: int | None = _flag(
        "checkpoints", "keep this many checkpoints, removing the oldest; left out: all", type=int, default=None
    )
    resume_from_checkpoint: str | None = _flag(
        "checkpoints", "continue a run: latest, or a checkpoint-N folder", default=None
    )

    validation_data_dir: Path | None = _flag(
        "validation and logs", "folder of images for PSNR, SSIM and a picture while training", type=Path, default=None
    )
    validation_steps: int = _flag("validation and logs", "updates between validations", type=int, default=1000)
    report_to: str = _flag(
        "validation and logs", "metrics.jsonl is always written; tensorboard too on request", default="none",
        choices=("none", "tensorboard"),
    )
    logging_dir: str = _flag(
        "validation and logs", "folder for tensorboard, inside output_dir unless absolute", default="logs"
    )

    def __post_init__(self) -> None:
        self.train_data_dir, self.output_dir = Path(self.train_data_dir), Path(self.output_dir)
        if self.validation_data_dir is not None:
            self.validation_data_dir = Path(self.validation_data_dir)
        ratios = self.cs_ratio if isinstance(self.cs_ratio, Sequence) else (self.cs_ratio,)
        self.cs_ratio = tuple(ratios)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> TrainingConfig:
        """The settings in what a parser with `add_training_arguments` returned."""
        return cls(**{setting.name: getattr(arguments, setting.name) for setting in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, folders as strings, ratios as a list."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return values | {"cs_ratio": list(self.cs_ratio)}

    def check(self) -> None:
        """Raises InputError, naming the flag, for a value that cannot work. Leaves nothing on the disk."""
        for setting in fields(self):
            choices = setting.metadata.get("choices")
            if choices and getattr(self, setting.name) not in choices:
                self._refuse(setting.name, f"one of {', '.join(choices)}")
        self._check_numbers()
        self._check_crops()
        self._check_schedule()
        self._check_folders()
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            self._refuse("report_to", "an installed tensorboard; pip install tensorboard, or leave the flag out")

    def _check_numbers(self) -> None:
        for name in (
            "resolution", "step_number", "block_size", "train_batch_size", "gradient_accumulation_steps",
            "max_train_steps", "checkpointing_steps", "validation_steps",
        ):
            self._require(name, _is_count(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("dataloader_num_workers", "lr_warmup_steps"):
            self._require(name, _is_count(getattr(self, name), 0), "a whole number of at least 0")
        limit = self.checkpoints_total_limit
        self._require("checkpoints_total_limit", limit is None or _is_count(limit, 1), "a whole number of at least 1")
        self._require("seed", _is_count(self.seed, 0) and self.seed < 2**32, "a whole number from 0 to 2³² − 1")
        self._require(
            "lr_warmup_steps", self.lr_warmup_steps < self.max_train_steps, f"less than {self.max_train_steps} updates"
        )
        for name in ("learning_rate", "max_grad_norm", "max_train_seconds"):
            value = getattr(self, name)
            self._require(name, value is None or (value > 0 and math.isfinite(value)), "a positive number")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        self._require("cs_ratio", bool(self.cs_ratio), "at least one ratio, e.g. 0.1")
        for ratio in self.cs_ratio:
            if not 0 < ratio <= 1:
                raise InputError(f"--cs_ratio is {ratio}; expected a ratio in (0, 1], e.g. 0.1 for 10 %")

    def _check_schedule(self) -> None:
        try:
            keep_for(self.schedule, self.keep)
        except ValueError as error:
            raise InputError(f"--{error}") from None

    def _check_crops(self) -> None:
        multiple = math.lcm(self.block_size, SIDE_MULTIPLE)
        if self.resolution % multiple:
            near = max(multiple, round(self.resolution / multiple) * multiple)
            why = f"with --block_size {self.block_size}"
            self._refuse("resolution", f"a multiple of {multiple} {why}; {near} is the nearest")

    def _check_folders(self) -> None:
        for name in ("train_data_dir", "validation_data_dir"):
            folder = getattr(self, name)
            self._require(name, folder is None or folder.is_dir(), "an existing folder of images")
        ancestor = self.output_dir
        while not ancestor.exists() and ancestor != ancestor.parent:
            ancestor = ancestor.parent
        try:
            with tempfile.TemporaryFile(dir=ancestor):
                pass
        except OSError as error:
            self._refuse("output_dir", f"a folder that can be written ({ancestor}: {reason(error)})")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            self._refuse(name, expected)

    def _refuse(self, name: str, expected: str) -> None:
        raise InputError(f"--{name} is {getattr(self, name)}; expected {expected}")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of TrainingConfig, grouped, with its default in the help text."""
    titles = dict.fromkeys(setting.metadata["group"] for setting in fields(TrainingConfig))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for setting in fields(TrainingConfig):
        options = dict(setting.metadata)
        group, text = groups[options.pop("group")], options.pop("help").replace("%", "%%")
        if "choices" not in options:
            options["metavar"] = METAVARS.get(options["type"], "NAME")
        if setting.default is MISSING:
            options["required"] = True
        else:
            options["default"] = setting.default
            text += "" if setting.default is None else f" (default: {_shown(setting)})"
        group.add_argument(f"--{setting.name}", help=text, **options)


def _shown(setting: Field[Any]) -> str:
    default = setting.default
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
