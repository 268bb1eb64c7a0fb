"""Where a run starts: at the beginning, or at a checkpoint of a run with the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from idm_fast.outputs import InputError
from idm_fast.training.checkpoint import Checkpoint, find_checkpoint, has_checkpoints
from idm_fast.training.config import TrainingConfig

IDENTITY = ("step_number", "block_size", "seed")
"""What a run cannot change under way: the network, its measurements, its random choices."""

TRAJECTORY = (
    "cs_ratio", "resolution", "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1",
    "adam_beta2", "max_grad_norm", "mixed_precision", "ema_decay",
)  # fmt: skip
"""What may be changed for the rest of a run, whose losses then differ from those of an uninterrupted one."""


def starting_checkpoint(config: TrainingConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `config` asks to continue from; None to start at the beginning.

    Raises InputError if it cannot be had, or if a new run would write over the checkpoints of another.
    """
    if config.resume_from_checkpoint is None:
        if has_checkpoints(config.output_dir):
            raise InputError(
                f"--output_dir {config.output_dir} already holds checkpoints; continue with "
                "--resume_from_checkpoint latest, or choose another folder"
            )
        return None
    checkpoint, broken = find_checkpoint(config.resume_from_checkpoint, config.output_dir)
    for line in broken:
        say(line)
    say(f"continuing from {checkpoint.folder}" if checkpoint else "no checkpoint yet: starting at the beginning")
    return checkpoint


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes the rest of the run differ from that of an uninterrupted one, in words; both as in trainer_state.json.

    Raises InputError if it would be another run.
    """
    before, after = saved["settings"], now["settings"]
    for name in IDENTITY:
        if before[name] != after[name]:
            raise InputError(
                f"--{name} is {after[name]}, but the run to be continued has {before[name]}; pass that, or start a new "
                "run from its weights with --pretrained_model_name_or_path"
            )
    found = [
        f"--{name} from {before.get(name)} to {after[name]}" for name in TRAJECTORY if before.get(name) != after[name]
    ]
    if saved["global_batch"] != now["global_batch"]:
        found.append(f"the global batch from {saved['global_batch']} to {now['global_batch']}")
    if saved["images"] != now["images"]:
        found.append("the training images")
    return found
