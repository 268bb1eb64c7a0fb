"""Checkpoints are whole or passed over, and never execute anything."""

import json
import pickle

import pytest
import torch

from idm_fast.outputs import InputError
from idm_fast.training.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    _size_and_digest,
    find_checkpoint,
    has_checkpoints,
    publish_weights,
    remove_unfinished,
    save_checkpoint,
)


def write_weights(folder):
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "ema").mkdir(exist_ok=True)
    (folder / "ema" / "weights.safetensors").write_bytes(b"average")


def save(output_dir, step, **options):
    optimizer, state = {"adam": {"lr": 0.5}}, {"settings": {"seed": step}}
    return save_checkpoint(output_dir, step, write_weights, optimizer, state, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def output_dir(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def test_latest_is_the_one_with_the_most_steps(output_dir):
    checkpoint, broken = find_checkpoint("latest", output_dir)
    assert (checkpoint.step, checkpoint.folder, broken) == (10, output_dir / "checkpoint-10", [])
    assert checkpoint.trainer_state() == {"step": 10, "settings": {"seed": 10}}
    assert checkpoint.optimizer_state() == {"adam": {"lr": 0.5}}


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert find_checkpoint("latest", tmp_path / "nothing") == (None, [])
    assert not has_checkpoints(tmp_path / "nothing")


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


FILES = ["weights.safetensors", "ema/weights.safetensors", "config.json", OPTIMIZER, STATE, MANIFEST]


@pytest.mark.parametrize("damage", [remove, shorten, flip_a_bit, empty])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_said(output_dir, name, damage):
    damage(output_dir / "checkpoint-10" / name)
    checkpoint, broken = find_checkpoint("latest", output_dir)
    assert checkpoint.step == 9
    assert len(broken) == 1 and "checkpoint-10 is broken" in broken[0]


def test_the_missing_file_is_named(output_dir):
    (output_dir / "checkpoint-10" / OPTIMIZER).unlink()
    assert find_checkpoint("latest", output_dir)[1] == [
        f"{output_dir / 'checkpoint-10'} is broken ({OPTIMIZER} is missing) and is passed over"
    ]


def test_all_damaged_is_an_error(output_dir):
    for folder in output_dir.iterdir():
        (folder / OPTIMIZER).unlink()
    with pytest.raises(InputError, match="no checkpoint is whole"):
        find_checkpoint("latest", output_dir)


def test_a_checkpoint_can_be_named_by_path_or_by_name(output_dir, tmp_path):
    assert find_checkpoint(str(output_dir / "checkpoint-9"), tmp_path / "elsewhere")[0].step == 9
    assert find_checkpoint("checkpoint-2", output_dir)[0].step == 2


def test_for_a_named_damaged_one_an_earlier_one_is_taken_never_a_later_one(output_dir):
    (output_dir / "checkpoint-9" / STATE).unlink()
    assert find_checkpoint("checkpoint-9", output_dir)[0].step == 2


@pytest.mark.parametrize("resume", ["checkpoint-3", "newest", "/no/such/checkpoint-1"])
def test_a_named_checkpoint_that_is_not_there_is_an_error(output_dir, resume):
    with pytest.raises(InputError, match="--resume_from_checkpoint is .*expected latest or a checkpoint-N"):
        find_checkpoint(resume, output_dir)


def test_the_oldest_beyond_the_limit_are_removed(output_dir):
    save(output_dir, 11, total_limit=2)
    assert names(output_dir) == ["checkpoint-10", "checkpoint-11"]


def test_a_checkpoint_of_the_same_step_is_replaced(output_dir):
    (output_dir / "checkpoint-10" / OPTIMIZER).unlink()
    save(output_dir, 10)
    assert find_checkpoint("latest", output_dir)[0].step == 10
    assert names(output_dir) == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]


def test_a_failure_while_writing_leaves_nothing(output_dir):
    def full_disk(folder):
        write_weights(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(output_dir, 20, full_disk, {}, {})
    with pytest.raises(OSError, match="no space"):
        publish_weights(output_dir, full_disk)
    assert names(output_dir) == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]


def test_what_a_killed_process_left_is_removed_and_never_taken_for_a_checkpoint(output_dir):
    (output_dir / "checkpoint-10").rename(output_dir / ".unfinished-checkpoint-12-77")
    assert find_checkpoint("latest", output_dir)[0].step == 9
    remove_unfinished(output_dir)
    assert names(output_dir) == ["checkpoint-2", "checkpoint-9"]


def test_the_configuration_is_published_after_the_weights(tmp_path, monkeypatch):
    import os

    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append(target.name), replace(source, target)))
    publish_weights(tmp_path, lambda folder: (folder / "a.safetensors").touch() or (folder / "config.json").touch())
    assert order == ["a.safetensors", "config.json"] and names(tmp_path) == ["a.safetensors", "config.json"]


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_a_checkpoint_is_refused_and_not_executed(output_dir, tmp_path):
    folder = output_dir / "checkpoint-10"
    torch.save({"adam": Malice(tmp_path / "owned")}, folder / OPTIMIZER, pickle_module=pickle)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[OPTIMIZER] = _size_and_digest(folder / OPTIMIZER)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    checkpoint, broken = find_checkpoint("latest", output_dir)
    assert checkpoint.step == 10 and broken == []
    with pytest.raises(InputError, match="cannot be read safely"):
        checkpoint.optimizer_state()
    assert not (tmp_path / "owned").exists()
