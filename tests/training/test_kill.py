"""kill -9 at random moments: whatever is left can be resumed, and the run ends as if nothing had happened."""

import multiprocessing
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from idm_fast.training.checkpoint import find_checkpoint
from idm_fast.training.trainer import train

KILLS = 20
STEPS = 24
WEIGHTS = "diffusion_pytorch_model.safetensors"


def start(target, *arguments):
    # A fork server that has imported everything starts a training process in milliseconds, so that many kills fit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["idm_fast.training.trainer"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for_a_checkpoint_after(step, folder, process):
    while process.is_alive() and not any(int(path.name[11:]) > step for path in folder.glob("checkpoint-*")):
        time.sleep(0.001)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_an_uninterrupted_one(settings, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = dict(max_train_steps=STEPS, checkpointing_steps=1, checkpoints_total_limit=2, ema_decay=0.9)
    whole = settings(**options, output_dir=tmp_path / "whole")
    killed = settings(**options, output_dir=tmp_path / "killed", resume_from_checkpoint="latest")
    start(time.time).join()
    process, begin = start(train, whole), time.monotonic()
    wait_for_a_checkpoint_after(0, whole.output_dir, process)
    startup, begin = time.monotonic() - begin, time.monotonic()
    process.join()
    assert process.exitcode == 0
    update = (time.monotonic() - begin) / STEPS

    moments, steps, deaths = random.Random(0), [0], 0
    for number in range(KILLS):
        process = start(train, killed)
        if number % 3:  # in an update or while a checkpoint is written or removed; else while it starts
            wait_for_a_checkpoint_after(steps[-1], killed.output_dir, process)
        process.join(moments.uniform(0, 1.5 * update if number % 3 else startup))
        process.kill()
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
        checkpoint, broken = find_checkpoint("latest", killed.output_dir)
        assert broken == []
        steps.append(checkpoint.step if checkpoint else 0)
    assert steps == sorted(steps) and deaths > KILLS / 2, (steps, deaths)

    process = start(train, killed)
    process.join()
    assert process.exitcode == 0
    assert lines(killed.output_dir) == lines(whole.output_dir)
    ended, expected = (load_file(run.output_dir / WEIGHTS) for run in (killed, whole))
    assert all(torch.equal(value, ended[name]) for name, value in expected.items())
    assert sorted(path.name for path in killed.output_dir.iterdir()) == [
        f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}", "config.json", WEIGHTS, "metrics.jsonl"
    ]  # fmt: skip
