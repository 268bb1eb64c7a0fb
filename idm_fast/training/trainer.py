"""The training loop, thin on accelerate: one process or many, no/bf16/fp16, and the same numbers every way.

An update is a function of the weights, Adam's state, the settings and its number alone: crops, flips, ratio and
permutation come from `data`, loss and learning rate from `recipe`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError
from idm_fast.physics import BlockCompressedSensing
from idm_fast.pretrained import load_weights
from idm_fast.training.checkpoint import EMA, Checkpoint, publish_weights, remove_unfinished, save_checkpoint
from idm_fast.training.config import TrainingConfig
from idm_fast.training.data import GlobalBatches, RandomCrops, StepDraw, draw_step, transform
from idm_fast.training.initialization import initial_model
from idm_fast.training.metrics_log import MetricsLog
from idm_fast.training.recipe import ReconstructionLoss, averaged, learning_rate
from idm_fast.training.resumption import changes, starting_checkpoint
from idm_fast.training.validation import Validation

METRICS = "metrics.jsonl"


class TrainingDiverged(InputError):
    """The settings made the weights useless. An InputError, because other settings are the remedy."""


def train(config: TrainingConfig) -> Path:
    """Trains and returns the folder of the final weights, `config.output_dir`, for `IDM.from_pretrained`.

    The folder also gets checkpoint-N/, metrics.jsonl and, with validation images, validation/. Everything that the
    settings, images and weights can have wrong is noticed before the first update.

    Raises:
        InputError: a setting, image, weight file or checkpoint that cannot be used; nothing has been written then.
        TrainingDiverged: the loss or the gradient became NaN or infinite, or alpha or v left its range
            (`IDM.check_parameters`); the last checkpoint stays.
    """
    config.check()
    accelerator = _accelerator(config)
    try:
        with contextlib.closing(_Run(config, accelerator)) as run:
            run.to_the_end()
        return config.output_dir
    finally:
        accelerator.end_training()


class _Run:
    """Everything that lives from the first update to the last. Making it checks all input and writes nothing."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        checkpoint = starting_checkpoint(config, self._say)
        self.crops = RandomCrops(config.train_data_dir, config.resolution, config.seed, progress=self._is_main)
        if self.crops.skipped:
            self._say(f"{self.crops.skipped} images have a side below {config.resolution} and are left out")
        self.validation = Validation(config) if config.validation_data_dir is not None else None
        if checkpoint is not None:
            changed = changes(checkpoint.trainer_state(), self._state())
            if changed:
                self._say(f"changed since the checkpoint: {', '.join(changed)}")
        self.model = initial_model(config, checkpoint)
        self.loss = accelerator.prepare(ReconstructionLoss(self.model))
        adam = torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.ema = averaged(self.model, config.ema_decay) if config.ema_decay and self._is_main else None
        self.step = 0
        if checkpoint is not None:
            self._restore(checkpoint, adam)
        self.adam = accelerator.prepare(adam)
        self.operators = {
            ratio: BlockCompressedSensing(
                (config.resolution, config.resolution), ratio, config.block_size, config.seed
            ).to(self.device)
            for ratio in set(config.cs_ratio)
        }
        self.log: MetricsLog | None = None

    def to_the_end(self) -> None:
        config = self.config
        self._say(self._summary() if self.step < config.max_train_steps else "all updates were made already")
        if self._is_main:
            remove_unfinished(config.output_dir)
            config.output_dir.mkdir(parents=True, exist_ok=True)
            board = config.output_dir / config.logging_dir if config.report_to == "tensorboard" else None
            self.log = MetricsLog(config.output_dir / METRICS, self.step, board)
        batches = self._batches()
        deadline = time.monotonic() + (config.max_train_seconds or math.inf)
        bar = tqdm(
            initial=self.step, total=config.max_train_steps, desc="training", unit="step", disable=not self._is_main
        )
        with bar:
            out_of_time = False
            while self.step < config.max_train_steps and not out_of_time:
                start = time.monotonic()
                draw = draw_step(config.seed, self.step, config.cs_ratio, config.resolution)
                rate = learning_rate(config, self.step)
                loss, norm, out_of_time = self._update(draw, rate, batches, deadline)
                self.step += 1
                seconds = time.monotonic() - start
                if self.log is not None:
                    line = {"loss": loss, "lr": rate, "ratio": draw.ratio, "grad_norm": norm, "seconds": seconds}
                    self.log.write(self.step, line)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
                last = out_of_time or self.step == config.max_train_steps
                self._validate_and_save(last)
        if out_of_time and self.step < config.max_train_steps:
            self._say(
                f"stopped after {self.step} of {config.max_train_steps} updates: --max_train_seconds are over; "
                "--resume_from_checkpoint latest continues"
            )
        if self._is_main:
            publish_weights(config.output_dir, self._best_model.save_pretrained)
        self._say(f"weights: {config.output_dir}")
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _update(
        self, draw: StepDraw, rate: float, batches: Iterator[Tensor], deadline: float
    ) -> tuple[float, float, bool]:
        """One update of the weights: loss over the global batch, 2-norm of the gradient, whether time is over."""
        physics = self.operators[draw.ratio]
        physics.permutation = draw.permutation.to(self.device)
        torch.manual_seed(draw.network_seed)
        parts = self.config.gradient_accumulation_steps
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            crops = next(batches).to(self.device, non_blocking=True)
            x = transform(crops, draw.transform).contiguous().float() / 255
            y = physics.A(x)
            # Gradients are summed over processes once, after the last part.
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.loss):
                loss = self.loss(x, y, physics)
                self.accelerator.backward(loss / parts)
            total += loss.detach() / parts
        # One exchange carries both, so that all processes stop at the same update.
        over = torch.full_like(total, time.monotonic() >= deadline)
        mean_loss, any_over = self.accelerator.reduce(torch.stack([total, over]), "mean").tolist()
        self._require_finite("loss", mean_loss)
        norm = self._clip()
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        try:
            self.model.check_parameters()
        except ValueError as error:
            raise TrainingDiverged(f"after update {self.step + 1}: {error}") from error
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return mean_loss, norm, any_over > 0

    def _clip(self) -> float:
        self.accelerator.unscale_gradients(self.adam)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.mixed_precision != "fp16":  # there the loss scaler skips an update that overflowed
            self._require_finite("gradient", norm.item())
        if self.config.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return norm.item()

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            config = self.config
            remedies = [f"lower --learning_rate (now {config.learning_rate:g})"]
            remedies += [] if config.max_grad_norm else ["set --max_grad_norm 1"]
            remedies += [] if config.mixed_precision == "no" else ["leave out --mixed_precision"]
            raise TrainingDiverged(
                f"the {what} of update {self.step + 1} is {value}; {', '.join(remedies)}, and continue with "
                "--resume_from_checkpoint latest"
            )

    def _validate_and_save(self, last: bool) -> None:
        config = self.config
        if self.log is None:
            return
        # Validation comes before the checkpoint, so that a run resumed from there has its line already.
        if self.validation is not None and (last or self.step % config.validation_steps == 0):
            scores = self.validation.run(self._best_model, self.step, self.device)
            for ratio, score in scores.items():
                self._say(f"step {self.step}, ratio {ratio}: PSNR {score['psnr']:.2f} dB, SSIM {score['ssim']:.4f}")
            self.log.write(self.step, {"val": scores})
        if last or self.step % config.checkpointing_steps == 0:
            self.log.flush_to_disk()
            scaler = self.accelerator.scaler
            states = {"adam": self.adam.state_dict(), "scaler": None if scaler is None else scaler.state_dict()}
            save_checkpoint(
                config.output_dir, self.step, self._write_weights, states, self._state(), config.checkpoints_total_limit
            )

    def _write_weights(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.ema is not None:
            self._best_model.save_pretrained(folder / EMA)

    def _restore(self, checkpoint: Checkpoint, adam: torch.optim.Optimizer) -> None:
        states = checkpoint.optimizer_state()
        adam.load_state_dict(states["adam"])
        if self.accelerator.scaler is not None and states["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(states["scaler"])
        self.step = checkpoint.step
        if self.ema is not None and (checkpoint.folder / EMA).is_dir():
            self._best_model.load_state_dict(load_weights(checkpoint.folder / EMA).state_dict())
            self.ema.n_averaged.fill_(self.step)

    def _state(self) -> dict[str, Any]:
        return {
            "global_batch": self._global_batch,
            "images": {"number": len(self.crops), "fingerprint": self.crops.fingerprint},
            "settings": self.config.to_json(),
        }

    def _batches(self) -> Iterator[Tensor]:
        config, accelerator = self.config, self.accelerator
        places = GlobalBatches(
            self.step, config.max_train_steps, config.train_batch_size, config.gradient_accumulation_steps,
            accelerator.process_index, accelerator.num_processes,
        )
        loader = DataLoader(
            self.crops, batch_sampler=places, num_workers=config.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _summary(self) -> str:
        config = self.config
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        ratios = ", ".join(f"{ratio:g}" for ratio in config.cs_ratio)
        processes = self.accelerator.num_processes
        return (
            f"training {millions:.2f} M parameters, T = {config.step_number}, ratio {ratios}; "
            f"{len(self.crops)} images; "
            f"{self._global_batch} crops of {config.resolution}² an update, on {processes} × {self.device.type}; "
            f"updates {self.step + 1} to {config.max_train_steps}"
        )

    @property
    def _global_batch(self) -> int:
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def _best_model(self) -> IDM:
        return self.model if self.ema is None else cast(IDM, self.ema.module)

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _say(self, message: str) -> None:
        if self._is_main:
            tqdm.write(message)


def _accelerator(config: TrainingConfig) -> Accelerator:
    # The others wait in the next exchange while the first process validates and saves.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    # Unless told that there is nothing but CPUs, accelerate lets processes that torchrun started train one by one.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=config.mixed_precision, kwargs_handlers=[patience])
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision is fp16, which needs a GPU; expected no or bf16 on a CPU")
    return accelerator
