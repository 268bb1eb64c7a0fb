"""Folders `checkpoint-N/` that are either whole or noticed as broken, whatever moment the process was killed at.

A checkpoint is written to a hidden folder, flushed to the disk, and renamed. Its manifest, written last, holds size and
SHA-256 of every file; a checkpoint whose manifest does not hold is passed over. What lies in one:

    config.json, *.safetensors   the weights, as `IDM.save_pretrained` writes them
    ema/                         the averaged weights likewise, if the run keeps them
    optimizer.pt                 state dicts of Adam and, in fp16, of the loss scaler; tensors and numbers alone
    trainer_state.json           the step, the settings, the training images' fingerprint
    manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from idm_fast.outputs import InputError, reason

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
STATE = "trainer_state.json"
EMA = "ema"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk; `step` weight updates went into it."""

    folder: Path
    step: int

    def trainer_state(self) -> dict[str, Any]:
        """What `save_checkpoint` was given as `state`, and the step."""
        return json.loads((self.folder / STATE).read_text())

    def optimizer_state(self) -> dict[str, Any]:
        """The state dicts by name, on the CPU. A file with more than tensors and numbers is refused with InputError."""
        try:
            return torch.load(self.folder / OPTIMIZER, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file of another origin makes the unpickler raise
            raise InputError(f"{self.folder / OPTIMIZER} cannot be read safely: {reason(error)}") from error


def save_checkpoint(
    output_dir: Path,
    step: int,
    write_weights: Callable[[Path], object],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes output_dir/checkpoint-{step} and removes the oldest beyond `total_limit`.

    `write_weights` gets the folder to write into. An older checkpoint of the same step is replaced.
    """
    folder = output_dir / f"checkpoint-{step}"
    with _whole_folder(folder) as unfinished:
        write_weights(unfinished)
        torch.save(optimizer, unfinished / OPTIMIZER)
        (unfinished / STATE).write_text(json.dumps({"step": step} | state, indent=2))
        names = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file())
        manifest = {name: _size_and_digest(unfinished / name) for name in names}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
    if total_limit is not None:
        older = [path for _, path in _numbered(output_dir) if path != folder]
        for path in older[: max(0, len(older) + 1 - total_limit)]:
            _remove(path)
    return folder


def publish_weights(output_dir: Path, write_weights: Callable[[Path], object]) -> None:
    """Puts what `write_weights` writes into a folder at the top of output_dir, the weights before their config.json."""
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir / f"{_UNFINISHED}weights-{os.getpid()}"
    unfinished.mkdir()
    try:
        write_weights(unfinished)
        _flush(unfinished)
        for path in sorted(unfinished.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            os.replace(path, output_dir / path.name)
        _flush_folder(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def find_checkpoint(resume: str, output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, and a line for each that was passed over because it is broken.

    Args:
        resume: "latest" in output_dir, or a checkpoint-N folder (a path, or its name within output_dir). If the named
            one is broken, the one before it in the same folder is taken.

    Returns None as checkpoint if "latest" was asked for and there is none at all.
    Raises InputError if the named folder does not exist, or if there are checkpoints and all are broken.
    """
    if resume == "latest":
        candidates = _numbered(output_dir)
    else:
        folder = Path(resume) if Path(resume).is_dir() else output_dir / resume
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if not folder.is_dir() or not match:
            raise InputError(f"--resume_from_checkpoint is {resume}; expected latest or a checkpoint-N folder")
        candidates = [item for item in _numbered(folder.parent) if item[0] <= int(match[1])]
    broken: list[str] = []
    for step, folder in reversed(candidates):
        fault = _fault(folder)
        if fault is None:
            return Checkpoint(folder, step), broken
        broken.append(f"{folder} is broken ({fault}) and is passed over")
    if broken:
        raise InputError(f"--resume_from_checkpoint {resume}: no checkpoint is whole; {'; '.join(broken)}; remove them")
    return None, []


def has_checkpoints(output_dir: Path) -> bool:
    """Whether output_dir holds any checkpoint-N, whole or not."""
    return bool(_numbered(output_dir))


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a killed process left while it wrote or removed a checkpoint."""
    for path in output_dir.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, which appears as `folder` at the end, or not at all."""
    unfinished = folder.with_name(f"{_UNFINISHED}{folder.name}-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _flush(unfinished)
        if folder.exists():
            _remove(folder)
        os.rename(unfinished, folder)
        _flush_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle of rmtree must not leave a folder that looks like a checkpoint.
    doomed = folder.with_name(f"{_UNFINISHED}{folder.name}-removed-{os.getpid()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-N, by step."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if its manifest holds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    if not isinstance(manifest, dict) or not {OPTIMIZER, STATE, "config.json"} <= set(manifest):
        return f"{MANIFEST} does not name all files"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = _size_and_digest(path)
        if found != expected:
            return f"{name} is not what was written: found {found}, expected {expected}"
    return None


def _size_and_digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
