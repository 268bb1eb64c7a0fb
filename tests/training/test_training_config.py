"""The settings: the published recipe by default, one flag for each, and every impossible value refused by name."""

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest

from idm_fast.outputs import InputError
from idm_fast.training.config import TrainingConfig, add_training_arguments


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    return TrainingConfig.from_arguments(parser.parse_args(arguments))


def test_defaults_are_the_published_recipe():
    config = TrainingConfig(train_data_dir="photos", output_dir="out")
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2) == (1e-4, 0.9, 0.999)
    assert config.max_grad_norm is None and config.gradient_accumulation_steps == 1
    assert (config.resolution, config.block_size, config.step_number, config.train_batch_size) == (256, 32, 3, 8)
    assert (config.max_train_steps, config.lr_scheduler, config.cs_ratio, config.seed) == (50_000, "step", (0.1,), 2025)


def test_the_command_line_has_the_same_defaults():
    assert parse("--train_data_dir", "photos", "--output_dir", "out") == TrainingConfig(
        train_data_dir="photos", output_dir="out"
    )


def test_every_setting_has_a_flag_that_reaches_it():
    arguments = ["--train_data_dir=a", "--output_dir=b", "--cs_ratio", "0.1", "0.5", "--max_grad_norm=1"]
    arguments += ["--model=tiny", "--adam_beta1=0.8", "--max_train_seconds=60", "--validation_data_dir=c"]
    arguments += ["--report_to=tensorboard"]
    config = parse(*arguments)
    assert config == TrainingConfig(
        train_data_dir="a", output_dir="b", cs_ratio=(0.1, 0.5), max_grad_norm=1.0, model="tiny", adam_beta1=0.8,
        max_train_seconds=60.0, validation_data_dir="c", report_to="tensorboard",
    )  # fmt: skip
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    assert all(f"--{field.name}" in parser.format_help() for field in fields(TrainingConfig))
    assert "(default: 50000)" in parser.format_help() and "80 % of the steps" in " ".join(parser.format_help().split())


def test_reading_the_flags_does_not_import_torch():
    code = "import sys, idm_fast.training; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_good_settings_pass_and_leave_nothing_on_the_disk(settings, tmp_path):
    settings().check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("cs_ratio", 0.0, "(0, 1]"),
        ("cs_ratio", 1.5, "(0, 1]"),
        ("cs_ratio", float("nan"), "(0, 1]"),
        ("cs_ratio", (0.1, -0.1), "(0, 1]"),
        ("cs_ratio", (), "at least one"),
        ("resolution", 40, "multiple of 16"),
        ("resolution", 0, "at least 1"),
        ("block_size", 0, "at least 1"),
        ("train_batch_size", 0, "at least 1"),
        ("train_batch_size", 1.5, "whole number"),
        ("max_train_steps", -1, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("step_number", 0, "at least 1"),
        ("checkpointing_steps", 0, "at least 1"),
        ("checkpoints_total_limit", 0, "at least 1"),
        ("validation_steps", 0, "at least 1"),
        ("dataloader_num_workers", -1, "at least 0"),
        ("lr_warmup_steps", 4, "less than 4"),
        ("learning_rate", 0.0, "positive"),
        ("learning_rate", float("inf"), "positive"),
        ("max_grad_norm", -1.0, "positive"),
        ("max_train_seconds", 0.0, "positive"),
        ("adam_beta1", 1.0, "below 1"),
        ("ema_decay", 1.0, "below 1"),
        ("seed", -1, "0 to"),
        ("seed", 2**32, "0 to"),
        ("model", "huge", "sd15, tiny"),
        ("schedule", "fast", "store, flat, two_level"),
        ("mixed_precision", "fp8", "no, bf16, fp16"),
        ("lr_scheduler", "linear", "step, cosine"),
        ("report_to", "wandb", "none, tensorboard"),
        ("train_data_dir", "/no/such/folder", "existing folder"),
        ("validation_data_dir", "/no/such/folder", "existing folder"),
    ],
)
def test_an_impossible_value_is_refused_by_the_name_of_its_flag(settings, tmp_path, name, value, expected):
    with pytest.raises(InputError) as caught:
        settings(**{name: value}).check()
    assert str(caught.value).startswith(f"--{name} is ") and expected in str(caught.value)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_crop_must_hold_whole_blocks_and_be_halved_twice(settings):
    with pytest.raises(InputError, match="multiple of 132 with --block_size 33; 264 is the nearest"):
        settings(resolution=256, block_size=33).check()


def test_an_output_folder_that_cannot_be_made_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/idm"):
        with pytest.raises(InputError, match="--output_dir is .*can be written"):
            settings(output_dir=folder).check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
