"""Whole runs of `train` with a very small network."""

import json
import shutil
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from idm_fast.evaluation.protocol import evaluate
from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError
from idm_fast.physics import BlockCompressedSensing
from idm_fast.training import train
from idm_fast.training.data import RandomCrops, draw_step, transform
from idm_fast.training.trainer import ReconstructionLoss, TrainingDiverged, _Run

WEIGHTS = "diffusion_pytorch_model.safetensors"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def equal_weights(folder, other):
    first, second = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_weights_checkpoints_and_a_line_an_update(settings, lines, tmp_path):
    folder = train(settings(cs_ratio=(0.25, 0.5), checkpointing_steps=3))
    assert folder == tmp_path / "run"
    assert names(folder) == ["checkpoint-3", "checkpoint-4", "config.json", WEIGHTS, "metrics.jsonl"]
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    assert all(line.keys() == {"step", "loss", "lr", "ratio", "grad_norm"} for line in lines(folder))
    assert [line["lr"] for line in lines(folder)] == [1e-3, 5e-4, 2.5e-4, 1.25e-4]
    model = IDM.from_pretrained(folder)
    assert (model.config.trained_ratios, model.config.block_size, model.config.sensing_seed) == ([0.25, 0.5], 16, 2025)
    assert equal_weights(folder, folder / "checkpoint-4") and not equal_weights(folder, folder / "checkpoint-3")


def test_an_update_is_adam_on_the_l1_loss_of_the_drawn_crops(settings, weights, photographs, lines):
    folder = train(settings(max_train_steps=1, cs_ratio=(0.25, 0.5)))
    model = IDM.from_pretrained(weights).train()
    model.schedule = "store"  # as in the run: the order of sums matters to a gradient that is all rounding
    draw, crops = draw_step(2025, 0, (0.25, 0.5), 32), RandomCrops(photographs, 32, 2025)
    x = transform(torch.stack([crops[0, 0], crops[0, 1]]), draw.transform).float() / 255
    physics = BlockCompressedSensing((32, 32), draw.ratio, 16, 2025, permutation=draw.permutation)
    loss = (model(physics.A(x), physics) - x).abs().mean()
    loss.backward()
    assert lines(folder)[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    updated = load_file(folder / WEIGHTS)
    for name, parameter in model.named_parameters():
        # The first step of Adam: both bias-corrected moments are those of this gradient alone.
        expected = parameter - 1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
        assert torch.allclose(updated[name], expected, rtol=0, atol=1e-6), name


def test_training_lowers_the_loss(settings, lines):
    folder = train(settings(max_train_steps=60, cs_ratio=0.5, train_batch_size=4, learning_rate=5e-3))
    losses = [line["loss"] for line in lines(folder)]
    assert fmean(losses[-10:]) < 0.7 * fmean(losses[:10])


def test_a_resumed_run_equals_an_uninterrupted_one(settings, lines, photographs, tmp_path, capsys):
    options = dict(
        max_train_steps=6, checkpointing_steps=2, cs_ratio=(0.25, 0.5), ema_decay=0.9, max_grad_norm=0.1,
        schedule="two_level", validation_data_dir=photographs, validation_steps=3,
    )  # fmt: skip
    whole = train(settings(**options, output_dir=tmp_path / "whole"))
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-6")
    (broken / "checkpoint-4" / "optimizer.pt").unlink()
    train(settings(**options, output_dir=broken, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    assert f"{broken / 'checkpoint-4'} is broken (optimizer.pt is missing) and is passed over" in said
    assert f"continuing from {broken / 'checkpoint-2'}" in said and "changed since" not in said
    assert lines(broken) == lines(whole)
    assert equal_weights(broken, whole) and equal_weights(broken / "checkpoint-6", whole / "checkpoint-6")
    assert names(broken) == names(whole)


def test_resuming_without_a_checkpoint_starts_at_the_beginning(settings, lines, tmp_path):
    whole = train(settings(output_dir=tmp_path / "whole"))
    started = train(settings(resume_from_checkpoint="latest"))
    assert lines(started) == lines(whole) and equal_weights(started, whole)


def test_resuming_a_finished_run_changes_nothing(settings, lines, capsys):
    folder = train(settings())
    before = lines(folder), load_file(folder / WEIGHTS)
    train(settings(resume_from_checkpoint="latest"))
    assert "all updates were made already" in capsys.readouterr().out
    assert lines(folder) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in load_file(folder / WEIGHTS).items())


def test_accumulating_parts_equals_a_larger_batch(settings, lines, tmp_path):
    whole = train(settings(train_batch_size=4, output_dir=tmp_path / "whole"))
    parts = train(settings(train_batch_size=2, gradient_accumulation_steps=2))
    losses = [[line["loss"] for line in lines(folder)] for folder in (whole, parts)]
    # Only the order of float32 sums differs; other crops would differ in the second digit.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_trains_float32_weights(settings, lines):
    folder = train(settings(mixed_precision="bf16", max_train_steps=2, schedule="two_level"))
    assert {value.dtype for value in load_file(folder / WEIGHTS).values()} == {torch.float32}
    assert len(lines(folder)) == 2


def test_the_network_starts_from_the_seed(settings):
    runs = [
        _Run(settings(pretrained_model_name_or_path=None, model="tiny", seed=seed), accelerator())
        for seed in (1, 1, 2)
    ]
    first, same, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


def test_validation_gives_the_scores_of_the_protocol_and_a_picture(settings, lines, photographs):
    folder = train(settings(validation_data_dir=photographs, validation_steps=3, cs_ratio=(0.25, 0.5)))
    scores = {line["step"]: line["val"] for line in lines(folder) if "val" in line}
    assert scores.keys() == {3, 4}
    results = evaluate(IDM.from_pretrained(folder), sorted(photographs.iterdir()), 0.25, block_size=16, seed=2025)
    assert scores[4]["0.25"]["psnr"] == pytest.approx(fmean(result.psnr for result in results), abs=1e-5)
    assert scores[4]["0.25"]["ssim"] == pytest.approx(fmean(result.ssim for result in results), abs=1e-5)
    assert names(folder / "validation") == [
        f"step-000000{step}_ratio-{ratio}.png" for step in (3, 4) for ratio in (0.25, 0.5)
    ]


def test_the_averaged_weights_are_what_is_published(settings):
    folder = train(settings(ema_decay=0.9))
    assert equal_weights(folder, folder / "checkpoint-4" / "ema") and not equal_weights(folder, folder / "checkpoint-4")


def test_checkpoints_beyond_the_limit_are_removed(settings):
    folder = train(settings(checkpointing_steps=1, checkpoints_total_limit=2))
    assert [name for name in names(folder) if name.startswith("checkpoint")] == ["checkpoint-3", "checkpoint-4"]


def test_a_run_stops_when_its_time_is_over_and_can_go_on(settings, lines, tmp_path, capsys):
    options = dict(max_train_steps=3, checkpointing_steps=100)
    folder = train(settings(**options, max_train_seconds=1e-6))
    assert "stopped after 1 of 3 updates" in capsys.readouterr().out
    assert names(folder) == ["checkpoint-1", "config.json", WEIGHTS, "metrics.jsonl"]
    train(settings(**options, resume_from_checkpoint="latest"))
    assert lines(folder) == lines(train(settings(**options, output_dir=tmp_path / "whole")))


def test_tensorboard_on_request(settings):
    folder = train(settings(max_train_steps=1, report_to="tensorboard"))
    assert any(path.name.startswith("events") for path in (folder / "logs").iterdir())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cs_ratio": 2.0}, "--cs_ratio is 2.0"),
        ({"mixed_precision": "fp16"}, "--mixed_precision is fp16, which needs a GPU"),
        ({"step_number": 2}, "--step_number is 2, but the weights are for 1 steps"),
        ({"resolution": 128}, "all 4 images have a side below --resolution 128"),
        ({"pretrained_model_name_or_path": "/no/such/weights"}, "/no/such/weights, which does not exist"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint is checkpoint-7"),
        ({"validation_data_dir": "empty"}, "holds no images"),
        ({"train_data_dir": "empty"}, "holds no images"),
        ({"train_data_dir": "text"}, "not an image"),
        ({"pretrained_model_name_or_path": "weights_of_0_bytes"}, "0 bytes"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(settings, tmp_path, weights, changes, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("text")
    shutil.copytree(weights, tmp_path / "weights_of_0_bytes")
    (tmp_path / "weights_of_0_bytes" / WEIGHTS).write_bytes(b"")
    before = names(tmp_path)
    here = {name: str(tmp_path / value) for name, value in changes.items() if str(value) in before}
    with pytest.raises(InputError) as caught:
        train(settings(**(changes | here)))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_a_new_run_does_not_write_over_the_checkpoints_of_another(settings, lines):
    folder = train(settings())
    before = lines(folder)
    with pytest.raises(InputError, match="already holds checkpoints"):
        train(settings(seed=1))
    assert lines(folder) == before


def test_a_run_cannot_be_continued_as_another_one(settings):
    train(settings(checkpointing_steps=2))
    with pytest.raises(InputError, match="--seed is 1, but the run to be continued has 2025"):
        train(settings(seed=1, resume_from_checkpoint="latest"))


def test_what_changed_since_the_checkpoint_is_said(settings, capsys):
    train(settings())
    train(settings(max_train_steps=5, train_batch_size=1, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    assert "changed since the checkpoint: --max_train_steps from 4 to 5, the global batch from 2 to 1" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_update(settings, lines, tmp_path, monkeypatch):
    forward, calls = ReconstructionLoss.forward, []

    def fails_at_the_third(self, *arguments):
        calls.append(1)
        return forward(self, *arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(ReconstructionLoss, "forward", fails_at_the_third)
    with pytest.raises(TrainingDiverged, match="the loss of update 3 is nan; lower --learning_rate"):
        train(settings(checkpointing_steps=1))
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "metrics.jsonl"]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(settings, tmp_path, monkeypatch):
    def infinite_gradient(self, x, y, physics):
        return self.model.alpha.sum() + (self.model.merge_scale * 0).abs().sqrt().sum()

    monkeypatch.setattr(ReconstructionLoss, "forward", infinite_gradient)
    with pytest.raises(TrainingDiverged, match="the gradient of update 1 is (nan|inf)"):
        train(settings(checkpointing_steps=1))
    assert names(tmp_path / "run") == ["metrics.jsonl"]


def test_an_alpha_that_leaves_its_range_stops_the_run_before_it_is_saved(settings, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"after update 1: alpha: .* has left \(0, 1\)"):
        train(settings(learning_rate=0.6, checkpointing_steps=1))
    assert names(tmp_path / "run") == ["metrics.jsonl"]


def test_the_settings_of_the_run_are_in_its_checkpoints(settings):
    config = settings()
    saved = json.loads((train(config) / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["step"] == 4 and saved["settings"] == config.to_json() and saved["images"]["number"] == 4
